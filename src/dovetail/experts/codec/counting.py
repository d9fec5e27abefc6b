"""The loops of `ternary`: how many magnitudes have which bits, moments, and masks of the largest.

`bits` are values as unsigned integers of the same bits, `magnitude` is an integer with all bits but the sign's.
"""

from __future__ import annotations

import numba
import numpy as np

from dovetail.experts.codec.native import above64, compiled, get, popcount, prefetch, put, trailing_zeros

_WORDS = 64  # that are made of values in one go
_AHEAD = 4096  # values that a prefetch is early


@numba.njit(nogil=True)
def _count_part(bits, first, last, shift, counts):
    for i in range(first, last):
        place = np.int64(np.uint64(get(bits, i)) >> shift)
        put(counts, place, get(counts, place) + np.uint32(1))


@compiled
def count(bits, shift, counts):
    """Counts, in uint32, by the bits from `shift` up."""
    _count_part(bits, 0, len(bits), shift, counts)


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
def count_and_moment(bits, values, counts):
    """Counts the top 16 bits; number, mean and sum of squares about it, in float64, of the same bits as values.

    Sums are of short stretches, so that they stay precise; longer ones are counted, then summed out of the cache.
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
def _ask_ahead(bits, first):
    """Prefetches 64 values that come later: by itself the processor asks for no more than the page that it is in."""
    for at in range(0, 64, 64 // bits.itemsize):
        prefetch(bits, first + _AHEAD + at)


@numba.njit(nogil=True)
def _rest(bits):
    """The values behind the last 64 that are whole, and zeros."""
    rest, whole = np.zeros(64, bits.dtype), len(bits) // 64 * 64
    rest[: len(bits) - whole] = bits[whole:]
    return rest


@numba.njit(nogil=True)
def _count_words(bits, first, words, magnitude, low, high, shift, counts, held):
    for w in range(words):
        _ask_ahead(bits, first + w * 64)
        above_low = above64(bits, first + w * 64, magnitude, low)
        put(held, w, above_low & ~above64(bits, first + w * 64, magnitude, high))
    for w in range(words):  # in a loop of its own: branches that nobody can foresee don't wait for memory
        found = get(held, w)
        while found != np.uint64(0):  # few, where the values aren't all alike
            value = get(bits, first + w * 64 + trailing_zeros(found)) & magnitude
            found &= found - np.uint64(1)
            counts[np.int64(np.uint64(value) >> shift & np.uint64(0xFFFF))] += 1


@compiled
def count_within(bits, magnitude, low, high, shift, counts):
    """By the 16 bits from `shift` up, of magnitudes above `low` and up to `high`."""
    held, whole = np.empty(_WORDS, np.uint64), len(bits) // 64
    for w in range(0, whole, _WORDS):
        _count_words(bits, w * 64, min(_WORDS, whole - w), magnitude, low, high, shift, counts, held)
    _count_words(_rest(bits), 0, 1, magnitude, low, high, shift, counts, held)


@numba.njit(nogil=True)
def _select_words(bits, words, magnitude, every, threshold, below, ties, plus, minus, to):
    for w in range(words):
        _ask_ahead(bits, w * 64)
        above = above64(bits, w * 64, magnitude, threshold)
        negative = above64(bits, w * 64, every, magnitude)
        if ties[0] > 0:
            equal = above64(bits, w * 64, magnitude, below) & ~above
            rest = equal
            for _ in range(min(popcount(equal), ties[0])):
                rest &= rest - np.uint64(1)  # without its lowest bit
            ties[0] -= popcount(equal ^ rest)
            above |= equal ^ rest
        put(plus, to + w, above & ~negative)
        put(minus, to + w, above & negative)


@compiled
def select(bits, magnitude, every, threshold, below, ties, plus, minus):
    """Masks of magnitudes above the threshold, and of as many equal to it as ties[0] says, which it lowers.

    magnitude, every  integers with all bits but the sign's, and with all; below: the threshold less one
    """
    whole = len(bits) // 64
    _select_words(bits, whole, magnitude, every, threshold, below, ties, plus, minus, 0)
    if whole < len(plus):
        _select_words(_rest(bits), 1, magnitude, every, threshold, below, ties, plus, minus, whole)
