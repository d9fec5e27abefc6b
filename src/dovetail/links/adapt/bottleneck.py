"""Bottleneck adapter: a small two-layer network on the layer's output, with a skip connection.

    y' = y + U gelu(D y + d) + u        D (r, o), U (o, r); U and u start at zero

Source: Houlsby et al. 2019, §2.1. It is non-linear, so no W' has the same effect (a limit that CLAM §A.7 states): it
must be last in a chain. It can be trained, saved and loaded, but not merged or followed by remask, regrid or a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.chains.link import OutputAdapter, Site, always_print
from dovetail.chains.registry import register
from dovetail.links.adapt.rank import check_rank, kaiming_uniform


@register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(OutputAdapter):
    """Houlsby adapter.

    r  width of the hidden layer
    """

    r: int = always_print(16)

    learning_rate: ClassVar[float] = 1e-3
    summary: ClassVar[str] = "two-layer network on the output; trains and is saved, never merges"
    source: ClassVar[str] = "Houlsby et al. 2019"

    def __post_init__(self) -> None:
        check_rank(self.name, self.r)

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        o = site.out_features
        return {"down": (self.r, o), "down_bias": (self.r,), "up": (o, self.r), "up_bias": (o,)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        zeros = {name: torch.zeros(shape) for name, shape in self.parameter_shapes(site).items()}
        return zeros | {"down": kaiming_uniform((self.r, site.out_features), generator)}

    def output(self, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        p = {name: tensor.to(y.dtype) for name, tensor in p.items()}
        hidden = functional.gelu(functional.linear(y, p["down"], p["down_bias"]))
        return y + functional.linear(hidden, p["up"], p["up_bias"])
