"""Reading codes, products of few vectors with codes, and rounding to a grid on GPUs, by Triton.

The GPU's counterpart of `loops`: one kernel reads a weight once and writes it once. Reading and rounding use the
definition's operations in its order and in float32: divisions are correctly rounded (`div_rn`), and a product and a sum
are not fused. A product sums in another order, as torch's own products of one vector and of many do.

Codes of 1, 2, 3, 4 or 8 bits are packed as in `dovetail.chains.packing`, in which the first code has the highest bits.
Scales and zero points are read as a grid stores them, so that one kernel does all of the work: while a model writes
token by token, the start of a kernel takes longer than its work.

    scale  (blocks,), of blocks in row-major order, which may span rows; float16 or float32
    zero   None: 2^(bits-1); uint8: packed like the codes; float16: distances from 2^(bits-1)

This module needs the package triton and is imported where it is used. With TRITON_INTERPRET=1 in the environment before
triton is imported, the kernels run on the CPU in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dovetail.chains.packing import BYTES_PER_UNIT, CODES_PER_UNIT

_TILE = 1024
"""Weights of one program that reads or rounds."""
_ROWS, _UNITS = 4, 256
"""Rows of the weight, and units of packed codes at once, of one program that multiplies."""


@triton.jit
def _code(codes, n, here, BITS: tl.constexpr):
    """Return code n of packed ones."""
    bit = n * BITS
    byte = tl.load(codes + bit // 8, mask=here, other=0).to(tl.int32)
    if BITS == 3:  # a code may lie in two bytes
        after = tl.load(codes + bit // 8 + 1, mask=here & (bit % 8 > 5), other=0).to(tl.int32)
        code = ((byte << 8) | after) >> (13 - bit % 8).to(tl.int32)
    else:
        code = byte >> (8 - BITS - bit % 8).to(tl.int32)
    return code & ((1 << BITS) - 1)


@triton.jit
def _scale(scale, block, here):
    """Return the scale of a block; +0 below DEAD_SCALE (2^-116), as `scales.decode` has it."""
    s = tl.load(scale + block, mask=here, other=0.0).to(tl.float32)
    return tl.where(tl.abs(s) < 1.2037062152420224e-35, 0.0, s)


@triton.jit
def _zero(zero, block, here, middle, BITS: tl.constexpr):
    """Return the zero point of a block, float32."""
    if zero.dtype.element_ty == tl.uint8:
        z = _code(zero, block, here, BITS).to(tl.float32)
    else:
        z = tl.load(zero + block, mask=here, other=0.0).to(tl.float32) + middle
    return z


@triton.jit
def _decode(
    codes, scale, zero, levels, out, count, middle,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BOOK: tl.constexpr, ZERO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = n < count
    code = _code(codes, n, here, BITS)
    s = _scale(scale, n // BLOCK, here)
    if BOOK:
        value = tl.load(levels + code) * s
    else:
        z = middle
        if ZERO:
            z = _zero(zero, n // BLOCK, here, middle, BITS)
        value = (code.to(tl.float32) - z) * s + 0.0
    if out.dtype.element_ty == tl.bfloat16:  # rounded here, half to even: Triton's interpreter would truncate
        word = value.to(tl.int32, bitcast=True)
        value = ((word + 32767 + ((word >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    tl.store(out + n, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _multiply(
    codes, scale, zero, levels, x, y, out_features, in_features, x_t, x_i, middle,
    BITS: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, BOOK: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(1)
    wide_o = o.to(tl.int64)[:, None]
    units = in_features // CODES
    total = tl.zeros((ROWS, UNITS), dtype=tl.float32)
    for first in range(0, units, UNITS):
        u = first + tl.arange(0, UNITS)
        here_u = u < units
        here = (o < out_features)[:, None] & here_u[None, :]
        at = codes + wide_o * (units * BYTES) + (u * BYTES)[None, :]
        unit = tl.load(at, mask=here, other=0).to(tl.int32)
        if BYTES == 3:
            second = tl.load(at + 1, mask=here, other=0).to(tl.int32)
            third = tl.load(at + 2, mask=here, other=0).to(tl.int32)
            unit = (unit << 16) | (second << 8) | third
        block = wide_o * (in_features // BLOCK) + (u * CODES // BLOCK)[None, :]
        z = middle
        if ZERO:
            z = _zero(zero, block, here, middle, BITS)
        part = tl.zeros((ROWS, UNITS), dtype=tl.float32)
        for k in tl.static_range(CODES):
            code = (unit >> (8 * BYTES - BITS * (k + 1))) & ((1 << BITS) - 1)
            number = tl.load(x + t * x_t + (u * CODES + k) * x_i, mask=here_u, other=0.0).to(tl.float32)[None, :]
            if BOOK:
                part += tl.load(levels + code) * number
            else:
                part += (code.to(tl.float32) - z) * number
        total += part * _scale(scale, block, here)
    tl.store(y + t * out_features + o, tl.sum(total, axis=1), mask=o < out_features)


@triton.jit
def _snap_affine(
    w, scale, zero, inside, count, first, lowest, highest, middle,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, ASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = n < count
    s = _scale(scale, first + n // BLOCK, here)
    code = tl.div_rn(tl.load(w + n, mask=here, other=0.0), tl.where(s == 0.0, float("inf"), s))
    z = 0.0
    if ZERO:
        z = _zero(zero, first + n // BLOCK, here, middle, BITS)
        if zero.dtype.element_ty != tl.uint8:  # not an integer: it takes part in rounding
            code = code + z
    # The float32 numbers of that size are integers, so the sum is rounded to one, half to even. NaN stays NaN.
    code = tl.where(code < -2097152.0, -2097152.0, tl.where(code > 2097152.0, 2097152.0, code))
    code = (code + 12582912.0) - 12582912.0
    if ZERO and zero.dtype.element_ty == tl.uint8:
        code = code + z
    if ASKED:
        tl.store(inside + n, ((code >= lowest) & (code <= highest) & (s != 0.0)).to(tl.int8), mask=here)
    code = tl.where(code < lowest, lowest, tl.where(code > highest, highest, code))
    tl.store(w + n, (code - z) * s + 0.0, mask=here)


@triton.jit
def _snap_levels(
    w, scale, inside, levels, middles, count, first, whole, reach,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = n < count
    s = _scale(scale, first + n // BLOCK, here)
    divisor = tl.where(s == 0.0, float("inf"), s)
    number = tl.load(w + n, mask=here, other=0.0)
    reciprocal = tl.div_rn(tl.full((TILE,), 1.0, tl.float32), divisor)
    scaled = tl.where(n < whole, number * reciprocal, tl.div_rn(number, divisor))
    if ASKED:
        tl.store(inside + n, ((tl.abs(scaled) <= reach) & (s != 0.0)).to(tl.int8), mask=here)
    level = tl.zeros((TILE,), dtype=tl.int32)
    for k in tl.static_range(BITS):  # a binary search: the number of middles below
        up = level + (1 << (BITS - 1 - k))
        level = tl.where(scaled > tl.load(middles + up - 1), up, level)
    value = tl.where(scaled != scaled, scaled, tl.load(levels + level))
    tl.store(w + n, value * s, mask=here)


def _programs(count: int) -> tuple[int]:
    return (triton.cdiv(count, _TILE),)


def _run(kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], *numbers: float, **constants: int) -> None:
    """Run a kernel on the device of its tensors, with no product and sum fused."""
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, *numbers, **constants, enable_fp_fusion=False)


def decode(
    codes: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor | None, out: Tensor, *, bits: int, block: int
) -> Tensor:
    """Write (code - zero) * scale, or levels[code] * scale, into `out`, rounded once to its dtype, and return it.

    codes   packed, uint8
    levels  of a code book, float32 (2^bits,); None: the weight is affine
    out     any shape, contiguous, float32, bfloat16 or float16
    """
    tensors = (codes, scale, codes if zero is None else zero, scale if levels is None else levels, out)
    constants = {"BITS": bits, "BLOCK": block, "BOOK": levels is not None, "ZERO": zero is not None, "TILE": _TILE}
    _run(_decode, _programs(out.numel()), tensors, out.numel(), float(2 ** (bits - 1)), **constants)
    return out


def multiplies(in_features: int, bits: int, block: int) -> bool:
    """Return whether `multiply` takes weights of this form: whole blocks in a row, whole units of codes in a block."""
    return in_features % block == 0 and block % CODES_PER_UNIT[bits] == 0


def multiply(
    codes: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor | None, x_ti: Tensor, out_features: int,
    *, bits: int, block: int,
) -> Tensor:  # fmt: skip
    """Return the products of vectors with the weight of these codes: (t, o) float32.

    x_ti  (t, i) any float dtype, any strides; the other arguments are those of `decode`
    """
    t, i = x_ti.shape
    y_to = torch.empty(t, out_features, dtype=torch.float32, device=x_ti.device)
    tensors = (codes, scale, codes if zero is None else zero, scale if levels is None else levels, x_ti, y_to)
    numbers = (out_features, i, x_ti.stride(0), x_ti.stride(1), float(2 ** (bits - 1)))
    constants = {
        "BITS": bits, "CODES": CODES_PER_UNIT[bits], "BYTES": BYTES_PER_UNIT[bits], "BLOCK": block,
        "BOOK": levels is not None, "ZERO": zero is not None, "ROWS": _ROWS, "UNITS": _UNITS,
    }  # fmt: skip
    _run(_multiply, (triton.cdiv(out_features, _ROWS), t), tensors, *numbers, **constants)
    return y_to


def snap_affine(
    w: Tensor, scale: Tensor, zero: Tensor | None, inside: Tensor | None, *, first: int, bits: int, block: int
) -> None:
    """Replace w by the nearest value on an affine grid.

    w       contiguous, float32
    zero    None: the codes are those of a symmetric grid, from -2^(bits-1)
    inside  bool, of w's shape, contiguous: filled with whether each number was not clipped
    first   the block of w's first number
    """
    lowest, middle = float(-(2 ** (bits - 1)) if zero is None else 0), float(2 ** (bits - 1))
    flags = w if inside is None else inside.view(-1).view(torch.int8)
    constants = {"BITS": bits, "BLOCK": block, "ZERO": zero is not None, "ASKED": inside is not None, "TILE": _TILE}
    tensors = (w, scale, scale if zero is None else zero, flags)
    numbers = (w.numel(), first, lowest, lowest + 2**bits - 1, middle)
    _run(_snap_affine, _programs(w.numel()), tensors, *numbers, **constants)


def snap_levels(
    w: Tensor, scale: Tensor, inside: Tensor | None, levels: Tensor, middles: Tensor,
    *, first: int, block: int, reach: float, divides: bool,
) -> None:  # fmt: skip
    """Replace w by the level nearest to w / scale, times the scale.

    w        contiguous, float32
    inside   bool, of w's shape, contiguous: filled with whether |w / scale| is at most `reach`
    levels   (2^bits,) float32, ascending
    middles  (2^bits - 1,) float32: a number up to a middle belongs to the lower level
    first    the block of w's first number
    divides  whether w is divided by the scale, or multiplied by its reciprocal, except in a short last block
    """
    whole = 0 if divides else w.numel() // block * block
    flags = w if inside is None else inside.view(-1).view(torch.int8)
    constants = {"BITS": len(middles).bit_length(), "BLOCK": block, "ASKED": inside is not None, "TILE": _TILE}
    tensors = (w, scale, flags, levels, middles)
    _run(_snap_levels, _programs(w.numel()), tensors, w.numel(), first, whole, float(reach), **constants)
