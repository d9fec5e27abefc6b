"""`scales`: only the scales of the base's grid are trained; the codes stay.

    W' = (q - z) s ⊙ f        f (o, groups), one number per block of the grid, starts at 1; s ⊙ f is stored as s is

Source: Kim et al. 2023 (PEQA), eq. 2; trained is the factor f, not s itself, so that the learning rate does not depend
on the size of the weights. The layer uses s ⊙ f as the grid stores it, with a straight-through gradient, so merging
replaces the scales and changes no bit: no `regrid` is needed, zeros stay zero, and the model keeps its size. Beside
`ia3`: as many numbers as the grid has scales, and a result that is still quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.link import Adapter, Site
from dovetail.chains.registry import register
from dovetail.chains.terms import Term
from dovetail.links.adapt.groups import groups_of


@register("scales")
@dataclass(frozen=True)
class Scales(Adapter):
    """Trained scales of the grid."""

    keeps_zeros: ClassVar[bool] = True
    keeps_grid: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    summary: ClassVar[str] = "trains the grid's scales; the codes stay, so it merges without regrid"
    source: ClassVar[str] = "Kim et al. 2023 (PEQA)"

    @property
    def moves(self) -> Literal["scales", "zeros"]:
        return "scales"

    def check(self, site: Site) -> None:
        """Raise ChainError where a block of the grid does not lie in one row."""
        groups_of(self.name, site)

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"factor": (site.out_features, groups_of(self.name, site))}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.parameter_shapes(site).items()}

    def grid_change(self, p: Mapping[str, Tensor]) -> Tensor:
        return p["factor"].clamp(min=0)

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        factor_og = self.grid_change(p)
        grouped = weight_oi.view(*factor_og.shape, -1) * factor_og[:, :, None]
        return grouped.view(weight_oi.shape), bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return []
