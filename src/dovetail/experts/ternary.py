"""Ternary task vectors: which values are kept, their signs, and one scale (ComPEFT, arXiv:2311.13171, Algorithm 1).

  τ~ = α σ(τ) sgn(τ) [ |τ| among the k largest ],  k = round(density · n)

k counts over all tensors as one vector, in the sorted order of their names. Of equal magnitudes, those with the lowest
index in that vector are kept (tensors in row-major order). σ is the standard deviation of the whole task vector,
including zeros, before any value is dropped (§2.1, App. B.5), with n - 1 as in torch; "tensor" uses the standard
deviation of each tensor instead. An exact zero has no sign and is never kept.

Selection is by counting. The bits of |x| as an integer rise with |x|: a histogram of their top 16 bits finds the bucket
of the k-th largest, and a histogram of the next 16 bits within that bucket continues, until all bits are known. This
takes one pass over bf16 and fp16, two over fp32 and four over fp64, where sorting or quickselect takes dozens.

In the compiled loops, `bits` are values as unsigned integers of the same bits, and `magnitude` is an integer with all
bits set but the sign's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.chains.compiled import compiled
from dovetail.errors import DataError
from dovetail.experts.codec.codec import word_count
from dovetail.experts.codec.native import above64, get, popcount, put, trailing_zeros
from dovetail.experts.vectors import Spec, specs_of

_INTEGERS = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
"""Bits of infinity: magnitudes from there are not finite."""
_PIECE = 1 << 24
"""Values per piece: a multiple of 64, few enough to count in 32 bits."""
_WORDS = 64  # mask words per batch


@dataclass(frozen=True)
class Selection:
    """Masks of the kept values by name (as in `codec`), and standard deviations before any value was dropped."""

    masks: dict[str, np.ndarray]
    spread: float
    spreads: dict[str, float]


def top_k(vector: Mapping[str, Tensor], density: float, per_tensor: bool = False) -> Selection:
    """Select the k = round(density · n) largest values of a task vector, by magnitude.

    vector      float tensors of any shapes. Several dtypes are compared in one that holds all their values. Each
                tensor is read once per pass, and one is held at a time
    density     0..1
    per_tensor  whether to compute `spreads`
    errors      DataError for NaN, infinity and integers; names the tensor
    """
    specs = specs_of(vector)
    for name, spec in specs.items():
        if spec.dtype not in _EXPONENT:
            rule = "the dtype must be one of " + ", ".join(str(each).removeprefix("torch.") for each in _EXPONENT)
            raise DataError(f"task vector at {name}", found=str(spec.dtype), rule=rule, fix="convert it to float32")
    dtype = next((spec.dtype for spec in specs.values()), torch.bfloat16)
    for spec in specs.values():
        dtype = torch.promote_types(dtype, spec.dtype)
    masks = {name: np.zeros((2, word_count(math.prod(spec.shape))), np.uint64) for name, spec in specs.items()}
    counts, spread, spreads = _survey(vector, specs, dtype, per_tensor)
    wanted = round(density * sum(math.prod(spec.shape) for spec in specs.values()))
    shift, kind = 8 * dtype.itemsize - 16, np.dtype(f"u{dtype.itemsize}").type
    magnitude = ~kind(0) >> kind(1)
    prefix, above = _bucket(counts, wanted)
    while shift > 0:
        shift -= 16
        low, more = _bucket(_next_counts(vector, specs, dtype, prefix, shift), wanted - above)
        prefix, above = prefix << 16 | low, above + more
    ties = np.array([wanted - above if prefix else 0], np.int64)  # zeros are never kept
    threshold, below = kind(prefix), kind(max(prefix - 1, 0))

    def choose(name: str, first: int, bits: np.ndarray) -> None:
        words = masks[name][:, first // 64 : first // 64 + word_count(bits.size)]
        select(bits, magnitude, ~kind(0), threshold, below, ties, words[0], words[1])

    if wanted:
        _visit(vector, specs, dtype, choose)
    return Selection(masks, spread, spreads)


def _next_counts(
    vector: Mapping[str, Tensor], specs: Mapping[str, Spec], dtype: torch.dtype, prefix: int, shift: int
) -> np.ndarray:
    """Count the magnitudes with upper bits `prefix` by their 16 bits from `shift` up."""
    counts, kind = np.zeros(1 << 16, np.int64), np.dtype(f"u{dtype.itemsize}").type
    low, high = prefix << shift + 16, (prefix + 1 << shift + 16) - 1
    bounds = ~kind(0) >> kind(1), kind(max(low - 1, 0)), kind(high)

    def look(name: str, first: int, bits: np.ndarray) -> None:
        count_within(bits, *bounds, np.uint64(shift), counts)

    _visit(vector, specs, dtype, look)
    return counts


def _visit(
    vector: Mapping[str, Tensor],
    specs: Mapping[str, Spec],
    dtype: torch.dtype,
    work: Callable[[str, int, np.ndarray], None],
) -> None:
    """Call work(name, first, bits) on every piece of every tensor: one pass."""
    for name, spec in specs.items():
        _visit_one(vector, name, spec, dtype, work)


def _visit_one(
    vector: Mapping[str, Tensor],
    name: str,
    spec: Spec,
    dtype: torch.dtype,
    work: Callable[[str, int, np.ndarray], None],
) -> None:
    """Visit the pieces of one tensor. The function holds no reference to it afterwards.

    bits  the values of the piece in `dtype`, as unsigned integers; not copied if the tensor has that dtype
    """
    tensor = vector[name].detach()
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        found, rule = f"{list(tensor.shape)}, {tensor.dtype}", f"its spec declares {list(spec.shape)}, {spec.dtype}"
        raise DataError(f"task vector at {name}", found=found, rule=rule)
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), _PIECE):
        piece = flat[first : first + _PIECE].to(dtype=dtype, device="cpu").contiguous()
        work(name, first, piece.view(_INTEGERS[dtype.itemsize]).numpy())


def _bucket(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """Return the highest bucket from which at least `wanted` values lie, and how many lie above it."""
    from_here = counts[::-1].cumsum()[::-1]
    bucket = max(int(np.count_nonzero(from_here >= wanted)) - 1, 0)
    return bucket, int(from_here[bucket + 1]) if bucket + 1 < len(counts) else 0


def _survey(
    vector: Mapping[str, Tensor], specs: Mapping[str, Spec], dtype: torch.dtype, per_tensor: bool
) -> tuple[np.ndarray, float, dict[str, float]]:
    """Count all values by their top 15 bits without the sign, and return standard deviations, in one pass."""
    top, every, own = np.zeros(1 << 15, np.int64), [], {}
    for name, spec in specs.items():
        counts, moments = np.zeros(1 << 16, np.int64), []

        def look(name: str, first: int, bits: np.ndarray, counts=counts, moments=moments) -> None:
            part = np.zeros(1 << 16, np.uint32)
            if dtype.itemsize == 2:
                count(bits, np.uint64(0), part)
                moments.append(_moment_of_counts(part, dtype))
            else:
                moments.append(count_and_moment(bits, bits.view(f"f{dtype.itemsize}"), part))
            counts += part

        _visit_one(vector, name, spec, dtype, look)
        folded = counts[: 1 << 15] + counts[1 << 15 :]
        if folded[_EXPONENT[dtype] >> 8 * dtype.itemsize - 16 :].any():
            values = vector[name]
            found = f"{int(values.isnan().sum())} NaN, {int(values.isinf().sum())} infinite"
            raise DataError(f"task vector at {name}", found=found, rule="all values must be finite")
        top += folded
        every += moments
        if per_tensor:
            own[name] = _spread(moments)
    return top, _spread(every), own


def _moment_of_counts(counts: np.ndarray, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return number, mean and sum of squares about the mean, from the count of each value."""
    there = np.flatnonzero(counts)
    if there.size == 0:
        return 0.0, 0.0, 0.0
    values = torch.from_numpy(there.astype(np.uint16)).view(dtype).double().numpy()
    weights = counts[there].astype(np.float64)
    number = weights.sum()
    mean = values[0] + (weights * (values - values[0])).sum() / number
    return float(number), float(mean), float((weights * (values - mean) ** 2).sum())


def _spread(moments: list[tuple[float, float, float]]) -> float:
    """Return the standard deviation of all values from number, mean and squares of each part; 0 for fewer than two."""
    number, mean, squares = 0.0, 0.0, 0.0
    for n, own, own_squares in moments:
        if n:
            step = own - mean
            squares += own_squares + step * step * number * n / (number + n)
            mean, number = mean + step * n / (number + n), number + n
    return float(np.sqrt(squares / (number - 1))) if number > 1 else 0.0


@numba.njit(nogil=True)
def _count_part(bits, first, last, shift, counts):
    for i in range(first, last):
        place = np.int64(np.uint64(get(bits, i)) >> shift)
        put(counts, place, get(counts, place) + np.uint32(1))


@compiled
def count(bits, shift, counts):
    """Count values by their bits from `shift` up, in uint32."""
    _count_part(bits, 0, len(bits), shift, counts)


@numba.njit(nogil=True, fastmath={"reassoc", "nsz"})
def _sums(values, first, last, start):
    """Sum x - start and its square, in any order, so that the compiler may vectorize."""
    total = squared = 0.0
    for i in range(first, last):
        off = np.float64(get(values, i)) - start
        total += off
        squared += off * off
    return total, squared


@compiled
def count_and_moment(bits, values, counts):
    """Count the top 16 bits; return number, mean and sum of squares about it, in float64.

    Sums are taken over short stretches for precision; longer stretches are counted and then summed from the cache.
    """
    shift = np.uint64(8 * bits.itemsize - 16)
    number, mean, squares = 0.0, 0.0, 0.0
    for first in range(0, len(values), 4096):
        if first % 65536 == 0:
            _count_part(bits, first, min(first + 65536, len(values)), shift, counts)
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
def _rest(bits):
    """Return the values after the last complete 64, padded with zeros."""
    rest, whole = np.zeros(64, bits.dtype), len(bits) // 64 * 64
    rest[: len(bits) - whole] = bits[whole:]
    return rest


@numba.njit(nogil=True)
def _count_words(bits, first, words, magnitude, low, high, shift, counts, held):
    for w in range(words):
        above_low = above64(bits, first + w * 64, magnitude, low)
        put(held, w, above_low & ~above64(bits, first + w * 64, magnitude, high))
    for w in range(words):  # a separate loop, so that mispredicted branches do not wait for memory
        found = get(held, w)
        while found != np.uint64(0):  # few, unless the values are alike
            value = get(bits, first + w * 64 + trailing_zeros(found)) & magnitude
            found &= found - np.uint64(1)
            counts[np.int64(np.uint64(value) >> shift & np.uint64(0xFFFF))] += 1


@compiled
def count_within(bits, magnitude, low, high, shift, counts):
    """Count magnitudes above `low` and up to `high` by their 16 bits from `shift` up."""
    held, whole = np.empty(_WORDS, np.uint64), len(bits) // 64
    for w in range(0, whole, _WORDS):
        _count_words(bits, w * 64, min(_WORDS, whole - w), magnitude, low, high, shift, counts, held)
    _count_words(_rest(bits), 0, 1, magnitude, low, high, shift, counts, held)


@numba.njit(nogil=True)
def _select_words(bits, words, magnitude, every, threshold, below, ties, plus, minus, to):
    for w in range(words):
        above = above64(bits, w * 64, magnitude, threshold)
        negative = above64(bits, w * 64, every, magnitude)
        if ties[0] > 0:
            equal = above64(bits, w * 64, magnitude, below) & ~above
            rest = equal
            for _ in range(min(popcount(equal), ties[0])):
                rest &= rest - np.uint64(1)  # clears its lowest bit
            ties[0] -= popcount(equal ^ rest)
            above |= equal ^ rest
        put(plus, to + w, above & ~negative)
        put(minus, to + w, above & negative)


@compiled
def select(bits, magnitude, every, threshold, below, ties, plus, minus):
    """Write masks of magnitudes above the threshold, and of ties[0] ones that are equal to it; lower ties[0].

    magnitude, every  integers with all bits but the sign's, and with all bits
    below             the threshold minus one
    """
    whole = len(bits) // 64
    _select_words(bits, whole, magnitude, every, threshold, below, ties, plus, minus, 0)
    if whole < len(plus):
        _select_words(_rest(bits), 1, magnitude, every, threshold, below, ties, plus, minus, whole)
