"""LoHa: the Hadamard product of two low-rank matrices as the change of the weight.

    W' = W + c (B1 A1) ⊙ (B2 A2)        A (r, i), B (o, r), c = alpha / r

Source: Hyeon-Woo et al. 2021 (FedPara), eq. 2. Reaches rank r² with 2r(o + i) parameters. B2 starts at zero. Where r²
is small it runs as a Khatri-Rao low rank at about LoRA's price; otherwise the product is recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chains.link import Adapter, Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import Hadamard, Term
from dovetail.links.adapt.rank import check_rank, check_width, elastic_ranks


@register("loha")
@dataclass(frozen=True)
class LoHa(Adapter):
    """Low-rank Hadamard product.

    r        rank of each factor
    alpha    numerator of the scale alpha / r; r when not given
    elastic  ranks to train for, the largest r (`adapt/elastic.py`)
    """

    r: int = always_print(8)
    alpha: float | None = None
    elastic: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 4e-3
    rank_axes: ClassVar[Mapping[str, int]] = {"A1": 0, "B1": 1, "A2": 0, "B2": 1}
    summary: ClassVar[str] = "Hadamard product of two low ranks: rank r² for 2r(o+i) parameters"
    source: ClassVar[str] = "Hyeon-Woo et al. 2021"

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

    def plain(self, rank: int) -> LoHa:
        alpha = self.alpha if rank == self.r else self.scale * rank
        return replace(self, r=rank, alpha=alpha, elastic=())

    def check(self, site: Site) -> None:
        check_width(self.name, self.r, site)

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        a, b = (self.r, site.in_features), (site.out_features, self.r)
        return {"A1": a, "B1": b, "A2": a, "B2": b}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        a, b = (self.r, site.in_features), (site.out_features, self.r)
        return {
            "A1": torch.empty(a).normal_(0, 1, generator=generator),
            "B1": torch.empty(b).normal_(0, 0.1, generator=generator),
            "A2": torch.empty(a).normal_(0, 1, generator=generator),
            "B2": torch.zeros(b),
        }

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return weight_oi + self.scale * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"]), bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [Hadamard(self.scale * p["B1"], p["A1"], p["B2"], p["A2"])]
