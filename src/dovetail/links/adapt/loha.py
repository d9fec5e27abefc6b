"""LoHa: the Hadamard product of two low-rank matrices as the change of the weight.

    W' = W + c (B1 A1) ⊙ (B2 A2)        A (r, i), B (o, r), c = alpha / r

Source: Hyeon-Woo et al. 2021 (FedPara), eq. 2. Reaches rank r² with 2r(o + i) parameters. B2 starts at zero. Where r²
is small, LoHa runs as a Khatri-Rao low rank at about LoRA's cost; otherwise the product is recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.chains.link import Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import Hadamard, Term
from dovetail.links.adapt.peft import Number, warn_of_dropout
from dovetail.links.adapt.rank import RankAdapter, RankConfig


class LohaConfig(RankConfig):
    """peft's fields of LoHa."""

    rank_dropout: Number = 0.0
    module_dropout: Number = 0.0


@register("loha")
@dataclass(frozen=True)
class LoHa(RankAdapter):
    """Low-rank Hadamard product.

    r        rank of each factor
    alpha    numerator of the scale alpha / r; r when not given
    elastic  ranks to train for, of which the largest is r (`chains/layer/elastic.py`)
    """

    r: int = always_print(8)
    alpha: float | None = None
    elastic: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 4e-3
    rank_axes: ClassVar[Mapping[str, int]] = {"A1": 0, "B1": 1, "A2": 0, "B2": 1}
    summary: ClassVar[str] = "Hadamard product of two low ranks: rank r² for 2r(o+i) parameters"
    source: ClassVar[str] = "Hyeon-Woo et al. 2021"
    peft_type: ClassVar[str] = "LOHA"
    peft_tensors: ClassVar[Mapping[str, str]] = {
        "B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"
    }  # fmt: skip
    peft_config: ClassVar[type[LohaConfig]] = LohaConfig
    peft_conv1d: ClassVar[bool] = False
    peft_up: ClassVar[str] = "B1"

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

    @classmethod
    def peft_arguments(cls, config: LohaConfig, where: str) -> dict[str, Any]:
        warn_of_dropout(where, cls.name, rank_dropout=config.rank_dropout, module_dropout=config.module_dropout)
        return {}
