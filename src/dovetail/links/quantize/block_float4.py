"""`mxfp4` and `nvfp4`: 4-bit floats (e2m1) with small blocks and narrow scales, which accelerators multiply natively.

Idea: the values of e2m1 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Few weights share a scale of only 8
bits:

    mxfp4   32 weights   scale = 2^e, e8m0; e is that of max|w|, at 1.75 and above the next, minus 2
    nvfp4   16 weights   scale = e4m3(max|w| / 6 * g) / g,  g = 448 * 6 / max|W| a float32 number for the matrix
    code = nearest e2m1 number to w / scale, to the even code between two, at most 6        value = code * scale

Zero is a code, and a pruned weight stays zero; small negative weights have the code of negative zero.

Source: OCP Microscaling Formats (MX) v1.0, §5.2, §6.3; NVIDIA's NVFP4. Codes and scales equal those of
compressed-tensors for a float32 weight. MX proposes the exponent of max|w| itself; compressed-tensors rounds it up from
1.75, where most of the range would be clipped. A block of nvfp4 whose scale underflows e4m3 has 0.125.
Trade-off: mxfp4 is smaller than nf4 and has a larger error (11.2% and 9.2% of a normal weight's norm), since its scale
is a power of two; nvfp4 (9.5%) has the size of nf4. Both have arithmetic in hardware.
Size: 4 + 8/32 = 4.25 and 4 + 8/16 = 4.5 bits per weight.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chains.grid import refuse_bad_weight
from dovetail.chains.link import Quantizer, Site, identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics
from dovetail.errors import ChainError
from dovetail.links.quantize.codebook import Book, CodeBookWeight
from dovetail.links.quantize.scales import ScaleForm

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = Book("e2m1", _POSITIVE + tuple(0.0 - level for level in _POSITIVE), ieee=True)
LARGEST = 6.0
LARGEST_E4M3 = 448.0
UNDERFLOW = 0.125
"""The e4m3 scale of a block whose own is zero, as in compressed-tensors."""


@dataclass(frozen=True)
class _BlockFloat4(Quantizer):
    """The part that mxfp4 and nvfp4 share: everything except the scales."""

    block: ClassVar[int]
    form: ClassVar[ScaleForm]

    def check(self, site: Site) -> None:
        """Raise ChainError where blocks do not divide the layer's inputs."""
        self._check_inputs(site.in_features, f"{self.name} at {site.name}")

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> CodeBookWeight:
        """Return the scales and packed codes of weight_oi (o, i), any float. DovetailError on NaN or inf."""
        self._check_inputs(weight_oi.shape[-1], self.name)
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        scale = self._scales(weight_32.view(-1, self.block).abs().amax(dim=1))
        return CodeBookWeight.from_scales(weight_32, scale, block=self.block, book=E2M1, identity=identity_of(self))

    def empty(self, shape: tuple[int, int]) -> CodeBookWeight:
        return CodeBookWeight.empty(shape, block=self.block, scale=self.form, book=E2M1, identity=identity_of(self))

    @abstractmethod
    def _scales(self, largest: Tensor) -> dict[str, Tensor]:
        """Return the stored scales of blocks with these largest absolute values, float32 (blocks,)."""

    def _check_inputs(self, in_features: int, where: str) -> None:
        if in_features % self.block:
            raise ChainError(
                where,
                found=f"in_features={in_features}",
                rule=f"a block of {self.block} weights must lie in one row",
                fix="use nf4, whose blocks may span rows, or exclude the layer",
            )


@register("mxfp4")
@dataclass(frozen=True)
class MXFP4(_BlockFloat4):
    """OCP's microscaling 4-bit floats."""

    summary: ClassVar[str] = "4-bit floats (e2m1), 32 weights share a power of two"
    source: ClassVar[str] = "OCP Microscaling Formats v1.0"
    block: ClassVar[int] = 32
    form: ClassVar[ScaleForm] = "e8m0"

    def _scales(self, largest: Tensor) -> dict[str, Tensor]:
        # The exponent's bits of a float32 number, as e8m0 has them, after 0.25 of the fraction's range is added.
        exponent = (largest.view(torch.int32) + 2**21) >> 23
        return {"scale": (exponent - 2).clamp_(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)}


@register("nvfp4")
@dataclass(frozen=True)
class NVFP4(_BlockFloat4):
    """NVIDIA's 4-bit floats."""

    summary: ClassVar[str] = "4-bit floats (e2m1), 16 weights share an e4m3 scale"
    source: ClassVar[str] = "NVIDIA NVFP4"
    block: ClassVar[int] = 16
    form: ClassVar[ScaleForm] = "e4m3"

    def _scales(self, largest: Tensor) -> dict[str, Tensor]:
        divisor = LARGEST_E4M3 * LARGEST / largest.amax().clamp(min=torch.finfo(torch.float32).tiny)
        divisor = divisor.masked_fill(divisor.isinf(), 1.0)
        scale = (divisor * (largest / LARGEST)).clamp_(max=LARGEST_E4M3).to(torch.float8_e4m3fn).float()
        scale = scale.masked_fill(scale == 0, UNDERFLOW).to(torch.float8_e4m3fn)
        return {"scale": scale, "scale_divisor": divisor}
