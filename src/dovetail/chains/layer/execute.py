"""The three ways of running a chain: open, closed and recomputed (`chains/layer/planner.py`).

Precision: factors are kept in float32 and cast to the weight's dtype when used; x is never cast. A scale s is applied
as x + x·(s - 1): the second term keeps its digits in bfloat16, where s itself would be rounded to 1/128. The sum is
rounded once.
Shapes: t o i r = token, out, in, rank. Thin products have r as their first axis, the fast layout on CPUs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.chains.layer.base import Base
from dovetail.chains.layer.operators import numbered, operator
from dovetail.chains.layer.planner import Factors, affine_, casts
from dovetail.chains.link import Constraint
from dovetail.chains.terms import Form

_FEW = 256
"""Up to one weight in so many without a gradient is corrected for, instead of computing the gradient of W'."""
_CORRECTED = 2**22
"""Products of a gradient and an input that are held at once while correcting."""

# ---------------------------------------------------------------------------------------------------------------- open


def run_open(x: Tensor, form: Form, base: Base) -> Tensor:
    """y = x W'ᵀ + b' for W' = diag(s) W diag(t) + B A. x (..., i) in the weight's dtype."""
    a_ri, b_ro, out_o, in_i = _factors(form, x.dtype)
    bias_o = None if form.bias_o is None else form.bias_o.to(x.dtype)
    y_to = _Open.apply(x, base, a_ri, b_ro, out_o, in_i, bias_o)
    y = y_to.view(*x.shape[:-1], y_to.shape[1])  # outside: a Function's view cannot be changed in place (y += x)
    for probability, a, b in form.dropped:
        u = functional.linear(functional.dropout(x, probability), a.to(x.dtype))
        y = y + functional.linear(u, b.to(x.dtype))
    return y


_STEPS = 4
"""Rows of a batch up to which a step of generation is faster from codes than from the weight that they are read to."""


@torch.no_grad()
def run_step(x: Tensor, form: Form, base: Base) -> Tensor | None:
    """Return what `run_open` does for one token of each row, x (b, 1, i), as generation asks, straight from codes.

    The sums are taken in float32 in an order of their own, so the last digits differ from those of `run_open`, as
    torch's products of one vector differ from its products of many; in 16 bits the weights are not rounded to the
    dtype either, the result is. Longer inputs, training and experts, which take
    any number of tokens, are `run_open`'s. None where there is no such product.
    """
    one = x.ndim == 3 and x.shape[1] == 1 and len(x) <= _STEPS
    if not one or base.quantized is None or form.dropped or not base.layout.linear or x.dtype == torch.float64:
        return None
    x_ti = x[:, 0].float()
    a_ri, b_ro, out_o, in_i = _factors(form, torch.float32)
    y_to = base.quantized.product(x_ti if in_i is None else torch.addcmul(x_ti, x_ti, in_i))
    if y_to is None:
        return None
    if out_o is not None:
        y_to = torch.addcmul(y_to, y_to, out_o)
    if a_ri is not None and b_ro is not None:
        y_to = y_to + (x_ti @ a_ri.t()) @ b_ro
    if form.bias_o is not None:
        y_to = y_to + form.bias_o.float()
    return y_to.to(x.dtype)[:, None]


def _factors(form: Form, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return a (r, i), b (r, o), s - 1 (o,), t - 1 (i,), cast to `dtype`."""
    return (
        None if form.a_ri is None else form.a_ri.to(dtype),
        None if form.b_or is None else form.b_or.t().to(dtype, memory_format=torch.contiguous_format),
        None if form.out_scale_o is None else (form.out_scale_o - 1).to(dtype),
        None if form.in_scale_i is None else (form.in_scale_i - 1).to(dtype),
    )


def _product(base: Base, x_ti: Tensor, bias_o: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, (t, o), in x's dtype."""
    if base.quantized is not None and torch.compiler.is_compiling():
        return torch.ops.dovetail.product(x_ti, base.number, bias_o)  # type: ignore[no-any-return]
    weight_oi = base.layout.matrix(base.native(x_ti.dtype))
    return x_ti @ weight_oi.t() if bias_o is None else torch.addmm(bias_o, x_ti, weight_oi.t())


def _pulled(base: Base, g_to: Tensor) -> Tensor:
    """Return g W, (t, i), in g's dtype."""
    if base.quantized is not None and torch.compiler.is_compiling():
        return torch.ops.dovetail.pulled(g_to, base.number)  # type: ignore[no-any-return]
    return g_to @ base.layout.matrix(base.native(g_to.dtype))


@operator(
    "product(Tensor x_ti, int base, Tensor? bias_o) -> Tensor",
    lambda x_ti, number, _: x_ti.new_empty(x_ti.shape[0], numbered(number).shape[0]),
)
def _product_by_number(x_ti: Tensor, number: int, bias_o: Tensor | None) -> Tensor:
    return _product(numbered(number), x_ti, bias_o)


@operator(
    "pulled(Tensor g_to, int base) -> Tensor",
    lambda g_to, number: g_to.new_empty(g_to.shape[0], numbered(number).shape[1]),
)
def _pulled_by_number(g_to: Tensor, number: int) -> Tensor:
    return _pulled(numbered(number), g_to)


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
        scaled_ti = x_ti if in_i is None else torch.addcmul(x_ti, x_ti, in_i)
        y_to = _product(base, scaled_ti, bias_o if out_o is None else None)
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
        return y_to

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_to: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_ti, a_ri, b_ro, out_o, in_i, u_rt, product_to = ctx.saved_tensors
        need_x, _, need_a, need_b, need_out, need_in, need_bias = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_out = grad_in = grad_bias = None
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
            grad_ti = _pulled(ctx.base, g_to if out_o is None else torch.addcmul(g_to, g_to, out_o))
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


class Layer(Protocol):
    """What the closed and the recomputed path read of a layer (`chains/layer/linear.py`)."""

    number: int
    base: Base
    constraints: list[Constraint]
    from_codes: bool

    def key(self, dtype: torch.dtype) -> Hashable:
        """Return what W' is made from: it is kept in `base.kept`, and made again only where the key is another one.

        None: it is not kept.
        """
        ...

    def parameters_of_weight(self) -> list[Tensor]:
        """Return the parameters that W' and b' are made from."""
        ...

    def native_fold(self) -> tuple[Tensor, Tensor | None]:
        """Return (W' in the layer's own layout, b') by the links' definitions, in ordinary autograd."""
        ...


def run_closed(x: Tensor, form: Form, layer: Layer) -> Tensor:
    """y = x W'ᵀ + b' for W' = constraints(diag(s) W diag(t) + B A). x (..., i) in the weight's dtype."""
    bias_o = None if form.bias_o is None else form.bias_o.to(x.dtype)
    factors = casts(form, work_dtype(x.dtype, layer.constraints))
    return _Closed.apply(x, layer, bias_o, *factors)  # type: ignore[no-any-return]


def work_dtype(dtype: torch.dtype, constraints: Sequence[Constraint]) -> torch.dtype:
    """Return the dtype the weight is computed in: its own, or float32 where a constraint requires it."""
    if dtype != torch.float64 and any(constraint.float32 for constraint in constraints):
        return torch.float32
    return dtype


def materialise(
    form: Form, base: Base, constraints: Sequence[Constraint], from_codes: bool, dtype: torch.dtype
) -> Tensor:
    """Compute W' in the layer's own layout, in the shared buffer: to be used before the next call.

    The forward pass and `merge` both read W' from here, so merging is exact.
    """
    return _materialise(base, constraints, from_codes, dtype, casts(form, work_dtype(dtype, constraints)))


def lists_gradient(constraints: Sequence[Constraint]) -> bool:
    """Return whether the gradient's way back through the constraints is known without projecting the weight again."""
    return all(constraint.lists_blocked or constraint.masks_by_base for constraint in constraints)


def kept(
    base: Base,
    constraints: Sequence[Constraint],
    from_codes: bool,
    factors: Factors,
    key: Hashable,
) -> Tensor:
    """Return W' in the layer's own layout from `base.kept`, made first where it is of another key."""
    assert base.kept is not None
    if base.kept_key != key:
        base.forget()
        _materialise(base, constraints, from_codes, base.kept.dtype, factors, blocked=base.blocked, native=base.kept)
        base.kept_key = key
    return base.kept


@torch.no_grad()
def _materialise(
    base: Base,
    constraints: Sequence[Constraint],
    from_codes: bool,
    dtype: torch.dtype,
    factors: Factors,
    grad_oi: Tensor | None = None,
    blocked: list[Tensor] | None = None,
    native: Tensor | None = None,
) -> Tensor:
    """Compute W' in the shared buffer, or in `native`, one chunk of rows after the other.

    A gradient of W', where given, is pulled back through the constraints, in place: each is a mask that depends on the
    values it projects, so their order does not matter. `blocked`, where given, receives the places in W' (o, i), flat,
    where the constraints that list them pass no gradient.
    """
    out_o, in_i, a_ri, b_or = factors
    work = work_dtype(dtype, constraints)
    begin_oi = base.start_weight(from_codes, work)
    if native is None:
        native = base.buffer(dtype, "weight")
    target_oi = base.layout.matrix(native)
    direct = work == dtype and begin_oi.dtype == dtype and target_oi.is_contiguous() and out_o is None and in_i is None
    for rows in base.row_chunks(work):
        if direct and a_ri is not None and b_or is not None:
            part_ni = torch.addmm(begin_oi[rows], b_or[rows], a_ri, out=target_oi[rows])
        else:
            part_ni = base.take("rows", (rows.stop - rows.start, base.shape[1]), work)
            part_ni.copy_(begin_oi[rows])
            affine_(part_ni, rows, factors)
        for constraint in constraints:
            if blocked is None or not constraint.lists_blocked:
                constraint.project_rows_(part_ni, rows.start, base, None if grad_oi is None else grad_oi[rows])
            elif (places := constraint.project_listing_(part_ni, rows.start, base)) is not None:
                blocked.append(places + rows.start * base.shape[1])
        if part_ni.data_ptr() != target_oi[rows].data_ptr():
            target_oi[rows].copy_(part_ni)
    return native


class _Closed(torch.autograd.Function):
    """The Function of the closed path. It saves x and the factors, and makes W' in forward and in backward.

    Where W' is kept, it is made once for both, and for all batches until something that it is made from changes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, bias_o: Tensor | None, *factors: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *factors)
        if torch.compiler.is_compiling():
            return torch.ops.dovetail.closed(x, layer.number, bias_o, factors)  # type: ignore[no-any-return]
        ctx.key = layer.key(x.dtype)
        return _closed(x, layer, ctx.key, bias_o, factors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        needs = [need for at, need in enumerate(ctx.needs_input_grad) if at != 1]
        if torch.compiler.is_compiling():
            found = iter(torch.ops.dovetail.closed_back(grad, x, ctx.layer.number, factors, needs))
        else:
            found = iter(_closed_back(grad, x, ctx.layer, ctx.key, factors, needs))
        grad_x, *grads = (next(found) if need else None for need in needs)
        return grad_x, None, *grads


def _closed(x: Tensor, layer: Layer, key: Hashable, bias_o: Tensor | None, factors: Factors) -> Tensor:
    base = layer.base
    if key is None:
        native = _materialise(base, layer.constraints, layer.from_codes, x.dtype, factors)
    else:
        native = kept(base, layer.constraints, layer.from_codes, factors, key)
    return _no_view(base.layout.call(x, native, bias_o))


def _closed_back(
    grad: Tensor, x: Tensor, layer: Layer, key: Hashable, factors: Factors, needs: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of those of x, b' and the four factors that need one, in this order."""
    base, constraints, from_codes = layer.base, layer.constraints, layer.from_codes
    g_to, x_ti = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    need_x, need_bias, *need = needs
    listed = any(need) and lists_gradient(constraints)
    weight_grad_oi = _weight_grad(g_to, x_ti, base) if any(need) and not listed else None
    blocked: list[Tensor] = []
    if key is not None and base.kept is not None and base.kept_key == key:
        native, blocked = base.kept, base.blocked
    else:
        into = blocked if listed else None
        native = _materialise(base, constraints, from_codes, x.dtype, factors, weight_grad_oi, into)
    grad_x = (g_to @ base.layout.matrix(native)).view(x.shape) if need_x else None
    grads: tuple[Tensor | None, ...] = (None, None, None, None)
    few = sum(map(len, blocked)) * _FEW < native.numel()
    if listed and few and not (need[0] or need[1]) and all(each.lists_blocked for each in constraints):
        grads = _low_rank_grads(g_to, x_ti, factors, blocked)
    elif any(need):
        if weight_grad_oi is None:
            weight_grad_oi = _masked(_weight_grad(g_to, x_ti, base), base, constraints, blocked)
        begin_oi = base.start_weight(from_codes, x.dtype) if need[0] or need[1] else None
        grads = _factor_grads(weight_grad_oi, begin_oi, base.row_chunks(x.dtype), need, factors)
    grad_bias = g_to.sum(0) if need_bias else None
    found = zip((grad_x, grad_bias, *grads), needs, strict=True)
    return [tensor for tensor, needed in found if needed and tensor is not None]


@operator(
    "closed(Tensor x, int layer, Tensor? bias_o, Tensor?[] factors) -> Tensor",
    lambda x, number, *_: x.new_empty(*x.shape[:-1], numbered(number).base.shape[0]),
)
def _closed_by_number(x: Tensor, number: int, bias_o: Tensor | None, factors: Factors) -> Tensor:
    layer: Layer = numbered(number)
    return _closed(x, layer, layer.key(x.dtype), bias_o, factors).contiguous()


def _empty_grads(_: Tensor, x: Tensor, number: int, factors: Factors, needs: Sequence[bool]) -> list[Tensor]:
    bias_o = x.new_empty(numbered(number).base.shape[0])
    found = zip((x, bias_o, *factors), needs, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, needed in found if needed and tensor is not None]


@operator("closed_back(Tensor grad, Tensor x, int layer, Tensor?[] factors, bool[] needs) -> Tensor[]", _empty_grads)
def _closed_back_by_number(
    grad: Tensor, x: Tensor, number: int, factors: Factors, needs: Sequence[bool]
) -> list[Tensor]:
    layer: Layer = numbered(number)
    return [each.contiguous() for each in _closed_back(grad, x, layer, layer.key(x.dtype), factors, needs)]


def _weight_grad(g_to: Tensor, x_ti: Tensor, base: Base) -> Tensor:
    """Return the gradient of W', (o, i), in a shared buffer."""
    # gᵀ contiguous: on some processors the product that follows is a third faster.
    return torch.mm(g_to.t().contiguous(), x_ti, out=base.take("gradient", base.shape, x_ti.dtype))


def _masked(grad_oi: Tensor, base: Base, constraints: Sequence[Constraint], blocked: Sequence[Tensor]) -> Tensor:
    """Pull a gradient of W' back through the constraints, in place, and return it."""
    for constraint in constraints:
        if constraint.masks_by_base:
            for rows in base.row_chunks(grad_oi.dtype):
                constraint.mask_gradient_(grad_oi[rows], rows.start, base)
    for places in blocked:
        grad_oi.view(-1)[places] = 0
    return grad_oi


def _no_view(y: Tensor) -> Tensor:
    """Return the same values as no view of another tensor: a Function's view cannot be changed in place (y += x)."""
    return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]


def _low_rank_grads(
    g_to: Tensor, x_ti: Tensor, factors: Factors, blocked: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a and b, without that of W': those of a plain B A, less what passes nothing.

    blocked  the places in W' (o, i), flat, where no gradient passes
    """
    _, _, a_ri, b_or = factors
    assert a_ri is not None
    assert b_or is not None
    wide = x_ti.dtype
    a, b = a_ri.to(wide), b_or.to(wide)
    grad_a = ((b.t() @ g_to.t()) @ x_ti).to(a_ri.dtype)
    grad_b = (g_to.t() @ (x_ti @ a.t())).to(b_or.dtype)
    for places in blocked:
        for part in places.split(max(1, _CORRECTED // len(g_to))):
            o_k, i_k = part // x_ti.shape[1], part % x_ti.shape[1]
            grad_k = (g_to[:, o_k] * x_ti[:, i_k]).sum(0).to(a_ri.dtype)
            grad_a.index_add_(1, i_k, b_or[o_k].t() * grad_k, alpha=-1)
            grad_b.index_add_(0, o_k, grad_k[:, None] * a_ri.t()[i_k], alpha=-1)
    return None, None, grad_a, grad_b


def _factor_grads(
    grad_oi: Tensor,
    begin_oi: Tensor | None,
    chunks: Sequence[slice],
    needs: Sequence[bool],
    factors: Factors,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of out, in, a and b from that of diag(s) W diag(t) + B A, (o, i)."""
    out_o, in_i, a_ri, b_or = factors
    grad_out = grad_in = grad_a = grad_b = None
    if a_ri is not None and b_or is not None:
        if needs[2]:
            grad_a = (b_or.t().to(grad_oi.dtype, memory_format=torch.contiguous_format) @ grad_oi).to(a_ri.dtype)
        if needs[3]:
            grad_b = (a_ri.to(grad_oi.dtype) @ grad_oi.t()).t().to(b_or.dtype)
    if begin_oi is not None:
        wide = torch.promote_types(grad_oi.dtype, torch.float32)
        out_sum = torch.zeros(grad_oi.shape[0], dtype=wide, device=grad_oi.device)
        in_sum = torch.zeros(grad_oi.shape[1], dtype=wide, device=grad_oi.device)
        for rows in chunks:
            product_ni = grad_oi[rows].to(wide) * begin_oi[rows]
            out_sum[rows] = (product_ni if in_i is None else product_ni * in_i).sum(1)
            in_sum += (product_ni if out_o is None else product_ni * out_o[rows, None]).sum(0)
        if needs[0] and out_o is not None:
            grad_out = out_sum.to(out_o.dtype)
        if needs[1] and in_i is not None:
            grad_in = in_sum.to(in_i.dtype)
    return grad_out, grad_in, grad_a, grad_b


# ---------------------------------------------------------------------------------------------------------- recomputed


def run_recomputed(x: Tensor, layer: Layer) -> Tensor:
    """Run the layer on W' by definition; save nothing of the size of W between forward and backward."""
    return _Recomputed.apply(x, layer, *layer.parameters_of_weight())  # type: ignore[no-any-return]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        if torch.compiler.is_compiling():
            return torch.ops.dovetail.recomputed(x, layer.number, parameters)  # type: ignore[no-any-return]
        return _no_view(_by_definition(x, layer))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        needs = [need for at, need in enumerate(ctx.needs_input_grad) if at != 1]
        if torch.compiler.is_compiling():
            found = iter(torch.ops.dovetail.recomputed_back(grad, x, ctx.layer.number, parameters, needs))
        else:
            found = iter(_recomputed_back(grad, x, ctx.layer, parameters, needs))
        grad_x, *grads = (next(found) if need else None for need in needs)
        return grad_x, None, *grads


def _by_definition(x: Tensor, layer: Layer) -> Tensor:
    weight, bias_o = layer.native_fold()
    return layer.base.layout.call(x, weight.to(x.dtype), None if bias_o is None else bias_o.to(x.dtype))


def _recomputed_back(
    grad: Tensor, x: Tensor, layer: Layer, parameters: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of those of x and the parameters that need one; None for what the output does not read."""
    with torch.enable_grad():
        inner = x.detach().requires_grad_(needs[0])
        y = _by_definition(inner, layer)
    wanted = [tensor for tensor, need in zip([inner, *parameters], needs, strict=True) if need]
    return list(torch.autograd.grad(y, wanted, grad, allow_unused=True))


@torch.no_grad()
def _empty_output(x: Tensor, number: int, _: Sequence[Tensor]) -> Tensor:
    layer: Layer = numbered(number)
    return layer.base.layout.call(x, layer.base.layout.empty(x.dtype, x.device), None).contiguous()


@operator("recomputed(Tensor x, int layer, Tensor[] parameters) -> Tensor", _empty_output)
@torch.no_grad()
def _recomputed_by_number(x: Tensor, number: int, _: Sequence[Tensor]) -> Tensor:
    return _no_view(_by_definition(x, numbered(number)).contiguous())


@operator(
    "recomputed_back(Tensor grad, Tensor x, int layer, Tensor[] parameters, bool[] needs) -> Tensor[]",
    lambda _, x, number, parameters, needs: [
        tensor.new_empty(tensor.shape) for tensor, need in zip([x, *parameters], needs, strict=True) if need
    ],
)
def _recomputed_back_by_number(
    grad: Tensor, x: Tensor, number: int, parameters: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    layer: Layer = numbered(number)
    own = layer.parameters_of_weight()  # of which `native_fold` makes W': a compiled graph has its own tensors for them
    found = _recomputed_back(grad, x, layer, own, needs)
    wanted = [tensor for tensor, need in zip([x, *own], needs, strict=True) if need]
    return [
        torch.zeros_like(like) if tensor is None else tensor.contiguous()
        for tensor, like in zip(found, wanted, strict=True)
    ]
