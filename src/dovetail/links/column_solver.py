"""Column-wise compression: later columns of a weight compensate for the errors of earlier ones.

For a layer's inputs X and G = XᵀX, the error of a changed weight is ‖(W - Ŵ)Xᵀ‖² = ‖(W - Ŵ)R‖² with G = R Rᵀ, R upper
triangular. When the columns are visited in order, the errors E of earlier columns affect column m by E R[:, m] alone,
so the best values of the remaining columns are

    W_rest + E R[done, rest] R[rest, rest]⁻¹

This is the optimal-brain-surgeon update of GPTQ (Frantar et al. 2022, §3.3) and SparseGPT (2023, §3.2), which use
U = R⁻¹, the Cholesky factor of G⁻¹. R takes one Cholesky factorization and no inverse of G, and the update of a block
of columns reads the earlier errors once instead of writing all later columns. Within a block its part of U is used.
Shapes: o i b = out, in, columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.chains.linalg import times_transposed
from dovetail.chains.statistics import InputStatistics

BLOCK = 128
_LEAF = 16
"""Columns that are updated one after the other, before one product updates the rest of their block."""
_MOST_DAMPING = 1.0

Visit = Callable[[Tensor, Tensor, slice], Callable[[int, Tensor], Tensor]]


@dataclass(frozen=True)
class Factor:
    """The factor of a Gram matrix, by which errors affect later columns.

    order_i    the columns in the order in which they are visited
    lower_ii   L with G[reversed order] = L Lᵀ, which is R with both axes reversed
    damping    share of G's mean diagonal that was added to its diagonal
    """

    order_i: Tensor
    lower_ii: Tensor
    damping: float


def factor(inputs: InputStatistics, damping: float, *, by_size: bool = False) -> Factor | None:
    """Return the factor of the inputs' Gram matrix, which it replaces; cached for layers with the same inputs.

    damping  share of the mean diagonal to add; multiplied by ten while G is singular
    by_size  visit the inputs of largest norm first (GPTQ's act-order), else from left to right
    returns  None for a matrix that cannot be factored with any damping up to 1
    """
    key = (damping, by_size)
    if key not in inputs.factors:
        inputs.factors[key] = _factor(inputs, damping, by_size)
        inputs.gram_ii = None
    found = inputs.factors[key]
    assert found is None or isinstance(found, Factor)
    return found


def _factor(inputs: InputStatistics, damping: float, by_size: bool) -> Factor | None:
    gram_ii = inputs.gram_ii
    assert gram_ii is not None, "one factor of a Gram matrix"
    diagonal = gram_ii.diagonal()
    if by_size:
        order = torch.argsort(diagonal, descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=gram_ii.device)
    last_first = order.flip(0)
    mean = float(diagonal.mean())
    info = torch.empty((), dtype=torch.int32, device=gram_ii.device)
    while True:
        # Transposed, which changes nothing of a symmetric matrix: LAPACK works in place on columns.
        lower = gram_ii[last_first[:, None], last_first].mT if by_size else gram_ii.flip(0, 1).mT
        lower.diagonal().add_(damping * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            return Factor(order, lower, damping)
        damping = max(10 * damping, 1e-3)
        if damping > _MOST_DAMPING:
            return None


def reconstruct(weight_oi: Tensor, factor: Factor, visit: Visit, window: int = 1) -> Tensor:
    """Return the weight, changed column by column.

    weight_oi  (o, i) in the factor's dtype; not written to
    visit      called at the start of each block with its weights (b, o), updated for all earlier errors, with the
               diagonal (b,) of U, and its columns' places in the order. It returns a function that is called for each
               column j of the block in turn with its updated weights (o,), and returns their new values. The function
               may read the block's weights, which are updated in place as columns are visited
    window     when the first of `window` columns is visited, all of them are in the block and up to date
    returns    (o, i)
    """
    i = weight_oi.shape[1]
    block = BLOCK // window * window
    leaf = window * max(1, _LEAF // window)
    lower = factor.lower_ii
    # Everything is in reversed order, as in the factor: later columns have lower indices.
    last_first = factor.order_i.flip(0)
    new = weight_oi[:, last_first]
    error = torch.empty_like(new)
    for start in range(0, i, block):
        low, high = max(i - start - block, 0), i - start
        here = slice(low, high)
        part = new[:, here]
        now = part.clone()
        own = lower[here, here]
        if start:
            carried = times_transposed(error[:, high:], lower[high:, here].t())
            now += torch.linalg.solve_triangular(own, carried, upper=False, left=False)
        eye = torch.eye(high - low, dtype=own.dtype, device=own.device)
        inverse = torch.linalg.solve_triangular(own, eye, upper=False).flip(0, 1)
        weight_bo = now.t().flip(0).contiguous()
        column = visit(weight_bo, inverse.diagonal(), slice(start, start + high - low))
        _visit_columns(weight_bo, inverse, column, leaf)
        done = weight_bo.flip(0).t()
        error[:, here] = part - done
        new[:, here] = done
    return torch.empty_like(new).index_copy_(1, last_first, new)


def _visit_columns(weight_bo: Tensor, upper_bb: Tensor, column: Callable[[int, Tensor], Tensor], leaf: int) -> None:
    """Visit the block's columns (here rows) in turn; later columns compensate for the error of each."""
    columns = len(weight_bo)
    diagonal: list[float] = upper_bb.diagonal().tolist()
    for start in range(0, columns, leaf):
        stop = min(start + leaf, columns)
        errors = torch.empty_like(weight_bo[start:stop])
        for j in range(start, stop):
            now = weight_bo[j]
            new = column(j, now)
            error = torch.sub(now, new, out=errors[j - start]).div_(diagonal[j])
            weight_bo[j] = new
            if j + 1 < stop:
                weight_bo[j + 1 : stop].addr_(upper_bb[j, j + 1 : stop], error, alpha=-1)
        if stop < columns:
            weight_bo[stop:].addmm_(upper_bb[start:stop, stop:].t(), errors, alpha=-1)
