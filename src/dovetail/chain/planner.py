"""Runs a chain at the price of one adapter: folds its terms to one form and executes it in one of three ways.

    open      scales and low ranks: one product with the base plus thin ones; W' is never made
    closed    ... and then remask or regrid: W' is made in a shared buffer, in forward and again in backward, never
              saved
    recomputed  anything else: W' by the links' own definition, made again in backward

Which one is decided from the links alone (`plan`). All three equal the definition (`ChainLinear.effective_weight`),
which the contract tests hold them to in float64.

Precision: factors are kept in float32 and cast to the weight's dtype when used, x never is cast. A scale s enters as
x + x·(s - 1), whose second term keeps its digits in bfloat16, where 1 + 1e-3 would round to 1.
Shapes: t o i r = token, out, in, rank. Thin products have r as their first axis, the fast layout on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.chain.base import Base
from dovetail.chain.link import Closer
from dovetail.chain.terms import Form, Hadamard, InScale, LowRank, OutScale, RowNorm, Term, nonzero

Path = Literal["open", "closed", "recomputed"]

NORM_FLOOR = 1e-2
"""Below this share of its parts, the closed-form ‖W'‖² has cancelled and is computed from W' itself."""


def compose(terms: Sequence[Term], base: Base, bias_o: Tensor | None, training: bool, from_codes: bool = True) -> Form:
    """Folds the terms of a chain, in order, to one form over the base (`Base.beginning`)."""
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
    """‖diag(s) W diag(t) + B A‖ of each row, (o,), without making the matrix:

    s²‖W t‖² + 2 s·rowsum(((W t) Aᵀ) ⊙ B) + rowsum((B A Aᵀ) ⊙ B)
    """
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    scale_i = None if form.in_scale_i is None else form.in_scale_i.to(wide)
    if scale_i is None:
        square_o = base.row_square(from_codes)
    else:
        weight = base.origin(from_codes)
        squares = [weight[rows].to(wide).square() @ scale_i.square() for rows in base.row_chunks(wide)]
        square_o = torch.cat(squares)
    scale_o = torch.ones_like(square_o) if form.out_scale_o is None else form.out_scale_o.to(wide)
    square_o = scale_o.square() * square_o
    factors = form.factors()
    if factors is None:
        return square_o.sqrt()
    a_ri, b_or = factors[0].to(wide), factors[1].to(wide)
    weight = base.origin(from_codes)
    a_scaled = a_ri if scale_i is None else a_ri * scale_i
    cross_o = 2 * scale_o * ((weight @ a_scaled.t().to(weight.dtype)).to(wide) * b_or).sum(1)
    own_o = ((b_or @ (a_ri @ a_ri.t())) * b_or).sum(1)
    total_o = square_o + cross_o + own_o
    if bool((total_o < NORM_FLOOR * (square_o + own_o)).any()):
        return _exact_norm(form, base, from_codes, wide)
    return total_o.sqrt()


def _exact_norm(form: Form, base: Base, from_codes: bool, wide: torch.dtype) -> Tensor:
    weight = base.origin(from_codes)
    out_o, in_i, _, _ = _casts(form, wide)
    a_ri, b_or = (None, None) if (factors := form.factors()) is None else (t.to(wide) for t in factors)
    parts = []
    for rows in base.row_chunks(wide):
        part = weight[rows].to(wide)
        _affine_(part, rows, out_o, in_i, a_ri, b_or)
        parts.append(torch.linalg.vector_norm(part, dim=1))
    return torch.cat(parts)


def low_rank_is_cheap(term: Hadamard, shape: tuple[int, int]) -> bool:
    """Whether LoHa runs faster as a low rank of r² than by making its (o, i) product (DESIGN.md §3)."""
    o, i = shape
    return term.a1_ri.shape[0] ** 2 < o * i / (3 * (o + i))


# ---------------------------------------------------------------------------------------------------------------- open


def run_open(x: Tensor, form: Form, base: Base) -> Tensor:
    """y = x W'ᵀ + b' for W' = diag(s) W diag(t) + B A. x (..., i) in the weight's dtype."""
    a_ri, b_ro, out_o, in_i = _factors(form, x.dtype)
    bias_o = None if form.bias_o is None else form.bias_o.to(x.dtype)
    y = _Open.apply(x, base, a_ri, b_ro, out_o, in_i, bias_o)
    for probability, a, b in form.dropped:
        u = functional.linear(functional.dropout(x, probability), a.to(x.dtype))
        y = y + functional.linear(u, b.to(x.dtype))
    return y


def _factors(form: Form, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """a (r, i), b (r, o), s - 1 (o,), t - 1 (i,), cast to `dtype`."""
    return (
        None if form.a_ri is None else form.a_ri.to(dtype),
        None if form.b_or is None else form.b_or.t().to(dtype, memory_format=torch.contiguous_format),
        None if form.out_scale_o is None else (form.out_scale_o - 1).to(dtype),
        None if form.in_scale_i is None else (form.in_scale_i - 1).to(dtype),
    )


class _Open(torch.autograd.Function):
    """The one Function of the open path. Saves x, the small factors, and x Wᵀ only when the out-scale is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Base,
        a_ri: Tensor | None,
        b_ro: Tensor | None,
        out_o: Tensor | None,
        in_i: Tensor | None,
        bias_o: Tensor | None,
    ) -> Tensor:
        x_ti = x.reshape(-1, x.shape[-1])
        weight_oi = base.layout.matrix(base.native(x.dtype))
        scaled_ti = x_ti if in_i is None else torch.addcmul(x_ti, x_ti, in_i)
        if bias_o is not None and out_o is None:
            y_to = torch.addmm(bias_o, scaled_ti, weight_oi.t())
        else:
            y_to = scaled_ti @ weight_oi.t()
        product_to = None
        if out_o is not None:
            # The out-scale's gradient needs x Wᵀ; b is the frozen base's bias unless a link scales it.
            product_to, y_to = y_to, torch.addcmul(y_to, y_to, out_o)
            if bias_o is not None:
                y_to += bias_o
        u_rt = None
        if a_ri is not None and b_ro is not None:
            u_rt = a_ri @ x_ti.t()
            y_to.addmm_(u_rt.t(), b_ro)
        ctx.base = base
        ctx.shape = x.shape
        ctx.save_for_backward(x_ti, a_ri, b_ro, out_o, in_i, u_rt, product_to if ctx.needs_input_grad[4] else None)
        return y_to.view(*x.shape[:-1], weight_oi.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ti, a_ri, b_ro, out_o, in_i, u_rt, product_to = ctx.saved_tensors
        need_x, _, need_a, need_b, need_out, need_in, need_bias = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_out = grad_in = grad_bias = None
        g_to = grad.reshape(-1, grad.shape[-1])
        if need_bias:
            grad_bias = g_to.sum(0)
        if need_out:
            grad_out = (g_to * product_to).sum(0)
        v_rt = None
        if b_ro is not None:
            v_rt = b_ro @ g_to.t()
            if need_b:
                grad_b = u_rt @ g_to
            if need_a:
                grad_a = v_rt @ x_ti
        if need_x or need_in:
            weight_oi = ctx.base.layout.matrix(ctx.base.native(x_ti.dtype))
            scaled_to = g_to if out_o is None else torch.addcmul(g_to, g_to, out_o)
            grad_ti = scaled_to @ weight_oi
            if need_in:
                grad_in = (grad_ti * x_ti).sum(0)
            if need_x:
                if in_i is not None:
                    grad_ti = torch.addcmul(grad_ti, grad_ti, in_i)
                if v_rt is not None:
                    grad_ti.addmm_(v_rt.t(), a_ri)
                grad_x = grad_ti.view(ctx.shape)
        return grad_x, None, grad_a, grad_b, grad_out, grad_in, grad_bias


# -------------------------------------------------------------------------------------------------------------- closed


def run_closed(x: Tensor, form: Form, base: Base, closers: Sequence[Closer], from_codes: bool) -> Tensor:
    """y = x W'ᵀ + b' for W' = closers(diag(s) W diag(t) + B A). x (..., i) in the weight's dtype."""
    bias_o = None if form.bias_o is None else form.bias_o.to(x.dtype)
    factors = _casts(form, work_dtype(x.dtype, closers))
    return _Closed.apply(x, base, closers, from_codes, *factors, bias_o)  # type: ignore[no-any-return]


def work_dtype(dtype: torch.dtype, closers: Sequence[Closer]) -> torch.dtype:
    """What the weight is computed in: its own dtype, float32 where a closer asks for it."""
    if dtype != torch.float64 and any(closer.float32 for closer in closers):
        return torch.float32
    return dtype


def materialise(form: Form, base: Base, closers: Sequence[Closer], from_codes: bool, dtype: torch.dtype) -> Tensor:
    """W' in the layer's own layout, in the shared buffer: to be used before the next call.

    The forward pass and `merge` both read W' from here, which is what makes merging exact.
    """
    factors = _casts(form, work_dtype(dtype, closers))
    return _materialise(base, closers, from_codes, dtype, *factors)


def _casts(form: Form, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """out (o,), in (i,), a (r, i), b (o, r), cast to `dtype`."""
    return tuple(None if t is None else t.to(dtype) for t in (form.out_scale_o, form.in_scale_i, form.a_ri, form.b_or))


def _affine_(
    part_ni: Tensor, rows: slice, out_o: Tensor | None, in_i: Tensor | None, a_ri: Tensor | None, b_or: Tensor | None
) -> None:
    """Rows of W become rows of diag(s) W diag(t) + B A, in place."""
    if out_o is not None:
        part_ni.mul_(out_o[rows, None])
    if in_i is not None:
        part_ni.mul_(in_i)
    if a_ri is not None and b_or is not None:
        part_ni.addmm_(b_or[rows], a_ri)


@torch.no_grad()
def _materialise(
    base: Base,
    closers: Sequence[Closer],
    from_codes: bool,
    dtype: torch.dtype,
    out_o: Tensor | None,
    in_i: Tensor | None,
    a_ri: Tensor | None,
    b_or: Tensor | None,
    grad_oi: Tensor | None = None,
) -> Tensor:
    """W' in the shared buffer, chunk of rows by chunk of rows. A gradient of W', where given, is pulled back through the
    closers on the way, in place: each is a mask that depends on the values it closes, so their order doesn't matter."""
    work = work_dtype(dtype, closers)
    begin_oi = base.beginning(work, from_codes)
    native = base.buffer(dtype, "weight")
    target_oi = base.layout.matrix(native)
    direct = work == dtype and begin_oi.dtype == dtype and target_oi.is_contiguous() and out_o is None and in_i is None
    for rows in base.row_chunks(work):
        if direct and a_ri is not None and b_or is not None:
            part_ni = torch.addmm(begin_oi[rows], b_or[rows], a_ri, out=target_oi[rows])
        else:
            part_ni = base.scratch.take("rows", (rows.stop - rows.start, base.shape[1]), work, base.device)
            part_ni.copy_(begin_oi[rows])
            _affine_(part_ni, rows, out_o, in_i, a_ri, b_or)
        for closer in closers:
            closer.close_rows_(part_ni, rows.start, base, None if grad_oi is None else grad_oi[rows])
        if part_ni.data_ptr() != target_oi[rows].data_ptr():
            target_oi[rows].copy_(part_ni)
    return native


class _Closed(torch.autograd.Function):
    """Makes W' in a shared buffer in forward and again in backward; saves x and the factors, no weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Base,
        closers: Sequence[Closer],
        from_codes: bool,
        out_o: Tensor | None,
        in_i: Tensor | None,
        a_ri: Tensor | None,
        b_or: Tensor | None,
        bias_o: Tensor | None,
    ) -> Tensor:
        native = _materialise(base, closers, from_codes, x.dtype, out_o, in_i, a_ri, b_or)
        ctx.base, ctx.closers, ctx.from_codes = base, closers, from_codes
        ctx.save_for_backward(x, out_o, in_i, a_ri, b_or)
        return base.layout.call(x, native, bias_o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, out_o, in_i, a_ri, b_or = ctx.saved_tensors
        base: Base = ctx.base
        g_to, x_ti = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        needs = ctx.needs_input_grad[4:8]
        weight_grad_oi = None
        if any(needs):
            # gᵀ contiguous: on some processors the product that follows is a third faster.
            weight_grad_oi = base.scratch.take("gradient", base.shape, x.dtype, base.device)
            torch.mm(g_to.t().contiguous(), x_ti, out=weight_grad_oi)
        native = _materialise(base, ctx.closers, ctx.from_codes, x.dtype, out_o, in_i, a_ri, b_or, weight_grad_oi)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (g_to @ base.layout.matrix(native)).view(x.shape)
        grads: tuple[Tensor | None, ...] = (None, None, None, None)
        if weight_grad_oi is not None:
            begin_oi = base.beginning(x.dtype, ctx.from_codes) if needs[0] or needs[1] else None
            grads = _factor_grads(weight_grad_oi, begin_oi, base.row_chunks(x.dtype), needs, out_o, in_i, a_ri, b_or)
        grad_bias = g_to.sum(0) if ctx.needs_input_grad[8] else None
        return grad_x, None, None, None, *grads, grad_bias


def _factor_grads(
    grad_oi: Tensor,
    begin_oi: Tensor | None,
    chunks: Sequence[slice],
    needs: Sequence[bool],
    out_o: Tensor | None,
    in_i: Tensor | None,
    a_ri: Tensor | None,
    b_or: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of out, in, a and b from that of diag(s) W diag(t) + B A, (o, i)."""
    grad_out: Tensor | None = None
    grad_in: Tensor | None = None
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None
    if a_ri is not None and b_or is not None:
        if needs[2]:
            grad_a = (b_or.t().to(grad_oi.dtype, memory_format=torch.contiguous_format) @ grad_oi).to(a_ri.dtype)
        if needs[3]:
            grad_b = (a_ri.to(grad_oi.dtype) @ grad_oi.t()).t().to(b_or.dtype)
    if begin_oi is not None:
        wide = torch.promote_types(grad_oi.dtype, torch.float32)
        out_parts: list[Tensor] = []
        in_sum = torch.zeros(grad_oi.shape[1], dtype=wide, device=grad_oi.device)
        for rows in chunks:
            product_ni = grad_oi[rows].to(wide) * begin_oi[rows]
            out_parts.append((product_ni if in_i is None else product_ni * in_i).sum(1))
            in_sum += (product_ni if out_o is None else product_ni * out_o[rows, None]).sum(0)
        if needs[0] and out_o is not None:
            grad_out = torch.cat(out_parts).to(out_o.dtype)
        if needs[1] and in_i is not None:
            grad_in = in_sum.to(in_i.dtype)
    return grad_out, grad_in, grad_a, grad_b


# ---------------------------------------------------------------------------------------------------------- recomputed

Fold = Callable[[], tuple[Tensor, Tensor | None]]
"""Gives (W' in the layer's own layout, b') by the links' definitions, in ordinary autograd."""


def run_recomputed(x: Tensor, fold: Fold, base: Base, parameters: Sequence[Tensor]) -> Tensor:
    """The layer's own operation on W' by definition; nothing of the size of W is saved between forward and backward."""
    return _Recomputed.apply(x, fold, base, *parameters)  # type: ignore[no-any-return]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fold: Fold, base: Base, *parameters: Tensor) -> Tensor:
        ctx.fold, ctx.base = fold, base
        ctx.save_for_backward(x, *parameters)
        weight, bias_o = fold()
        return base.layout.call(x, weight.to(x.dtype), None if bias_o is None else bias_o.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_(ctx.needs_input_grad[0])
            weight, bias_o = ctx.fold()
            y = ctx.base.layout.call(inner, weight.to(x.dtype), None if bias_o is None else bias_o.to(x.dtype))
        wanted = [
            t
            for t, need in zip([inner, *parameters], [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]], strict=True)
            if need
        ]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        grads = [next(found) if need else None for need in (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])]
        return grads[0], None, None, *grads[1:]
