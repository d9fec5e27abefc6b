"""LoRA-FA: LoRA whose A is frozen, here one random A shared by all layers.

    W' = W + c B A        A (r, i) frozen, remade from a seed; B (o, r) trained; c = alpha / r

Source: Zhang et al. 2023 (LoRA-FA), §3, with A shared as VeRA does. Half of LoRA's parameters, and no gradient for A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.errors import ChainError
from dovetail.links import Adapter, LowRank, Site, Term, always_print, register


@register("lora_fa")
@dataclass(frozen=True)
class LoRAFA(Adapter):
    """Low-rank update with a frozen A.

    r      rank
    alpha  numerator of the scale alpha / r
    """

    r: int = always_print(8)
    alpha: float = 8.0

    learning_rate: ClassVar[float] = 4e-4
    summary: ClassVar[str] = "low-rank update with a frozen, shared A"
    source: ClassVar[str] = "Zhang et al. 2023"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ChainError(self.name, found=f"r={self.r}", rule="a rank is at least 1", fix="set r=8")

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"B": (site.out_features, self.r)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"B": torch.zeros(site.out_features, self.r)}

    def constants(self, widest: tuple[int, int], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"A": (torch.randn(self.r, widest[1], generator=generator) / widest[1] ** 0.5).to(dtype)}

    def local(self, shared: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        return {"A": shared["A"][:, : site.in_features]}

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return weight_oi + self.alpha / self.r * (p["B"] @ p["A"]), bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [LowRank(p["A"], self.alpha / self.r * p["B"])]
