"""Bottleneck adapter: a small two-layer network on the layer's output, with a skip connection.

    y' = y + U gelu(D y + d) + u        D (r, o), U (o, r); U and u start at zero

Source: Houlsby et al. 2019, §2.1. Non-linear, so no W' does the same (CLAM §A.7's stated limit): it stands last in a
chain. It can be trained, saved and loaded, but not merged, followed by remask or regrid, or by another stage.
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
        o = site.out_features
        return {
            "down": kaiming_uniform((self.r, o), generator),
            "down_bias": torch.zeros(self.r),
            "up": torch.zeros(o, self.r),
            "up_bias": torch.zeros(o),
        }

    def output(self, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        down, down_bias = p["down"].to(y.dtype), p["down_bias"].to(y.dtype)
        up, up_bias = p["up"].to(y.dtype), p["up_bias"].to(y.dtype)
        return y + functional.linear(functional.gelu(functional.linear(y, down, down_bias)), up, up_bias)
