"""DoRA: a low-rank change of the weight's direction, and a trained magnitude per output row.

    W' = diag(m / ‖W + c B A‖_row) (W + c B A)        m (o,), starts at ‖W‖_row; the norm takes no gradient

Source: Liu et al. 2024, eq. 5 and §4.3 (norm detached). Usually a little better than LoRA at equal rank; its norm is
had in closed form from the factors (DESIGN.md §3), so a step costs little more than LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chains.link import Adapter, Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, RowNorm, Term, nonzero
from dovetail.links.adapt.rank import check_rank, check_width, elastic_ranks, kaiming_uniform


@register("dora")
@dataclass(frozen=True)
class DoRA(Adapter):
    """Weight-decomposed low-rank update.

    r        rank
    alpha    numerator of the scale alpha / r; r when not given
    elastic  ranks to train for, the largest r (`adapt/elastic.py`)
    """

    r: int = always_print(8)
    alpha: float | None = None
    elastic: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 4e-4
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    summary: ClassVar[str] = "LoRA on the direction, a trained magnitude per row"
    source: ClassVar[str] = "Liu et al. 2024"

    def __post_init__(self) -> None:
        check_rank(self.name, self.r, self.alpha)
        object.__setattr__(self, "elastic", elastic_ranks(self.name, self.r, self.elastic))

    @property
    def scale(self) -> float:
        """c in the formula."""
        return (self.r if self.alpha is None else self.alpha) / self.r

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.elastic

    def plain(self, rank: int) -> DoRA:
        alpha = self.alpha if rank == self.r else self.scale * rank
        return replace(self, r=rank, alpha=alpha, elastic=())

    def check(self, site: Site) -> None:
        check_width(self.name, self.r, site)

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {
            "A": (self.r, site.in_features),
            "B": (site.out_features, self.r),
            "magnitude": (site.out_features,),
        }

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "A": kaiming_uniform((self.r, site.in_features), generator),
            "B": torch.zeros(site.out_features, self.r),
            "magnitude": torch.linalg.vector_norm(weight_oi, dim=1),
        }

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        moved = weight_oi + self.scale * (p["B"] @ p["A"])
        norm = torch.linalg.vector_norm(moved.detach(), dim=1)
        return (p["magnitude"] / nonzero(norm))[:, None] * moved, bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [LowRank(p["A"], self.scale * p["B"]), RowNorm(p["magnitude"])]
