"""DoRA: a low-rank change of the weight's direction, and a trained magnitude per output row.

    W' = diag(m / ‖W + c B A‖_row) (W + c B A)        m (o,), starts at the norm; the norm takes no gradient

Source: Liu et al. 2024, eq. 5 and §4.3 (norm detached). Usually a little better than LoRA at equal rank. The planner
computes the norm in closed form from the factors, so a step costs little more than LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.link import Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, RowNorm, Term, nonzero, without
from dovetail.links.adapt.lora import LoRA, LoraConfig
from dovetail.links.adapt.low_rank import LowRankAdapter
from dovetail.links.adapt.peft import warn_of_dropout
from dovetail.links.adapt.rank import kaiming_uniform


class DoraConfig(LoraConfig):
    """peft's fields of LoRA where `use_dora` is true."""

    use_dora: bool


@register("dora")
@dataclass(frozen=True)
class DoRA(LowRankAdapter):
    """Weight-decomposed low-rank update.

    r           rank
    alpha       numerator of the scale; r when not given
    elastic     ranks to train for, of which the largest is r (`chains/layer/elastic.py`)
    scaling     "linear": alpha / r; "rs": alpha / sqrt(r)
    init_       `init` of the notation, as in LoRA; the magnitude starts at the norm of the sum
    iterations  of init, as in LoRA
    """

    r: int = always_print(8)
    alpha: float | None = None
    elastic: tuple[int, ...] = ()
    scaling: Literal["linear", "rs"] = "linear"
    init_: Literal["identity", "loftq", "pissa", "lqlora"] = "identity"
    iterations: int | None = None

    learning_rate: ClassVar[float] = 4e-4
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    summary: ClassVar[str] = "LoRA on the direction, a trained magnitude per row"
    source: ClassVar[str] = "Liu et al. 2024"
    peft_type: ClassVar[str] = LoRA.peft_type
    peft_variant: ClassVar[str] = "use_dora"
    peft_tensors: ClassVar[Mapping[str, str]] = {**LoRA.peft_tensors, "magnitude": "lora_magnitude_vector"}
    peft_config: ClassVar[type[DoraConfig]] = DoraConfig
    peft_alpha: ClassVar[str] = LoRA.peft_alpha

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        o, i = site.out_features, site.in_features
        return {"A": (self.r, i), "B": (o, self.r), "magnitude": (o,)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        shapes, magnitude = self.parameter_shapes(site), torch.linalg.vector_norm(weight_oi, dim=1)
        return {"A": kaiming_uniform(shapes["A"], generator), "B": torch.zeros(shapes["B"]), "magnitude": magnitude}

    def decompose(
        self, weight_oi: Tensor, quantize: Callable[[Tensor], Tensor]
    ) -> tuple[LowRank | None, dict[str, Tensor]]:
        taken, p = super().decompose(weight_oi, quantize)
        start_oi = quantize(without(weight_oi, taken)) + self.scale * (p["B"] @ p["A"])
        return taken, {**p, "magnitude": torch.linalg.vector_norm(start_oi, dim=1)}

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        moved = weight_oi + self.scale * (p["B"] @ p["A"])
        norm = torch.linalg.vector_norm(moved.detach(), dim=1)
        return (p["magnitude"] / nonzero(norm))[:, None] * moved, bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [LowRank(p["A"], self.scale * p["B"]), RowNorm(p["magnitude"])]

    def peft_fields(self) -> dict[str, Any]:
        return {"use_dora": True, "use_rslora": self.scaling == "rs"}

    @classmethod
    def peft_arguments(cls, config: LoraConfig, where: str) -> dict[str, Any]:
        warn_of_dropout(where, cls.name, lora_dropout=config.lora_dropout)
        return {"scaling": "rs" if config.use_rslora else "linear"}
