"""Rounding to a grid and reading it in one pass over the weights, compiled; products of few vectors with codes.

A definition makes a pass over the weights for each operation; here a weight is read and written once. Every operation
of rounding and reading is the definition's, in its order and in float32, which IEEE 754 rounds alike everywhere. A
product sums in another order, as torch's own products of one vector and of many do.

`w` is (blocks, block), float32, contiguous, and is overwritten; `scale` is (blocks,). `inside` is (blocks, block),
bool, or (0, 0) where it is not asked for. This module is imported where it is used: numba takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from os import getpid
from typing import Any

import numpy as np
import torch

from dovetail.chains.compiled import compiled

_PART = 2**17
"""Weights that are worth a thread."""


def over_blocks(loop: Callable[..., Any], arrays: Sequence[np.ndarray], *constants: Any) -> None:
    """Run a loop on as many threads as torch uses: each on a part of the blocks, the first axis of the arrays."""
    blocks = len(arrays[0])
    threads = min(torch.get_num_threads(), arrays[0].size // _PART)
    if threads < 2:
        loop(*arrays, *constants)
        return
    ends = [blocks * part // threads for part in range(threads + 1)]
    parts = [[array[start:stop] for array in arrays] for start, stop in pairwise(ends)]
    for _ in _pool(getpid(), threads).map(lambda part: loop(*part, *constants), parts):
        pass


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads of a process: those of its parent do not exist in it."""
    return ThreadPoolExecutor(threads)


@compiled
def snap_affine(w, scale, zero, inside, lowest, highest):
    """Replace w by (clamp(round(w / scale) + zero) - zero) * scale, with +0 where the scale is negative, too.

    zero             (blocks,) float32 integers; all 0 for a symmetric grid
    lowest, highest  float32, of the codes
    """
    blocks, block = w.shape
    asked = inside.shape[0] > 0
    for b in range(blocks):
        s, z = scale[b], zero[b]
        if s == 0:
            for j in range(block):
                w[b, j] = w[b, j] * np.float32(0) + np.float32(0)  # NaN stays NaN, -0 becomes 0
                if asked:
                    inside[b, j] = False
        elif asked:
            for j in range(block):
                code = np.rint(w[b, j] / s) + z
                inside[b, j] = lowest <= code <= highest
                code = lowest if code < lowest else code
                code = highest if code > highest else code
                w[b, j] = (code - z) * s + np.float32(0)
        else:
            for j in range(block):
                code = np.rint(w[b, j] / s) + z
                code = lowest if code < lowest else code
                code = highest if code > highest else code
                w[b, j] = (code - z) * s + np.float32(0)


@compiled
def snap_uniform(w, scale, offset, inside, lowest, highest):
    """Replace w by clamp(round((w - offset) / scale)) * scale + offset.

    offset           (blocks,) float32; -0 for none
    lowest, highest  float32, of the levels, which are consecutive integers
    """
    blocks, block = w.shape
    asked = inside.shape[0] > 0
    nearest_zero = min(max(np.float32(0), lowest), highest)
    for b in range(blocks):
        s, o = scale[b], offset[b]
        if s == 0:
            for j in range(block):
                w[b, j] = w[b, j] if w[b, j] != w[b, j] else nearest_zero * s + o
                if asked:
                    inside[b, j] = False
        elif asked:
            for j in range(block):
                level = np.rint((w[b, j] - o) / s)
                inside[b, j] = lowest <= level <= highest
                level = lowest if level < lowest else level
                level = highest if level > highest else level
                w[b, j] = level * s + o
        else:
            for j in range(block):
                level = np.rint((w[b, j] - o) / s)
                level = lowest if level < lowest else level
                level = highest if level > highest else level
                w[b, j] = level * s + o


@compiled
def snap_levels(w, scale, inside, levels, middles, reach, divides):
    """Replace w by the level nearest to w / scale, times the scale.

    levels   (n,) float32, ascending
    middles  (n - 1,) float32: a number up to a middle belongs to the lower level
    reach    float32: the straight-through gradient passes up to there
    divides  whether w is divided by the scale, or multiplied by its reciprocal
    """
    blocks, block = w.shape
    asked = inside.shape[0] > 0
    number = len(middles)
    whole = number // 5 * 5
    x, found = np.empty(block, np.float32), np.empty(block, np.float32)
    for b in range(blocks):
        s = scale[b]
        if s == 0:
            for j in range(block):
                w[b, j] = w[b, j] * np.float32(0) + np.float32(0)
                if asked:
                    inside[b, j] = False
            continue
        r = np.float32(1) / s
        for j in range(block):
            x[j] = w[b, j] / s if divides else w[b, j] * r
        if asked:
            for j in range(block):
                inside[b, j] = abs(x[j]) <= reach
        for j in range(block):
            found[j] = levels[0]
        # Over all numbers of a block at once, in vector instructions; five levels a pass, which stay in registers.
        for k in range(0, whole, 5):
            m0, m1, m2, m3, m4 = middles[k], middles[k + 1], middles[k + 2], middles[k + 3], middles[k + 4]
            l0, l1, l2, l3, l4 = levels[k + 1], levels[k + 2], levels[k + 3], levels[k + 4], levels[k + 5]
            for j in range(block):
                level = l0 if x[j] > m0 else found[j]
                level = l1 if x[j] > m1 else level
                level = l2 if x[j] > m2 else level
                level = l3 if x[j] > m3 else level
                found[j] = l4 if x[j] > m4 else level
        for k in range(whole, number):
            middle, level = middles[k], levels[k + 1]
            for j in range(block):
                found[j] = level if x[j] > middle else found[j]
        for j in range(block):
            w[b, j] = (x[j] if x[j] != x[j] else found[j]) * s


@compiled
def decode_affine(w, scale, zero, codes, bits):
    """Write (code - zero) * scale into w; codes (blocks, block * bits / 8) uint8, packed, of 2, 4 or 8 bits."""
    blocks, block = w.shape
    for b in range(blocks):
        s, z = scale[b], zero[b]
        if bits == 8:
            for j in range(block):
                w[b, j] = (np.float32(codes[b, j]) - z) * s + np.float32(0)
        elif bits == 4:
            for j in range(block // 2):
                byte = codes[b, j]
                w[b, 2 * j] = (np.float32(byte >> 4) - z) * s + np.float32(0)
                w[b, 2 * j + 1] = (np.float32(byte & 15) - z) * s + np.float32(0)
        else:
            for j in range(block // 4):
                byte = codes[b, j]
                for k in range(4):
                    w[b, 4 * j + k] = (np.float32((byte >> (6 - 2 * k)) & 3) - z) * s + np.float32(0)


@compiled
def decode_levels(w, scale, codes, bits, levels):
    """Write levels[code] * scale into w; codes as for `decode_affine`, levels (2^bits,) float32 by code."""
    blocks, block = w.shape
    for b in range(blocks):
        s = scale[b]
        if bits == 8:
            for j in range(block):
                w[b, j] = levels[codes[b, j]] * s
        elif bits == 4:
            for j in range(block // 2):
                byte = codes[b, j]
                w[b, 2 * j] = levels[byte >> 4] * s
                w[b, 2 * j + 1] = levels[byte & 15] * s
        else:
            for j in range(block // 4):
                byte = codes[b, j]
                for k in range(4):
                    w[b, 4 * j + k] = levels[(byte >> (6 - 2 * k)) & 3] * s


# Products. With several codes in a byte, its scale is put beside it, so that a row is one sum in vector instructions.
# What numba computes of integers has 64 bits, which few processors make floats of in such: hence each np.int32.


@partial(compiled, any_order=True)
def _group_8(codes, x0):
    total = np.float32(0)
    for k in range(len(codes)):
        total += np.float32(np.int32(codes[k])) * x0[k]
    return total


@partial(compiled, any_order=True)
def _row_8(codes, scale, x0):
    total = np.float32(0)
    size = len(codes) // len(scale)
    codes, x0 = codes.reshape(len(scale), size), x0.reshape(len(scale), size)
    for g in range(len(scale)):  # with a number a byte, a scale beside each would cost as much as the sum
        total += scale[g] * _group_8(codes[g], x0[g])
    return total


@partial(compiled, any_order=True)
def _row_4(codes, scale, x0, x1):
    total = np.float32(0)
    for k in range(len(codes)):
        byte = np.int32(codes[k])
        total += scale[k] * (np.float32(np.int32(byte >> 4)) * x0[k] + np.float32(np.int32(byte & 15)) * x1[k])
    return total


@partial(compiled, any_order=True)
def _row_2(codes, scale, x0, x1, x2, x3):
    total = np.float32(0)
    for k in range(len(codes)):
        byte = np.int32(codes[k])
        first = np.float32(np.int32(byte >> 6)) * x0[k] + np.float32(np.int32((byte >> 4) & 3)) * x1[k]
        second = np.float32(np.int32((byte >> 2) & 3)) * x2[k] + np.float32(np.int32(byte & 3)) * x3[k]
        total += scale[k] * (first + second)
    return total


@partial(compiled, any_order=True)
def _sum_of_products(a, b, c):
    total = np.float32(0)
    for k in range(len(a)):
        total += a[k] * b[k] * c[k]
    return total


@compiled
def _spread(scale, by_byte):
    for g in range(len(scale)):
        part = by_byte[g]
        for k in range(len(part)):
            part[k] = scale[g]


@compiled
def multiply_affine(codes, scale, zero, y, x, sums, bits):
    """Write into y the products of vectors with (code - zero) * scale, codes of 2, 4 or 8 bits.

    codes        (o, bytes) uint8, packed
    scale, zero  (o, groups) float32
    y            (o, t) float32
    x            (t, codes in a byte, bytes) float32: each vector's numbers by their code's place in its byte
    sums         (t, groups) float32, of each vector's numbers in a group
    """
    size, groups = codes.shape[1], scale.shape[1]
    spread = np.empty((groups, size // groups), np.float32)
    by_byte = spread.reshape(size)
    for o in range(len(codes)):
        _spread(scale[o], spread)
        for t in range(len(x)):
            if bits == 8:
                product = _row_8(codes[o], scale[o], x[t, 0])
            elif bits == 4:
                product = _row_4(codes[o], by_byte, x[t, 0], x[t, 1])
            else:
                product = _row_2(codes[o], by_byte, x[t, 0], x[t, 1], x[t, 2], x[t, 3])
            y[o, t] = product - _sum_of_products(scale[o], zero[o], sums[t])


def by_place(x_ti: torch.Tensor, bits: int) -> np.ndarray:
    """Return vectors (t, i) as the products take them: (t, codes in a byte, bytes), float32."""
    return x_ti.float().view(len(x_ti), -1, 8 // bits).transpose(1, 2).contiguous().numpy()
