"""The one tolerance of comparisons that depend on the order of summation, and so on the processor."""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(dtype: torch.dtype, terms: int, steps: int = 1) -> float:
    """Bound the difference of two correct evaluations in dtype, relative to the largest result.

    terms    products in each sum: the reduction length (in_features of a linear layer)
    steps    such sums, or roundings to dtype, one after the other

    A sum of n products x_k y_k in any order, with or without fused multiply-add, errs by at most n u Σ|x_k y_k|, where
    u = eps / 2 (Higham, Accuracy and Stability of Numerical Algorithms, 2002, eq. 3.5). Roundings have both signs, so
    that √n replaces n with high probability (Higham and Mary 2019, A New Approach to Probabilistic Rounding Error
    Analysis, theorem 2.4). For terms of both signs Σ|x_k y_k| is at most about √n times the largest of the results.
    One evaluation then errs by √n u √n = n u of the largest result, and two differ by at most n eps.

    Half precision accumulates in float32 and rounds once a step: eps(dtype) + n eps(float32).
    """
    eps = torch.finfo(dtype).eps
    wide = torch.finfo(torch.float32).eps
    return steps * (terms * eps if eps <= wide else eps + terms * wide)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest number wanted."""
    assert found.shape == wanted.shape
    wanted = wanted.detach().double()
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def assert_near(found: Tensor, wanted: Tensor, *, terms: int, steps: int = 1) -> None:
    """Assert that two results are equal up to the rounding of the narrower dtype."""
    narrow = max((found.dtype, wanted.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    assert difference(found, wanted) <= rounding(narrow, terms, steps)
