"""DoRA: a low-rank change of the weight's direction, and a trained magnitude per output row.

    W' = diag(m / ‖W + c B A‖_row) (W + c B A)        m (o,), starts at ‖W‖_row; the norm takes no gradient

Source: Liu et al. 2024, eq. 5 and §4.3 (norm detached). Usually a little better than LoRA at equal rank. The planner
computes the norm in closed form from the factors, so a step costs little more than LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.chains.link import Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, RowNorm, Term, nonzero
from dovetail.links.adapt.lora import LoRA, LoraConfig
from dovetail.links.adapt.peft import warn_of_dropout
from dovetail.links.adapt.rank import RankAdapter, kaiming_uniform


class DoraConfig(LoraConfig):
    """peft's fields of LoRA where `use_dora` is true."""

    use_dora: bool


@register("dora")
@dataclass(frozen=True)
class DoRA(RankAdapter):
    """Weight-decomposed low-rank update.

    r        rank
    alpha    numerator of the scale alpha / r; r when not given
    elastic  ranks to train for, of which the largest is r (`chains/layer/elastic.py`)
    """

    r: int = always_print(8)
    alpha: float | None = None
    elastic: tuple[int, ...] = ()

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

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        moved = weight_oi + self.scale * (p["B"] @ p["A"])
        norm = torch.linalg.vector_norm(moved.detach(), dim=1)
        return (p["magnitude"] / nonzero(norm))[:, None] * moved, bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [LowRank(p["A"], self.scale * p["B"]), RowNorm(p["magnitude"])]

    def peft_fields(self) -> dict[str, Any]:
        return {"use_dora": True}

    @classmethod
    def peft_arguments(cls, config: LoraConfig, where: str) -> dict[str, Any]:
        warn_of_dropout(where, cls.name, lora_dropout=config.lora_dropout)
        return {}
