"""The base class of adapters with a low rank B A (LoRA, DoRA): its scale and its start (`init`, `iterations`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from dovetail.chains.terms import LowRank
from dovetail.links.adapt.rank import RankAdapter
from dovetail.links.adapt.starts import STARTS


class LowRankAdapter(RankAdapter):
    """An adapter that adds c B A to the weight, and starts as the identity or as a method of `starts` chooses.

    A subclass is a dataclass with the fields of this class and of `RankAdapter`.
    """

    scaling: Literal["linear", "rs"]
    init_: Literal["identity", "loftq", "pissa", "lqlora"]
    iterations: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        start = STARTS.get(self.init_)
        if start is not None and self.scale <= 0:
            rule = f"init={self.init_} divides its low rank by the scale, which must be positive"
            raise self._bad(f"alpha={self.alpha}", rule, f"set alpha={self.r}")
        if self.iterations is None:
            return
        if start is None or not start.iterations:
            rule = "iterations belongs to a start that iterates: " + ", ".join(
                n for n in STARTS if STARTS[n].iterations
            )
            raise self._bad(f"iterations={self.iterations} with init={self.init_}", rule, "leave iterations out")
        if self.iterations < 1:
            fix = f"set iterations={start.iterations}"
            raise self._bad(f"iterations={self.iterations}", "iterations must be at least 1", fix)

    def divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.scaling == "rs" else rank

    @property
    def starts(self) -> Literal["identity", "weight", "quantizer"]:
        start = STARTS.get(self.init_)
        if start is None:
            return "identity"
        return "quantizer" if start.quantizer else "weight"

    def decompose(
        self, weight_oi: Tensor, quantize: Callable[[Tensor], Tensor]
    ) -> tuple[LowRank | None, dict[str, Tensor]]:
        start = STARTS[self.init_]
        taken, low_rank = start.choose(weight_oi, quantize, self.r, self.iterations or start.iterations)
        root = self.scale**0.5
        return taken, {"A": low_rank.a_ri / root, "B": low_rank.b_or / root}
