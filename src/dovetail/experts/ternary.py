"""Ternary task vectors: which values are kept, their signs, and one scale (ComPEFT, arXiv:2311.13171, Algorithm 1).

  τ~ = α σ(τ) sgn(τ) [ |τ| among the k largest ],  k = round(density · n)

k counts over all tensors as one vector, in the sorted order of their names; of equal magnitudes, those with the lowest
index in that vector are kept (tensors in row-major order). σ is the standard deviation of the whole task vector, zeros
and all, before anything is dropped (§2.1, App. B.5), with n - 1 as torch has it; "tensor" takes each tensor's own
instead. An exact zero has no sign and is never kept.

Selection is by counting: the bits of |x| as an integer rise with |x|, so a histogram of their top 16 finds the bucket
of the k-th largest, and a histogram of the next 16 within that bucket goes on, until the bits are exact. That is one
pass over bf16 and fp16, two over fp32 and four over fp64, where sorting or quickselect takes dozens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.experts.codec import word_count
from dovetail.experts.native import compiled, get, popcount, put

_INTEGERS = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
"""Bits of infinity: magnitudes from there on aren't finite."""


@dataclass(frozen=True)
class Selection:
    """Kept values: by name, masks as in `codec`, and standard deviations before anything was dropped."""

    masks: dict[str, np.ndarray]
    spread: float
    spreads: dict[str, float]


def top_k(vector: Mapping[str, Tensor], density: float, per_tensor: bool = False) -> Selection:
    """The k = round(density · n) largest of a task vector, by magnitude.

    vector      float tensors of any shapes; of several dtypes, they are compared in one that holds all their values
    density     0..1
    per_tensor  whether `spreads` is wanted
    errors      DataError for NaN, infinity and integers, naming the tensor
    """
    names = sorted(vector)
    for name in names:
        if vector[name].dtype not in _EXPONENT:
            rule = "a task vector is of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in _EXPONENT)
            raise DataError(f"task vector at {name}", found=str(vector[name].dtype), rule=rule)
    dtype = torch.bfloat16 if not names else vector[names[0]].dtype
    for name in names:
        dtype = torch.promote_types(dtype, vector[name].dtype)
    bits = {name: bits_of(vector[name], dtype) for name in names}
    counts, spread, spreads = _survey(vector, bits, dtype, per_tensor)
    total = sum(array.size for array in bits.values())
    wanted = round(density * total)
    shift, magnitude = 8 * dtype.itemsize - 16, (1 << 8 * dtype.itemsize - 1) - 1
    prefix, above = _bucket(counts, wanted)
    while shift > 0:
        shift -= 16
        counts = np.zeros(1 << 16, np.int64)
        for array in bits.values():
            kind, low = array.dtype.type, prefix << shift + 16
            high = low + (1 << shift + 16) - 1
            _count_within(array, kind(magnitude), kind(low), kind(high), np.uint64(shift), counts)
        low, more = _bucket(counts, wanted - above)
        prefix, above = prefix << 16 | low, above + more
    ties = np.array([wanted - above if prefix else 0], np.int64)  # none of values that are zero
    masks = {}
    for name in names:
        masks[name] = np.zeros((2, word_count(bits[name].size)), np.uint64)
        if wanted:
            kind = bits[name].dtype.type
            _select(bits[name], kind(magnitude), kind(prefix), ties, masks[name][0], masks[name][1])
    return Selection(masks, spread, spreads)


def bits_of(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor's values in a dtype, flat, as unsigned integers of the same bits."""
    flat = tensor.detach().to(dtype=dtype, device="cpu").contiguous().view(-1)
    return flat.view(_INTEGERS[dtype.itemsize]).numpy()


def _bucket(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The highest bucket from which on at least `wanted` values lie, and how many lie above it."""
    from_here = counts[::-1].cumsum()[::-1]
    bucket = max(int(np.count_nonzero(from_here >= wanted)) - 1, 0)
    return bucket, int(from_here[bucket + 1]) if bucket + 1 < len(counts) else 0


def _survey(
    vector: Mapping[str, Tensor], bits: Mapping[str, np.ndarray], dtype: torch.dtype, per_tensor: bool
) -> tuple[np.ndarray, float, dict[str, float]]:
    """One look at every value: how many have which top bits (15, without the sign), and standard deviations."""
    top, moments, own = np.zeros(1 << 15, np.int64), [], {}
    infinite = _EXPONENT[dtype] >> 8 * dtype.itemsize - 16
    for name in sorted(bits):
        counts = np.zeros(1 << 16, np.int64)
        for first in range(0, bits[name].size, 1 << 31):
            part = np.zeros(1 << 16, np.uint32)
            _count(bits[name][first : first + (1 << 31)], np.uint64(8 * dtype.itemsize - 16), part)
            counts += part
        folded = counts[: 1 << 15] + counts[1 << 15 :]
        if folded[infinite:].any():
            values = vector[name].detach()
            found = f"{int(values.isnan().sum())} NaN, {int(values.isinf().sum())} infinite"
            raise DataError(f"task vector at {name}", found=found, rule="its values are finite")
        top += folded
        if dtype.itemsize == 2:
            moment = _moment_of_counts(counts, dtype)
        else:
            moment = tuple(_moment(torch.from_numpy(bits[name]).view(dtype).numpy()))
        moments.append(moment)
        if per_tensor:
            own[name] = _spread([moment])
    return top, _spread(moments), own


def _moment_of_counts(counts: np.ndarray, dtype: torch.dtype) -> tuple[float, float, float]:
    """Number, mean and sum of squares about the mean, from how often each value is there."""
    there = np.flatnonzero(counts)
    if there.size == 0:
        return 0.0, 0.0, 0.0
    values = torch.from_numpy(there.astype(np.uint16)).view(dtype).double().numpy()
    weights = counts[there].astype(np.float64)
    number = weights.sum()
    mean = values[0] + (weights * (values - values[0])).sum() / number
    return float(number), float(mean), float((weights * (values - mean) ** 2).sum())


def _spread(moments: list[tuple[float, float, float]]) -> float:
    """Standard deviation of all values from each part's number, mean and squares; 0 of fewer than two."""
    number, mean, squares = 0.0, 0.0, 0.0
    for n, own, own_squares in moments:
        if n:
            step = own - mean
            squares += own_squares + step * step * number * n / (number + n)
            mean, number = mean + step * n / (number + n), number + n
    return float(np.sqrt(squares / (number - 1))) if number > 1 else 0.0


@compiled
def _count(bits, shift, counts):
    for i in range(len(bits)):
        place = np.int64(np.uint64(get(bits, i)) >> shift)
        put(counts, place, get(counts, place) + np.uint32(1))


@numba.njit(nogil=True)
def _any_within(bits, first, n, magnitude, low, high):
    found = np.uint64(0)
    for j in range(n):
        value = get(bits, first + j) & magnitude
        found |= np.uint64((value >= low) & (value <= high))
    return found != np.uint64(0)


@compiled
def _count_within(bits, magnitude, low, high, shift, counts):
    """By the 16 bits from `shift` up, of magnitudes from `low` to `high`, which have the same bits above these."""
    for first in range(0, len(bits), 64):
        last = min(first + 64, len(bits))
        if last - first < 64 or _any_within(
            bits, first, 64, magnitude, low, high
        ):  # few of them, where the values aren't all alike
            for i in range(first, last):
                value = get(bits, i) & magnitude
                if value >= low and value <= high:
                    counts[np.int64(np.uint64(value) >> shift & np.uint64(0xFFFF))] += 1


@numba.njit(nogil=True, fastmath={"reassoc", "nsz"})
def _sums(values, first, last, start):
    """Sums of x - start and of its square; in any order, so that the compiler may add vectors."""
    total = squared = 0.0
    for i in range(first, last):
        off = np.float64(get(values, i)) - start
        total += off
        squared += off * off
    return total, squared


@compiled
def _moment(values):
    """Number, mean and sum of squares about it, in float64; sums over chunks, so that they stay precise."""
    number, mean, squares = 0.0, 0.0, 0.0
    for first in range(0, len(values), 4096):
        last = min(first + 4096, len(values))
        start = np.float64(values[first])
        total, squared = _sums(values, first, last, start)
        n = np.float64(last - first)
        own, own_squares = start + total / n, max(squared - total * total / n, 0.0)
        step = own - mean
        squares += own_squares + step * step * number * n / (number + n)
        mean += step * n / (number + n)
        number += n
    return number, mean, squares


@numba.njit(nogil=True)
def _compare(bits, first, n, magnitude, threshold):
    """Bits of n values: magnitude above the threshold; equal to it; negative."""
    above, equal, negative = np.uint64(0), np.uint64(0), np.uint64(0)
    for j in range(n):
        value = get(bits, first + j)
        above |= np.uint64((value & magnitude) > threshold) << np.uint64(j)
        equal |= np.uint64((value & magnitude) == threshold) << np.uint64(j)
        negative |= np.uint64(value > magnitude) << np.uint64(j)
    return above, equal, negative


@compiled
def _select(bits, magnitude, threshold, ties, plus, minus):
    """Masks of magnitudes above the threshold, and of as many equal to it as ties[0] says, which it lowers."""
    for w in range(len(plus)):
        if (w + 1) * 64 <= len(bits):
            above, equal, negative = _compare(bits, w * 64, 64, magnitude, threshold)  # a constant: vectors
        else:
            above, equal, negative = _compare(bits, w * 64, len(bits) - w * 64, magnitude, threshold)
        if equal != np.uint64(0) and ties[0] > 0:
            rest = equal
            for _ in range(min(popcount(equal), ties[0])):
                rest &= rest - np.uint64(1)  # without its lowest bit
            ties[0] -= popcount(equal ^ rest)
            above |= equal ^ rest
        put(plus, w, above & ~negative)
        put(minus, w, above & negative)
