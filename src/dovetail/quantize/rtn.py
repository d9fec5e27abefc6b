"""`int`: integers by rounding to the nearest, one scale a group of inputs.

Idea: cut each row into groups; spread 2^bits equidistant values over the range of a group; round each weight to the
nearest. No data, no solver, one pass.

    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)     zero = round(-min(w, 0) / scale)
    symmetric    scale = max|w| / ((2^bits - 1) / 2)                zero = 2^(bits-1)
    code = clamp(round(w / scale) + zero, 0, 2^bits - 1)            value = (code - zero) * scale

The scale is rounded to float16 before the codes are made, so that the codes are nearest for what is stored; a group
whose scale is below float16's smallest number becomes zero. The range always holds 0, and 0 has a code: a pruned
weight stays zero.

Source: the usual round-to-nearest baseline of GPTQ (Frantar et al. 2022, §3) and SQFT (Munoz et al. 2024, §2.2, eq. 1).
Against its neighbours: `nf4(double=True)` is as near at 4.13 bits as `int(bits=4)` at 4.31, but has no other width and
no integer arithmetic; `fp8` needs no groups; GPTQ and HQQ find better codes or scales for the same grid, at the price
of a solver. Cost: bits + 16/group bits a weight, and bits/group more for the zero points if asymmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chain.link import Quantizer, Site, register, shown
from dovetail.errors import ChainError, DovetailError
from dovetail.quantize.affine import AffineWeight
from dovetail.quantize.packing import packed_nbytes
from dovetail.quantize.storage import identity_of, refuse_bad_weight


@register("int")
@dataclass(frozen=True)
class Int(Quantizer):
    """Integers of 2, 3, 4 or 8 bits; `group` inputs share a float16 scale (0: one group a row)."""

    summary: ClassVar[str] = "integers of 2, 3, 4 or 8 bits, rounded to nearest, one scale per group"
    source: ClassVar[str] = "round-to-nearest, SQFT §2.2"

    bits: int = shown(4)
    group: int = shown(64)
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise self._bad(f"bits={self.bits}", "bits is 2, 3, 4 or 8", "bits=4")
        if self.group < 0:
            raise self._bad(f"group={self.group}", "group is at least 0", "group=64, or group=0 for one group per row")

    def check(self, site: Site) -> None:
        """Raises ChainError where group doesn't divide the layer's inputs."""
        self._groups(site.in_features, f"{self.name} at {site.name}")

    def quantize(self, weight_oi: Tensor) -> AffineWeight:
        """The grid and packed codes of weight_oi (o, i), any float. Raises DovetailError on NaN, inf, overflow."""
        groups = self._groups(weight_oi.shape[-1], self.name)
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        scale_og, zero_og = affine_range(weight_32, groups, bits=self.bits, symmetric=self.symmetric, where=self.name)
        return AffineWeight.from_scales(weight_32, scale_og, zero_og, bits=self.bits, identity=identity_of(self))

    def empty(self, shape: tuple[int, int]) -> AffineWeight:
        """Zero buffers as `quantize` would fill them for a weight of this shape (o, i)."""
        groups = self._groups(shape[1], self.name)
        return AffineWeight.empty(
            shape, groups=groups, bits=self.bits, symmetric=self.symmetric, identity=identity_of(self)
        )

    def stored_nbytes(self, site: Site) -> int:
        """Codes, a float16 scale a group and, if asymmetric, a zero point of `bits` bits a group."""
        groups = site.out_features * self._groups(site.in_features, f"{self.name} at {site.name}")
        zeros = 0 if self.symmetric else packed_nbytes(groups, self.bits)
        return packed_nbytes(site.out_features * site.in_features, self.bits) + 2 * groups + zeros

    def _groups(self, in_features: int, where: str) -> int:
        if self.group == 0:
            return 1
        if in_features % self.group:
            divisors = (g for g in range(1, in_features + 1) if in_features % g == 0)
            nearest = min(divisors, key=lambda g: abs(g - self.group))
            raise ChainError(
                where,
                found=f"in_features={in_features}, group={self.group}",
                rule="group must divide in_features",
                fix=f"group={nearest}, or group=0 for one group per row",
            )
        return in_features // self.group


def affine_range(
    weight_oi: Tensor, groups: int, *, bits: int, symmetric: bool, where: str
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that span each group's range, zero included.

    weight_oi  (o, i) float32
    returns    scale (o, groups) float16; zero point (o, groups) float32 integers in [0, 2^bits - 1], None if symmetric
    """
    grouped = weight_oi.view(weight_oi.shape[0], groups, -1)
    steps = 2**bits - 1
    low = grouped.amin(dim=2).clamp(max=0)
    high = grouped.amax(dim=2).clamp(min=0)
    exact = torch.maximum(high, -low) / (steps / 2) if symmetric else (high - low) / steps
    scale = exact.to(torch.float16)
    if bool(torch.isinf(scale).any()):
        raise DovetailError(
            where,
            found=f"a group that needs the scale {float(exact.max()):.6g}",
            rule=f"a scale is stored as float16, at most {torch.finfo(torch.float16).max:.0f}",
            fix="check the checkpoint: weights of a working model are far smaller; or use nf4 or fp8",
        )
    if symmetric:
        return scale, None
    divisor = scale.float().masked_fill(scale == 0, torch.inf)
    return scale, (-low / divisor).round().clamp(0, steps)
