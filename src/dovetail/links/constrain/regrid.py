"""regrid: the weight stays on the base's quantization grid.

    W' = Q⁻¹(Q(W)) with the base's scales and zero points; straight-through gradient, zero where the range clips

Source: SQFT §2.4, eq. 3-4 (QA-SparsePEFT), there for affine INT4; here for every grid: affine, NF4/FP4 code books
with double quantization, FP8. Two forms:
- start="weights": W starts from the full-precision weights (eq. 3), which are kept while training. A small update
  changes the codes of weights near a boundary. Over a quantizer that changes weights before it rounds them (GPTQ), W
  starts from the changed weights, so that training starts at its codes.
- start="codes": W starts from the quantized weights. The model before tuning is exactly the quantized model and no
  full-precision copy is held; an update takes effect only once it crosses half a step.
Measured (docs/sqft.md): "weights", the default, is ahead in short trainings and level in long ones at a fixed rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import has_values
from dovetail.chains.link import Base, Constraint
from dovetail.chains.registry import register

if TYPE_CHECKING:
    from dovetail.chains.grid import QuantizedWeight


@register("regrid")
@dataclass(frozen=True)
class Regrid(Constraint):
    """Back onto the grid.

    start  what the chain's weight starts from: the full-precision "weights" or the quantized "codes"
    """

    start: Literal["weights", "codes"] = "weights"

    restores: ClassVar[Literal["zeros", "grid"]] = "grid"
    # In bf16, rounding would flip more codes than the adapter moves (DESIGN.md §3).
    float32: ClassVar[bool] = True
    lists_blocked: ClassVar[bool] = True  # where the range clips
    summary: ClassVar[str] = "keeps the quantizer's grid, so that merging stays at its bits without loss"
    source: ClassVar[str] = "SQFT §2.4"

    @property
    def from_codes(self) -> bool:
        return self.start == "codes"

    def project(self, weight_oi: Tensor, base: Base) -> Tensor:
        assert base.quantized is not None
        return _Snap.apply(weight_oi, base.quantized)  # type: ignore[no-any-return]

    def project_rows_(self, rows_ni: Tensor, start: int, base: Base, grad_ni: Tensor | None = None) -> None:
        assert base.quantized is not None
        if grad_ni is None:
            base.quantized.snap_(rows_ni, start)
            return
        inside = base.take("inside", tuple(rows_ni.shape), torch.bool)
        base.quantized.snap_(rows_ni, start, inside)
        # Mostly nothing is clipped, and a minimum over bytes is much cheaper than a product with booleans.
        if not bool(inside.view(torch.uint8).amin()):
            grad_ni.mul_(inside.to(grad_ni.dtype))

    def project_listing_(self, rows_ni: Tensor, start: int, base: Base) -> Tensor | None:
        assert base.quantized is not None
        inside = base.take("inside", tuple(rows_ni.shape), torch.bool)
        base.quantized.snap_(rows_ni, start, inside)
        if not has_values(rows_ni) or bool(inside.view(torch.uint8).amin()):
            return None
        blocked = inside.logical_not_().view(-1)
        if blocked.device.type == "cpu":  # numpy finds few of many several times as fast
            return torch.from_numpy(np.flatnonzero(blocked.numpy()))
        return blocked.nonzero()[:, 0]


class _Snap(torch.autograd.Function):
    """Nearest grid value; straight-through gradient inside the grid's range."""

    @staticmethod
    def forward(ctx: Any, weight_oi: Tensor, quantized: QuantizedWeight) -> Tensor:
        wide = torch.float64 if weight_oi.dtype == torch.float64 else torch.float32
        rows = weight_oi.detach().to(wide, copy=True, memory_format=torch.contiguous_format)
        inside = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
        quantized.snap_(rows, 0, inside)
        ctx.save_for_backward(inside)
        return rows.to(weight_oi.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None
