"""Arithmetic on experts as bit masks, 64 values at a time, without decoding (ComPEFT §2.2).

A value is in the mask of plus, in the mask of minus, or in neither. With the masks p, m and q, n of two experts:

  agree = |p q ∪ m n|,  disagree = |p n ∪ m q|,  dot of signs = agree - disagree,
  Hamming distance (number of different signs) = kept_a + kept_b - 2 agree - disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.chains.compiled import compiled
from dovetail.errors import DataError
from dovetail.experts.codec.codec import word_count
from dovetail.experts.codec.native import get, popcount, put, trailing_zeros

_FEW = 4  # experts in a bit-parallel election
_CHUNK = 1 << 14  # words whose sums are held at a time


@dataclass(frozen=True)
class Masks:
    """Ternary values of many tensors.

    words   uint64, (2, words): row 0 is plus, row 1 minus; each tensor starts at a new word
    shapes  of the tensors, in their order in `words`; value v, row-major, is bit v mod 64 of word v div 64
    scales  of the tensors
    """

    words: np.ndarray
    shapes: dict[str, tuple[int, ...]]
    scales: dict[str, float]

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Yield the name, the first word and the end of each tensor."""
        first = 0
        for name, shape in self.shapes.items():
            last = first + word_count(math.prod(shape))
            yield name, first, last
            first = last

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def kept(self) -> int:
        return int(_kept(self.words[0], self.words[1]))


def compare(a: Masks, b: Masks) -> dict[str, float]:
    """Compare two experts; `dovetail.experts.similarity` documents the result."""
    agree = disagree = 0
    dot = squares_a = squares_b = 0.0
    for first, last, (scale_a, scale_b) in _stretches(a, b):
        parts = [words[first:last] for words in (*a.words, *b.words)]
        same, opposite = _agreement(*parts)
        agree, disagree = agree + same, disagree + opposite
        dot += scale_a * scale_b * (same - opposite)
        squares_a += scale_a**2 * _kept(parts[0], parts[1])
        squares_b += scale_b**2 * _kept(parts[2], parts[3])
    kept_a, kept_b, both = a.kept, b.kept, agree + disagree
    return {
        "dot": dot,
        "cosine": dot / math.sqrt(squares_a) / math.sqrt(squares_b) if squares_a and squares_b else 0.0,
        "hamming": kept_a + kept_b - 2 * agree - disagree,
        "sign_agreement": agree / both if both else 0.0,
        "kept_a": kept_a,
        "kept_b": kept_b,
        "kept_both": both,
        "numel": a.numel,
    }


def dot(a: Masks, b: Masks) -> float:
    """Return the dot product of the decoded vectors."""
    total = 0.0
    for first, last, (scale_a, scale_b) in _stretches(a, b):
        agree, disagree = _agreement(*(words[first:last] for words in (*a.words, *b.words)))
        total += scale_a * scale_b * (agree - disagree)
    return total


def scaled_sum(experts: Sequence[Masks], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the sum of weight times decoded vector, float32, added in float32 in the order of the experts.

    weights  one per expert; None: all 1
    """
    _check(experts)
    factors = [1.0] * len(experts) if weights is None else weights
    units = [{name: factor * scale for name, scale in masks.scales.items()}
             for masks, factor in zip(experts, factors, strict=True)]  # fmt: skip
    return _sums(experts, units, torch.float32)


def sign_sum(experts: Sequence[Masks]) -> dict[str, Tensor]:
    """Return the sum of the signs, int16: the number of experts with plus minus the number with minus."""
    _check(experts)
    return _sums(experts, [dict.fromkeys(masks.shapes, 1) for masks in experts], torch.int16)


def _sums(experts: Sequence[Masks], units: Sequence[Mapping[str, float]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the sum of unit times sign by tensor, added in `dtype` in the order of the experts."""
    sums = {name: torch.zeros(shape, dtype=dtype) for name, shape in experts[0].shapes.items()}
    for masks, own in zip(experts, units, strict=True):
        for name, first, last in masks.spans():
            out = sums[name].view(-1).numpy()
            _add(masks.words[0, first:last], masks.words[1, first:last], out.dtype.type(own[name]), out)
    return sums


def elect(
    experts: Sequence[Masks], weights: Sequence[float] | None = None, by: Literal["value", "count"] = "value"
) -> Masks:
    """Elect signs as TIES (Yadav et al. 2023, §3): for each value, the sign of the sum over the experts; scales are 1.

    weights  one per expert; None: all 1
    by       "value" sums weight · scale · sign in float64, in the order of the experts; "count" sums weight · sign
    """
    _check(experts)
    factors = [1.0] * len(experts) if weights is None else list(weights)
    out = np.zeros_like(experts[0].words)
    known: dict[tuple[float, ...], np.ndarray] = {}
    for first, last, scales in _stretches(*experts):
        units = [f * (s if by == "value" else 1.0) for f, s in zip(factors, scales, strict=True)]
        if len(experts) > _FEW:
            for start in range(first, last, _CHUNK):
                stop = min(start + _CHUNK, last)
                sums = np.zeros((stop - start) * 64)
                for masks, unit in zip(experts, units, strict=True):
                    _add(masks.words[0, start:stop], masks.words[1, start:stop], np.float64(unit), sums)
                _signs(sums, out[0, start:stop], out[1, start:stop])
            continue
        votes = known.setdefault(tuple(units), _votes(units))
        padded = [*experts, *[experts[0]] * (_FEW - len(experts))]  # with votes of weight 0
        parts = [words[first:last] for masks in padded for words in masks.words]
        _elect_few(*parts, votes, out[0, first:last], out[1, first:last])
    return Masks(out, experts[0].shapes, dict.fromkeys(experts[0].shapes, 1.0))


def _votes(units: Sequence[float]) -> np.ndarray:
    """Return a table (2, 27): for the votes of three experts, the votes of the fourth with which plus or minus wins.

    Votes are digits in base 3, the first expert's the highest: 0, 1, 2 are no vote, +, -. Bit d of an entry is set if
    the vote d of the fourth expert makes that sign win.
    """
    padded = [*units, *[0.0] * (_FEW - len(units))]
    table = np.zeros((2, 3 ** (_FEW - 1)), np.int64)
    for place, signs in enumerate(product((0.0, 1.0, -1.0), repeat=_FEW)):
        total = 0.0
        for sign, unit in zip(signs, padded, strict=True):
            total += sign * unit
        if total != 0:
            table[int(total < 0), place // 3] |= 1 << place % 3
    return table


def _check(experts: Sequence[Masks]) -> None:
    if not experts:
        raise DataError("masks", found="no expert", rule="at least one expert is needed")
    for masks in experts[1:]:
        if masks.shapes == experts[0].shapes and list(masks.shapes) == list(experts[0].shapes):
            continue
        both = masks.shapes.keys() | experts[0].shapes.keys()
        odd = sorted(name for name in both if masks.shapes.get(name) != experts[0].shapes.get(name))
        found = f"{odd[0]}: {_shape(experts[0].shapes, odd[0])} and {_shape(masks.shapes, odd[0])}" if odd else "orders"
        raise DataError("masks", found=found, rule="all experts must hold the same tensors in the same order")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"


def _stretches(*experts: Masks) -> Iterator[tuple[int, int, tuple[float, ...]]]:
    """Yield first word and end of stretches in which no expert's scale changes, and the scales."""
    _check(experts)
    start, end, held = 0, 0, None
    for name, first, last in experts[0].spans():
        scales = tuple(masks.scales[name] for masks in experts)
        if held is not None and scales != held:
            yield start, end, held
            start = first
        end, held = last, scales
    if held is not None:
        yield start, end, held


@compiled
def _kept(plus, minus):
    count = 0
    for i in range(len(plus)):
        count += popcount(get(plus, i) | get(minus, i))
    return count


@compiled
def _agreement(p, m, q, n):
    agree = disagree = 0
    for i in range(len(p)):
        agree += popcount((get(p, i) & get(q, i)) | (get(m, i) & get(n, i)))
        disagree += popcount((get(p, i) & get(n, i)) | (get(m, i) & get(q, i)))
    return agree, disagree


@compiled
def _add(plus, minus, unit, out):
    for w in range(len(plus)):
        both = plus[w] | minus[w]
        while both != np.uint64(0):
            bit = trailing_zeros(both)
            both &= both - np.uint64(1)
            out[w * 64 + bit] += -unit if minus[w] >> np.uint64(bit) & np.uint64(1) else unit


@compiled
def _signs(sums, plus, minus):
    for w in range(len(plus)):
        up, down = np.uint64(0), np.uint64(0)
        for j in range(64):
            value = get(sums, w * 64 + j)
            up |= np.uint64(value > 0) << np.uint64(j)
            down |= np.uint64(value < 0) << np.uint64(j)
        put(plus, w, up)
        put(minus, w, down)


@numba.njit(nogil=True)
def _choose(plus, minus, first, n, held, none, up, down, out, to):
    """Write to out, of three answers in `held`, the one for the vote of an expert."""
    for i in range(n):
        p, m = get(plus, first + i), get(minus, first + i)
        put(out, to + i, (get(held, none + i) & ~(p | m)) | (get(held, up + i) & p) | (get(held, down + i) & m))


@compiled
def _elect_few(p0, m0, p1, m1, p2, m2, p3, m3, votes, plus, minus):
    """Decide for all votes of the first three experts, then of two, then of one; in chunks that fit the cache."""
    size = 128
    fourth, held = np.empty(8 * size, np.uint64), np.empty(12 * size, np.uint64)
    constant = np.zeros(2 * size, np.uint64)  # the answers no and yes
    constant[size:] = ~np.uint64(0)
    for start in range(0, len(plus), size):
        n = min(size, len(plus) - start)
        for kind in range(8):  # bit d: the answer to the vote d of the fourth expert
            none, up, down = kind & 1, kind >> 1 & 1, kind >> 2
            _choose(p3, m3, start, n, constant, none * size, up * size, down * size, fourth, kind * size)
        for plane, out in enumerate((plus, minus)):
            for way in range(9):
                none, up, down = votes[plane, 3 * way], votes[plane, 3 * way + 1], votes[plane, 3 * way + 2]
                _choose(p2, m2, start, n, fourth, none * size, up * size, down * size, held, way * size)
            for way in range(3):
                row = 3 * way * size
                _choose(p1, m1, start, n, held, row, row + size, row + 2 * size, held, (9 + way) * size)
            _choose(p0, m0, start, n, held, 9 * size, 10 * size, 11 * size, out, start)
