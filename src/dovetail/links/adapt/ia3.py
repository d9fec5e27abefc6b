"""IA3: one trained scale per output feature, or per input feature of a feed-forward block's output layer.

    W' = diag(l) W, b' = l ⊙ b        attention and everything else; l (o,)
    W' = W diag(l)                    the feed-forward block's output layer ("down"); l (i,)

Source: Liu et al. 2022, §3.3; CLAM Table 1. The fewest parameters of all; a zero weight stays zero, so it needs no
remask. It rescales what the model can do already and learns little that is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.link import Adapter, Site
from dovetail.chains.registry import register
from dovetail.chains.terms import InScale, OutScale, Term


@register("ia3")
@dataclass(frozen=True)
class IA3(Adapter):
    """Trained scales.

    side    "auto": inputs on the feed-forward output layer, outputs elsewhere; or "out" or "in" everywhere
    inputs  globs over layers' whole paths: inputs on these, whatever `side` says
    """

    side: Literal["auto", "out", "in"] = "auto"
    inputs: tuple[str, ...] = ()

    keeps_zeros: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    summary: ClassVar[str] = "one trained scale per output (feed-forward output layer: per input)"
    source: ClassVar[str] = "Liu et al. 2022"

    def _name(self, site: Site) -> str:
        if any(fnmatchcase(site.name, path) for path in self.inputs):
            return "in_scale"
        side = self.side if self.side != "auto" else ("in" if site.feedforward else "out")
        return f"{side}_scale"

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        name = self._name(site)
        return {name: (site.in_features if name == "in_scale" else site.out_features,)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.ones(shape) for name, shape in self.parameter_shapes(site).items()}

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if "in_scale" in p:
            return weight_oi * p["in_scale"], bias_o
        scale = p["out_scale"]
        return scale[:, None] * weight_oi, None if bias_o is None else scale * bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [InScale(p["in_scale"]) if "in_scale" in p else OutScale(p["out_scale"], scales_bias=True)]
