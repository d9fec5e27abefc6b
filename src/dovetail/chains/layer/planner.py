"""The planner of a chain: it folds the terms to one form, and chooses how to run it at the cost of one adapter.

    open        scales and low ranks: one product with the base plus thin ones; W' is never computed
    closed      ... and then remask or regrid: W' is computed in a shared buffer, again in backward, and never saved
    recomputed  anything else: W' by the links' own definition, computed again in backward

`chains/layer/execute.py` runs them. All three equal the definition (`ChainLinear.effective_weight`); the contract
tests verify this in float64. Shapes: t o i r = token, out, in, rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dovetail.chains.layer.base import Base
from dovetail.chains.layer.operators import numbered, operator
from dovetail.chains.terms import Form, Hadamard, InScale, LowRank, OutScale, RowNorm, Term, nonzero
from dovetail.models.layouts import Layout

Path = Literal["open", "closed", "recomputed"]

Factors = Sequence[Tensor | None]
"""out (o,), in (i,), a (r, i), b (o, r) of a `Form`."""

NORM_FLOOR = 1e-2
"""Below this share of its parts, the closed-form ‖W'‖² has cancelled and is computed from W' itself."""


def compose(terms: Sequence[Term], base: Base, bias_o: Tensor | None, training: bool, from_codes: bool = True) -> Form:
    """Fold the terms of a chain, in order, to one form over the base (`Base.start_weight`)."""
    form = Form(bias_o=bias_o)
    for term in terms:
        match term:
            case OutScale(scale_o, scales_bias):
                form.scale_out(scale_o, scales_bias)
            case InScale(scale_i):
                form.scale_in(scale_i)
            case LowRank():
                form.add(term, training)
            case Hadamard():
                form.add(term.low_rank(), training)
            case RowNorm(magnitude_o):
                norm_o = row_norm(form, base, from_codes)
                form.scale_out(magnitude_o / nonzero(norm_o).to(magnitude_o.dtype), scales_bias=False)
    return form


@torch.no_grad()
def row_norm(form: Form, base: Base, from_codes: bool = True) -> Tensor:
    """Return ‖diag(s) W diag(t) + B A‖ of each row, (o,), without computing the matrix:

    s²‖W t‖² + 2 s·rowsum(((W t) Aᵀ) ⊙ B) + rowsum((B A Aᵀ) ⊙ B)
    """
    factors = form.out_scale_o, form.in_scale_i, *(form.factors() or (None, None))
    if torch.compiler.is_compiling():
        return torch.ops.dovetail.row_norm(factors, base.number, from_codes)  # type: ignore[no-any-return]
    return _row_norm(factors, base, from_codes)


def _wide(base: Base) -> torch.dtype:
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def _empty_norm(_: Factors, number: int, from_codes: bool) -> Tensor:
    base: Base = numbered(number)
    return torch.empty(base.shape[0], dtype=_wide(base), device=base.device)


@operator("row_norm(Tensor?[] factors, int base, bool from_codes) -> Tensor", _empty_norm)
def _row_norm_by_number(factors: Factors, number: int, from_codes: bool) -> Tensor:
    return _row_norm(factors, numbered(number), from_codes)


@torch.no_grad()
def _row_norm(factors: Factors, base: Base, from_codes: bool) -> Tensor:
    out_o, in_i, a_ri, b_or = factors
    wide = _wide(base)
    scale_i = None if in_i is None else in_i.to(wide)
    if scale_i is None:
        square_o = base.row_square(from_codes)
    else:
        weight = base.start_weight(from_codes)
        square_o = torch.empty(base.shape[0], dtype=wide, device=weight.device)
        for rows in base.row_chunks(wide):
            square_o[rows] = weight[rows].to(wide).square() @ scale_i.square()
    scale_o = torch.ones_like(square_o) if out_o is None else out_o.to(wide)
    square_o = scale_o.square() * square_o
    if a_ri is None or b_or is None:
        return square_o.sqrt()
    a_ri, b_or = a_ri.to(wide), b_or.to(wide)
    weight = base.start_weight(from_codes)
    a_scaled = a_ri if scale_i is None else a_ri * scale_i
    b_ro = b_or.t().contiguous()
    cross_o = 2 * scale_o * ((a_scaled.to(weight.dtype) @ weight.t()).to(wide) * b_ro).sum(0)
    own_o = ((a_ri @ a_ri.t() @ b_ro) * b_ro).sum(0)
    total_o = square_o + cross_o + own_o
    if bool((total_o < NORM_FLOOR * (square_o + own_o)).any()):
        norm_o = torch.empty_like(total_o)
        for rows in base.row_chunks(wide):
            part = weight[rows].to(wide, copy=True)  # a dense base is its own weight: never write to it
            affine_(part, rows, (scale_o, scale_i, a_ri, b_or))
            norm_o[rows] = torch.linalg.vector_norm(part, dim=1)
        return norm_o
    return total_o.sqrt()


def choose_path(closes: Sequence[bool], terms: Sequence[Term], layout: Layout) -> Path:
    """Choose how a chain runs on a layer.

    closes  for each link that changes the weight, whether it is a constraint
    """
    if not layout.linear:
        return "recomputed"
    # Dropout acts on a low rank's input, which the definition of W' does not know: such a chain stays open.
    dropout = any(isinstance(term, LowRank) and term.dropout > 0 for term in terms)
    shape = layout.out_features, layout.in_features
    if not dropout and any(isinstance(term, Hadamard) and not low_rank_is_cheap(term, shape) for term in terms):
        return "recomputed"
    if not any(closes):
        return "open"
    # All constraints at the end: one form, then constraints. Adapters behind a constraint are not part of that form.
    return "closed" if list(closes) == sorted(closes) else "recomputed"


def low_rank_is_cheap(term: Hadamard, shape: tuple[int, int]) -> bool:
    """Return whether LoHa runs faster as a low rank of r² than by computing its (o, i) product (DESIGN.md §3)."""
    o, i = shape
    return term.a1_ri.shape[0] ** 2 < o * i / (3 * (o + i))


def casts(form: Form, dtype: torch.dtype) -> Factors:
    """Return the form's factors, cast to `dtype`."""
    return tuple(None if t is None else t.to(dtype) for t in (form.out_scale_o, form.in_scale_i, form.a_ri, form.b_or))


def affine_(part_ni: Tensor, rows: slice, factors: Factors) -> None:
    """Replace rows of W by rows of diag(s) W diag(t) + B A, in place."""
    out_o, in_i, a_ri, b_or = factors
    if out_o is not None:
        part_ni.mul_(out_o[rows, None])
    if in_i is not None:
        part_ni.mul_(in_i)
    if a_ri is not None and b_or is not None:
        part_ni.addmm_(b_or[rows], a_ri)
