"""`fp8`: 8-bit floats, with one scale per row or one for the whole matrix.

Idea: e4m3 (sign, 4 bits of exponent, 3 of fraction; largest number 448) has a relative precision of 1/16 over more
than four decades, so one scale per row suffices. Accelerators multiply it natively.

    scale = max|w| / 448        code = nearest e4m3 number to w / scale        value = code * scale

Zero is a code: a pruned weight stays zero.

Source: Micikevicius et al. 2022 (FP8 formats for deep learning, arXiv:2209.05433), §3.
Trade-off: `int(bits=8)` has equidistant values and is finer for the large weights of a group, coarser for the small
ones; fp8 needs no groups. Size: 8 + 32/in_features bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight, refuse_bad_weight
from dovetail.chains.link import Quantizer, identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics

if TYPE_CHECKING:
    from typing_extensions import Self

LARGEST = 448.0
REACH = 464.0
"""Numbers up to here round to 448: half a step (32) beyond it."""
SMALLEST_SCALE = 2.0**-116
"""Smaller scales are stored as zero: their values would be subnormal float32 numbers."""


@register("fp8")
@dataclass(frozen=True)
class Float8(Quantizer):
    """8-bit floats (e4m3), one scale per row or one per matrix."""

    summary: ClassVar[str] = "8-bit floats (e4m3), one scale per row or per tensor"
    source: ClassVar[str] = "FP8 formats for deep learning (arXiv:2209.05433)"

    scale: str = "row"

    def __post_init__(self) -> None:
        if self.scale not in ("row", "tensor"):
            raise self._bad(f'scale="{self.scale}"', 'scale must be "row" or "tensor"', 'set scale="row"')

    @property
    def movable(self) -> frozenset[Literal["scales", "zeros"]]:
        return frozenset({"scales"} if self.scale == "row" else ())

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> Float8Weight:
        """Return the scales and codes of weight_oi (o, i), any float dtype. Raise DovetailError on NaN or inf."""
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        scale = weight_32.abs().amax(dim=1) / LARGEST
        if self.scale == "tensor":
            scale = scale.amax(dim=0, keepdim=True)
        grid = self.empty((weight_oi.shape[0], weight_oi.shape[1]))
        grid.scale = scale.masked_fill(scale < SMALLEST_SCALE, 0.0)
        grid.codes = grid.codes.to(weight_oi.device)
        return grid.encode(weight_32)

    def empty(self, shape: tuple[int, int]) -> Float8Weight:
        codes = torch.zeros(shape, dtype=torch.float8_e4m3fn)
        scale = torch.zeros(shape[0] if self.scale == "row" else 1, dtype=torch.float32)
        return Float8Weight(codes, scale, identity_of(self))


class Float8Weight(QuantizedWeight):
    """`codes` (o, i) float8_e4m3fn, `scale` (o,) or (1,) float32."""

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, identity: str) -> None:
        # Any row may start a chunk, also where one scale serves all: a row is the block.
        super().__init__((codes.shape[0], codes.shape[1]), codes.shape[1], 1, identity)
        self.bits = 8
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def _row_scale(self, start: int, rows: int) -> Tensor:
        return (self.scale if len(self.scale) == 1 else self.scale[start : start + rows])[:, None]

    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        _write_numbers(self.codes[start:stop], rows)
        rows.mul_(self._row_scale(start, stop - start))

    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        if inside is not None:
            beyond = rows / self._row_scale(start, len(rows))  # infinite or NaN where the scale is zero
            torch.le(beyond.abs_(), REACH, out=inside)
        codes = self._encode(rows, start)
        if bool(rows.sum().isfinite()):
            _write_numbers(codes, rows)
        else:
            rows.copy_(codes)  # a cast keeps NaN
        rows.mul_(self._row_scale(start, len(rows)))

    def _encode(self, rows: Tensor, start: int) -> Tensor:
        scale = self._row_scale(start, len(rows))
        rows.div_(scale.masked_fill(scale == 0, torch.inf))
        return rows.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

    def rows(self, start: int, stop: int) -> Self:
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        return type(self)(self.codes[start:stop], scale, self.identity)

    def moved(self, factor_b: Tensor | None = None, offset_b: Tensor | None = None) -> Self:
        assert offset_b is None
        assert factor_b is not None
        scale = self.scale * factor_b.reshape(-1).float()
        return type(self)(self.codes, scale.masked_fill(scale < SMALLEST_SCALE, 0.0), self.identity)

    def zero_codes(self, start: int, stop: int) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.uint8, device=self.codes.device)

    def _with_codes(self, codes: Tensor) -> Self:
        return type(self)(codes.view(torch.float8_e4m3fn), self.scale, self.identity)


def _write_numbers(codes: Tensor, out: Tensor) -> None:
    """Write the values of the codes, none of them NaN, into `out`, float32.

    On CPU a cast is slow; there the bits of e4m3 are moved to float16's places, where they are the same number
    divided by 2^8, as the exponents' biases are 7 and 15.
    """
    if codes.device.type != "cpu":
        out.copy_(codes)
        return
    sign_extended = codes.view(torch.int8).to(torch.int16)
    out.copy_(sign_extended.bitwise_left_shift_(7).bitwise_and_(-0x4001).view(torch.float16)).mul_(256.0)
