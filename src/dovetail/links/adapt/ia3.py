"""IA3: one trained scale per output feature, or per input feature of a feed-forward block's output layer.

    W' = diag(l) W, b' = l ⊙ b        attention and all other layers; l (o,)
    W' = W diag(l)                    the feed-forward block's output layer ("down"); l (i,)

Source: Liu et al. 2022, §3.3; CLAM Table 1. IA3 has the fewest parameters. A zero weight stays zero, so the chain
needs no remask. It rescales existing features and learns little that is new.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.link import Site
from dovetail.chains.registry import register
from dovetail.chains.terms import InScale, OutScale, Term
from dovetail.links.adapt.peft import PeftAdapter, PeftConfig, PeftLink, name_layers


@register("ia3")
@dataclass(frozen=True)
class IA3(PeftAdapter):
    """Trained scales.

    side    what to scale. "auto": inputs of the feed-forward output layer, outputs elsewhere; "out" or "in": those of
            all layers
    inputs  globs over the full paths of layers whose inputs are scaled, whatever `side` is
    """

    side: Literal["auto", "out", "in"] = "auto"
    inputs: tuple[str, ...] = ()

    keeps_zeros: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-2
    summary: ClassVar[str] = "one trained scale per output (feed-forward output layer: per input)"
    source: ClassVar[str] = "Liu et al. 2022"
    peft_type: ClassVar[str] = "IA3"
    peft_tensors: ClassVar[Mapping[str, str]] = {"out_scale": "ia3_l", "in_scale": "ia3_l"}
    peft_config: ClassVar[type[PeftConfig]] = PeftConfig

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

    @classmethod
    def peft_names(cls, site: Site, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        (shape,) = shapes.values()
        inputs = shape == (1, site.in_features) and shape != (site.out_features, 1)
        return {"in_scale" if inputs else "out_scale": "ia3_l"}

    @classmethod
    def peft_shape(cls, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], 1) if name == "out_scale" else (1, shape[0])

    @classmethod
    def to_peft(cls, links: Mapping[Site, IA3], *, seed: int, where: str) -> dict[str, Any]:
        inputs = [site.name for site, link in links.items() if link._name(site) == "in_scale"]
        return {"feedforward_modules": name_layers(inputs, [site.name for site in links if site.name not in inputs])}

    @classmethod
    def from_peft(cls, config: PeftConfig, layers: Mapping[Site, Collection[str]], *, where: str) -> PeftLink:
        # The shortest of the links that scale the inputs of exactly these layers.
        inputs = [site.name for site, names in layers.items() if "in_scale" in names]
        starred = tuple(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in inputs))  # of all blocks
        for link in (cls(), cls(side="in"), cls(side="out", inputs=starred)):
            if all((link._name(site) == "in_scale") == (site.name in inputs) for site in layers):
                return PeftLink(link)
        return PeftLink(cls(side="out", inputs=tuple(inputs)))
