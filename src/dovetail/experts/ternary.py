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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.experts.codec.codec import word_count
from dovetail.experts.codec.counting import count, count_and_moment, count_within, select
from dovetail.experts.vectors import Spec, specs_of

_INTEGERS = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}
"""Bits of infinity: magnitudes from there on aren't finite."""
_PIECE = 1 << 24
"""Values that are looked at in one go: a multiple of 64, few enough to count in 32 bits."""


@dataclass(frozen=True)
class Selection:
    """Kept values: by name, masks as in `codec`, and standard deviations before anything was dropped."""

    masks: dict[str, np.ndarray]
    spread: float
    spreads: dict[str, float]


def top_k(vector: Mapping[str, Tensor], density: float, per_tensor: bool = False) -> Selection:
    """The k = round(density · n) largest of a task vector, by magnitude.

    vector      float tensors of any shapes; of several dtypes, they are compared in one that holds all their values.
                One that makes its tensors anew (`TaskVector`) is asked for each once a pass, and one is held at a time
    density     0..1
    per_tensor  whether `spreads` is wanted
    errors      DataError for NaN, infinity and integers, naming the tensor
    """
    specs = specs_of(vector)
    for name, spec in specs.items():
        if spec.dtype not in _EXPONENT:
            rule = "a task vector is of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in _EXPONENT)
            raise DataError(f"task vector at {name}", found=str(spec.dtype), rule=rule)
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
    ties = np.array([wanted - above if prefix else 0], np.int64)  # none of values that are zero
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
    """How many magnitudes whose upper bits are `prefix` have which 16 bits from `shift` up."""
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
    """One pass: work(name, first, bits) on every piece of every tensor."""
    for name, spec in specs.items():
        _visit_one(vector, name, spec, dtype, work)


def _visit_one(
    vector: Mapping[str, Tensor],
    name: str,
    spec: Spec,
    dtype: torch.dtype,
    work: Callable[[str, int, np.ndarray], None],
) -> None:
    """A tensor's pieces. A function, so that nothing of the tensor is left when the next is asked for.

    bits  the piece's values in a dtype, as unsigned integers; where the tensor is in that dtype, nothing is copied
    """
    tensor = vector[name].detach()
    if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
        found, rule = f"{list(tensor.shape)}, {tensor.dtype}", f"it was said to be {list(spec.shape)}, {spec.dtype}"
        raise DataError(f"task vector at {name}", found=found, rule=rule)
    flat = tensor.reshape(-1)
    for first in range(0, flat.numel(), _PIECE):
        piece = flat[first : first + _PIECE].to(dtype=dtype, device="cpu").contiguous()
        work(name, first, piece.view(_INTEGERS[dtype.itemsize]).numpy())


def _bucket(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """The highest bucket from which on at least `wanted` values lie, and how many lie above it."""
    from_here = counts[::-1].cumsum()[::-1]
    bucket = max(int(np.count_nonzero(from_here >= wanted)) - 1, 0)
    return bucket, int(from_here[bucket + 1]) if bucket + 1 < len(counts) else 0


def _survey(
    vector: Mapping[str, Tensor], specs: Mapping[str, Spec], dtype: torch.dtype, per_tensor: bool
) -> tuple[np.ndarray, float, dict[str, float]]:
    """One look at every value: how many have which top bits (15, without the sign), and standard deviations."""
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
            raise DataError(f"task vector at {name}", found=found, rule="its values are finite")
        top += folded
        every += moments
        if per_tensor:
            own[name] = _spread(moments)
    return top, _spread(every), own


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
