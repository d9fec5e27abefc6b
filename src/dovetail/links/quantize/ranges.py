"""Scales and zero points of groups of weights: those that span a group's range, or those of the least squared error.

    asymmetric   scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)     zero = round(-min(w, 0) / scale)
    symmetric    scale = max|w| / ((2^bits - 1) / 2)
    signed       scale = w_m / -2^(bits-1),  m = argmax|w|

A signed scale makes the weight of the largest absolute value a code of its own: the codes have one step more on the
negative side, and the sign of the scale turns that side to where it is needed (ggml's Q4_0).

Rounded to few significant bits, a scale times a code is exact in narrow dtypes: of 4 bits times a code of 4 bits in
bfloat16, of 7 bits in float16. Scales are stored in float16 in any case.

The search tries multiples of the scale of the range, and refits the best by least squares for its codes,
s = Σ w (q - z) / Σ (q - z)², as ggml's `make_qx_quants`. The scale of the range is one of those tried, so the squared
error never increases.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dovetail.chains.grid import CPU_CHUNK, DEVICE_CHUNK
from dovetail.errors import DovetailError

Symmetry = bool | Literal["signed"]
Scales = Literal["range", "search"]
SCALE_BITS = (4, 7)
FACTORS = tuple(0.60 + 0.025 * step for step in range(23))
"""The multiples of the scale of the range that the search tries, from 0.60 to 1.15."""
REFITS = 3


def affine_range(
    weight_oi: Tensor,
    groups: int,
    *,
    bits: int,
    symmetric: Symmetry,
    where: str,
    scale_bits: int | None = None,
    search: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the scales and zero points of each group; its range includes zero.

    weight_oi   (o, i) float32
    where       the quantizer's name, for errors
    scale_bits  significant bits of a scale; None: those of float16
    returns     scale (o, groups) float16; zero point (o, groups) float32 integers in [0, 2^bits - 1], None if symmetric
    errors      DovetailError for a scale beyond float16, or one so small that float16 has fewer than scale_bits bits
                there; without scale_bits, such a scale is rounded as float16 numbers are
    """
    grouped = weight_oi.view(weight_oi.shape[0], groups, -1)
    steps = 2**bits - 1
    low = grouped.amin(dim=2).clamp(max=0)
    high = grouped.amax(dim=2).clamp(min=0)
    if symmetric == "signed":
        exact = torch.where(high >= -low, high, low) / -(2 ** (bits - 1))
    else:
        exact = torch.maximum(high, -low) / (steps / 2) if symmetric else (high - low) / steps
    scale = _stored(exact, scale_bits)
    _refuse_unfit(where, exact, scale, scale_bits)
    zero = None
    if not symmetric:
        divisor = scale.masked_fill(scale == 0, torch.inf)
        zero = (-low / divisor).round().clamp(0, steps)
    if search:
        rows = max(1, (CPU_CHUNK if weight_oi.device.type == "cpu" else DEVICE_CHUNK) // weight_oi.shape[1])
        parts = []
        for start in range(0, len(exact), rows):
            at = slice(start, start + rows)
            search_of = _Search(grouped[at], exact[at], scale[at], None if zero is None else zero[at], bits, scale_bits)
            parts.append(search_of.run(None if zero is None else (low[at] + high[at]) / 2))
        scale = torch.cat([found for found, _ in parts])
        zero = None if zero is None else torch.cat([found for _, found in parts if found is not None])
    return scale.to(torch.float16), zero


def _stored(scale: Tensor, scale_bits: int | None) -> Tensor:
    """Return scales as they are stored, in float32; a negative zero becomes zero."""
    if scale_bits is not None:
        scale = _significant(scale, scale_bits)
    return scale.to(torch.float16).float() + 0.0


def _significant(scale: Tensor, scale_bits: int) -> Tensor:
    """Round to so many significant bits, to the even number between two."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**scale_bits).round() / 2**scale_bits, exponent)


def _refuse_unfit(where: str, exact: Tensor, scale: Tensor, scale_bits: int | None) -> None:
    if bool(torch.isinf(scale).any()):
        raise DovetailError(
            where,
            found=f"a group that needs the scale {float(exact[scale.isinf()].abs().max()):.6g}",
            rule=f"a scale must fit float16, at most {torch.finfo(torch.float16).max:.0f}",
            fix="check the checkpoint: weights of a working model are far smaller; or use nf4 or fp8",
        )
    if scale_bits is None:
        return
    lost = (scale != 0) & (scale != _significant(exact, scale_bits))
    if bool(lost.any()):
        raise DovetailError(
            where,
            found=f"a group that needs the scale {float(exact[lost].abs().min()):.6g}",
            rule=f"float16, in which scales are stored, has fewer than {scale_bits} significant bits there",
            fix="leave out scale_bits, or use nf4 or fp8",
        )


def _fitting(scale: Tensor, scale_bits: int | None) -> Tensor:
    """Return scales as stored; NaN where float16 cannot store them, which no comparison takes for better."""
    stored = _stored(scale, scale_bits)
    fits = stored.isfinite()
    if scale_bits is not None:
        fits &= stored == _significant(scale, scale_bits)
    return stored.masked_fill(~fits, torch.nan)


class _Search:
    """The scales and zero points of the least squared error so far, of some rows of groups.

    grouped  (n, groups, g) float32
    exact    (n, groups) the scale of each group's range before it is rounded; `scale` as stored, with its `zero`
    """

    def __init__(
        self, grouped: Tensor, exact: Tensor, scale: Tensor, zero: Tensor | None, bits: int, scale_bits: int | None
    ) -> None:
        self.grouped, self.exact, self.bits, self.scale_bits = grouped, exact, bits, scale_bits
        self.scale, self.zero = scale, zero
        self.least = self.error(scale, zero)

    def run(self, middle: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the best scales and zero points; `middle` of each group's range, None without zero points."""
        last = 2**self.bits - 1
        for factor in FACTORS:
            scale, zero = _fitting(self.exact * factor, self.scale_bits), None
            if middle is not None:
                zero = (last / 2 - middle / scale.masked_fill(scale == 0, torch.inf)).round().clamp(0, last)
            self.offer(scale, zero)
        for _ in range(REFITS):
            steps = self.steps(self.scale, self.zero)
            refit = (self.grouped * steps).sum(dim=2) / steps.square().sum(dim=2)
            self.offer(_fitting(refit, self.scale_bits), self.zero)
            if self.zero is not None:
                for beside in (-1, 1):
                    self.offer(self.scale, (self.zero + beside).clamp(0, last))
        return self.scale, self.zero

    def steps(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Return code minus zero point of each weight, (n, groups, g)."""
        steps = (self.grouped / scale.masked_fill(scale == 0, torch.inf)[..., None]).round_()
        if zero is None:
            return steps.clamp_(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return steps.add_(zero[..., None]).clamp_(0, 2**self.bits - 1).sub_(zero[..., None])

    def error(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        return self.steps(scale, zero).mul_(scale[..., None]).sub_(self.grouped).square_().sum(dim=2)

    def offer(self, scale: Tensor, zero: Tensor | None) -> None:
        """Keep a scale and a zero point where their error is smaller; that of a NaN never is."""
        error = self.error(scale, zero)
        better = error < self.least
        self.least = torch.where(better, error, self.least)
        self.scale = torch.where(better, scale, self.scale)
        if self.zero is not None and zero is not None:
            self.zero = torch.where(better, zero, self.zero)
