"""LoRA: a trained low-rank change of a frozen weight.

    W' = W + c B A        A (r, i), B (o, r), c = alpha / r, or alpha / sqrt(r) with scaling="rs"
    with pool=group:  W'_(o, i) = W_(o, i) + c (B A)_(o, g),  A (r, groups),  g the group of input i on the base's grid

Source: Hu et al. 2021, §4.1; rank-stabilized scaling: Kalajdzievski 2023. B starts at zero, A as a Kaiming-uniform
linear layer; with `init`, A and B start from the weight, together with its base (`links/adapt/starts`). LoRA has more
capacity than IA3 and VeRA, and a step costs less than with LoHa or DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from dovetail.chains.link import Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, Term
from dovetail.errors import ChainError, LoadError
from dovetail.links.adapt.groups import groups_of
from dovetail.links.adapt.low_rank import LowRankAdapter
from dovetail.links.adapt.peft import Number
from dovetail.links.adapt.rank import RankConfig, kaiming_uniform

BASE_UNCHANGED = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of init_lora_weights with which peft does not change the base when it loads the adapter."""


class LoraConfig(RankConfig):
    """peft's fields of LoRA, rsLoRA and DoRA."""

    alpha: Number = pydantic.Field(default=8, validation_alias="lora_alpha")
    lora_dropout: Number = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True

    def divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.use_rslora else rank

    def check(self, where: str) -> None:
        super().check(where)
        if self.init_lora_weights not in BASE_UNCHANGED:
            raise LoadError(
                where,
                found=f"init_lora_weights={self.init_lora_weights!r}"[:200],
                rule="peft changes the base's weights again whenever it loads this adapter, so it does not belong to "
                "the unchanged base",
                fix="convert it with save_pretrained(…, path_initial_model_for_weight_conversion=…); an adapter from "
                "LoftQ belongs to the base that LoftQ saved, where init_lora_weights is true",
            )


@register("lora")
@dataclass(frozen=True)
class LoRA(LowRankAdapter):
    """Low-rank update.

    r           rank
    alpha       numerator of the scale; r when not given
    dropout     probability that an input of A is dropped during training
    scaling     "linear": alpha / r; "rs": alpha / sqrt(r)
    elastic     ranks to train for, of which the largest is r (`chains/layer/elastic.py`)
    init_       `init` of the notation. "identity": the model starts as its base; "loftq", "pissa", "lqlora": A and B
                make up for what the base lacks of the weight
    iterations  of "loftq" (5 when not given) and "lqlora" (at most 100)
    pool        "group": A acts on the sum of the inputs of each group of the grid (QA-LoRA, Xu et al. 2023, eq. 3), so
                the change is one of the zero points, which merges without `regrid`; None: on every input
    """

    r: int = always_print(8)
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["linear", "rs"] = "linear"
    elastic: tuple[int, ...] = ()
    init_: Literal["identity", "loftq", "pissa", "lqlora"] = "identity"
    iterations: int | None = None
    pool: Literal["group"] | None = None

    learning_rate: ClassVar[float] = 4e-4
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1}
    summary: ClassVar[str] = "low-rank update W + c·BA"
    source: ClassVar[str] = "Hu et al. 2021"
    peft_type: ClassVar[str] = "LORA"
    peft_tensors: ClassVar[Mapping[str, str]] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    peft_config: ClassVar[type[LoraConfig]] = LoraConfig
    peft_alpha: ClassVar[str] = "lora_alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool is not None and (self.dropout or self.init_ != "identity"):
            found = f"dropout={self.dropout}" if self.dropout else f"init={self.init_}"
            rule = "with pool=group the adapter is a change of the grid's zero points, which knows neither"
            raise self._bad(found, rule, "leave it out, or remove pool")

    @property
    def moves(self) -> Literal["scales", "zeros"] | None:
        return None if self.pool is None else "zeros"

    def check(self, site: Site) -> None:
        super().check(site)
        if self.pool is not None and self.r > (groups := groups_of(self.name, site)):
            rule = "with pool=group the rank must be at most the number of groups of a row"
            found, fix = f"r={self.r}, {groups} groups", f"set r={groups}, or a smaller group of the quantizer"
            raise ChainError(f"{self.name} at {site.name}", found=found, rule=rule, fix=fix)

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        inputs = site.in_features if self.pool is None else groups_of(self.name, site)
        return {"A": (self.r, inputs), "B": (site.out_features, self.r)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.parameter_shapes(site)
        return {"A": kaiming_uniform(shapes["A"], generator), "B": torch.zeros(shapes["B"])}

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if self.pool is not None:
            change_og = self.grid_change(p)
            return (weight_oi.view(*change_og.shape, -1) + change_og[:, :, None]).view(weight_oi.shape), bias_o
        return weight_oi + self.scale * (p["B"] @ p["A"]), bias_o

    def grid_change(self, p: Mapping[str, Tensor]) -> Tensor:
        return self.scale * (p["B"] @ p["A"])

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [] if self.pool is not None else [LowRank(p["A"], self.scale * p["B"], self.dropout)]

    def peft_fields(self) -> dict[str, Any]:
        return {"lora_dropout": self.dropout, "use_rslora": self.scaling == "rs"}

    @classmethod
    def peft_arguments(cls, config: LoraConfig, where: str) -> dict[str, Any]:
        return {"dropout": config.lora_dropout, "scaling": "rs" if config.use_rslora else "linear"}
