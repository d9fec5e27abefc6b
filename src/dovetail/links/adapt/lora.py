"""LoRA: a trained low-rank change of a frozen weight.

    W' = W + c B A        A (r, i), B (o, r), c = alpha / r, or alpha / sqrt(r) with scaling="rs"

Source: Hu et al. 2021, §4.1; rank-stabilised scaling: Kalajdzievski 2023. B starts at zero, A as a Kaiming-uniform
linear layer. The workhorse: more capacity than IA3 and VeRA, and cheaper a step than LoHa or DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.link import Adapter, Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, Term
from dovetail.links.adapt.rank import check_rank, check_width, elastic_ranks, kaiming_uniform


@register("lora")
@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank update.

    r        rank
    alpha    numerator of the scale; r when not given
    dropout  probability with which an input of A is dropped while training
    scaling  "linear": alpha / r; "rs": alpha / sqrt(r)
    elastic  ranks to train for, the largest r (`adapt/elastic.py`)
    """

    r: int = always_print(8)
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["linear", "rs"] = "linear"
    elastic: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 4e-4
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    summary: ClassVar[str] = "low-rank update W + c·BA"
    source: ClassVar[str] = "Hu et al. 2021"

    def __post_init__(self) -> None:
        check_rank(self.name, self.r, self.alpha, self.dropout)
        object.__setattr__(self, "elastic", elastic_ranks(self.name, self.r, self.elastic))

    @property
    def scale(self) -> float:
        """c in the formula."""
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.scaling == "rs" else self.r)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.elastic

    def plain(self, rank: int) -> LoRA:
        alpha = self.scale * (math.sqrt(rank) if self.scaling == "rs" else rank)
        return replace(self, r=rank, alpha=self.alpha if rank == self.r else alpha, elastic=())

    def check(self, site: Site) -> None:
        check_width(self.name, self.r, site)

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"A": (self.r, site.in_features), "B": (site.out_features, self.r)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "A": kaiming_uniform((self.r, site.in_features), generator),
            "B": torch.zeros(site.out_features, self.r),
        }

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return weight_oi + self.scale * (p["B"] @ p["A"]), bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [LowRank(p["A"], self.scale * p["B"], self.dropout)]
