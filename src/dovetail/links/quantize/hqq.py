"""`hqq`: integers whose zero points minimize a sparse norm of the error; no data is needed.

    minimise over z   ‖W - (q - z) s‖_p^p,  p < 1,  q = clamp(round(W / s + z), 0, 2^bits - 1)
    s = (max - min) / (2^bits - 1), of each group

Idea: a few outliers dominate the squared error of a group and move its zero point for their own sake. A norm with p < 1
lets them have a large error E. Half-quadratic splitting alternates two closed forms while beta grows:

    E = shrink(R, beta) = sign(R) max(|R| - |R|^(p-1) / beta, 0),  R = W - (q - z) s        z = mean(q - (W - E) / s)

Source: Badri and Shaji 2023 (Half-Quadratic Quantization); p = 0.7, beta = 10 growing by 1.01, as in the hqq package.
Eq. 3.10 of "A Study on PEFT Methods Applied to Quantized LLMs" leaves out the norm and E. Differences from the package:
every group keeps its best zero point, by the squared error with the scale and the zero point as they are stored (the
package stops all groups of a matrix at once, by the mean error); a zero point that no longer moves is followed by
others near it; and E, which needs a power of every number, is computed only where an error is large enough that E is
not zero.

Zero points are float16 numbers: zero is not on the grid, and no pruner can be in the chain. With zero="exact" the range
of a group contains zero and its zero point is an integer of `bits` bits: zero stays exactly zero, and the error is that
of `int`.
Trade-off: the error is 8 % below that of `int` at the same bits, for (16 - bits)/group bits per weight more; GPTQ is
nearer to the layer's outputs, but needs data. Size: bits + 32/group bits per weight; with zero="exact" bits + (16 +
bits)/group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.grid import CPU_CHUNK, DEVICE_CHUNK, refuse_bad_weight
from dovetail.chains.link import identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics
from dovetail.errors import DovetailError
from dovetail.links.quantize.affine import AffineWeight, GroupQuantizer, from_float16, to_float16

P = 0.7
BETA = 10.0
GROWTH = 1.01
STEPS = 25
PROBE = 1 / 64
"""Of a step: a zero point that no longer moves is followed by others near the best, farther and farther."""
TOO_FEW = 0.005
"""The share of groups whose error still falls at which the iteration ends."""
FARTHEST = 512.0
"""Of a group's numbers from zero, in steps: a float16 zero point is exact to a quarter of a step up to here."""


@register("hqq")
@dataclass(frozen=True)
class HQQ(GroupQuantizer):
    """Integers of 1, 2, 3, 4 or 8 bits; `group` inputs share a float16 scale and a zero point (0: one group a row).

    axis  1: a group lies along the inputs; grids share scales along rows only, so 0 is refused
    zero  "float": float16 zero points; "exact": integer ones, so that zero stays exactly zero
    """

    widths: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
    summary: ClassVar[str] = "integers, zero points by a robust norm of the error; zero=exact keeps zeros"
    source: ClassVar[str] = "HQQ, Badri and Shaji 2023"

    axis: int = 1
    zero: Literal["float", "exact"] = "float"

    @property
    def movable(self) -> frozenset[Literal["scales", "zeros"]]:
        return frozenset({"scales"} if self.zero == "exact" else {"scales", "zeros"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis != 1:
            raise self._bad(
                f"axis={self.axis}", "groups must lie along the inputs, in rows of the weight", "set axis=1"
            )
        if self.zero not in ("float", "exact"):
            raise self._bad(f'zero="{self.zero}"', 'zero must be "float" or "exact"', "set zero=exact")

    @property
    def has_zero(self) -> bool:
        return self.zero == "exact"

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> AffineWeight:
        """Return the grid and packed codes of weight_oi (o, i), any float. DovetailError on NaN, inf, overflow."""
        groups = self._groups(weight_oi.shape[-1], self.name)
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        flat = weight_32.view(-1, weight_32.shape[1] // groups)
        rows = max(1, (CPU_CHUNK if flat.device.type == "cpu" else DEVICE_CHUNK) // flat.shape[1])
        parts = [_solve(part, self.bits, exact=self.has_zero) for part in flat.split(rows)]
        scale_og, zero_og = (torch.cat(tensors).view(-1, groups) for tensors in zip(*parts, strict=True))
        return AffineWeight.from_scales(
            weight_32, scale_og, zero_og, bits=self.bits, identity=identity_of(self), zero=self._stored_zero
        )

    def empty(self, shape: tuple[int, int]) -> AffineWeight:
        return AffineWeight.empty(
            shape,
            groups=self._groups(shape[1], self.name),
            bits=self.bits,
            symmetric=False,
            identity=identity_of(self),
            zero=self._stored_zero,
        )

    @property
    def _stored_zero(self) -> Literal["integer", "float16"]:
        return "integer" if self.has_zero else "float16"


def _solve(weight_ng: Tensor, bits: int, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return scales, float16, and zero points, float32 as they are stored, of groups of weights: (n,) each.

    weight_ng  (n, g) float32, one group a row
    exact      zero points are integers in [0, 2^bits - 1]
    """
    steps = 2**bits - 1
    low, high = weight_ng.amin(dim=1), weight_ng.amax(dim=1)
    if exact:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum((high - low) / steps, torch.maximum(high, -low) / FARTHEST).to(torch.float16)
    if bool(torch.isinf(scale).any()):
        raise DovetailError(
            "hqq",
            found=f"a group from {float(low.min()):.6g} to {float(high.max()):.6g}",
            rule=f"a scale must fit float16, at most {torch.finfo(torch.float16).max:.0f}",
            fix="check the checkpoint: weights of a working model are far smaller; or use nf4 or fp8",
        )
    step = scale.float().masked_fill_(scale == 0, torch.inf)[:, None]

    def stored(zero: Tensor) -> Tensor:
        return zero.round().clamp_(0, steps) if exact else from_float16(to_float16(zero, bits), bits)

    wanted = weight_ng / step  # in steps, before the zero point is added
    zero = stored(-low[:, None] / step)
    best, least, beta = zero, torch.full_like(zero, torch.inf), BETA
    error, code = torch.empty_like(wanted), torch.empty_like(wanted)
    for number in range(1, STEPS + 1):
        torch.add(wanted, zero, out=error)
        torch.round(error, out=code).clamp_(0, steps)
        error.sub_(code)
        total = error.square().sum(dim=1, keepdim=True)
        better = total < least
        if int(better.sum()) <= len(zero) * TOO_FEW:
            break
        best, least = torch.where(better, zero, best), torch.where(better, total, least)
        # q - (W - E) / s is z - R / s + E / s.
        moved = stored(zero - (error - _shrunk(error, scale.float()[:, None], beta)).mean(dim=1, keepdim=True))
        beside = stored(best + PROBE * (number if number % 2 else -number))
        zero = torch.where(moved == zero, beside, moved)
        beta *= GROWTH
    return scale, best[:, 0]


def _shrunk(error_ng: Tensor, scale_n1: Tensor, beta: float) -> Tensor | float:
    """Return the shrunk errors, in steps as `error_ng` is; 0 where all are zero."""
    threshold = beta ** (-1 / (2 - P))  # up to it, |R|^(P - 1) / beta is larger than |R|
    size = error_ng.abs().mul_(scale_n1)
    if not bool((size > threshold).any()):
        return 0.0
    size.sub_(size.pow(P - 1) / beta).clamp_(min=0)
    return size.div_(scale_n1.masked_fill(scale_n1 == 0, torch.inf)).mul_(error_ng.sign())
