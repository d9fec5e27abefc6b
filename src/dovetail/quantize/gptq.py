"""GPTQ: integers on an affine grid, rounded column by column; the columns still to come make up for each error.

    minimise ‖(W - Ŵ)Xᵀ‖²  over Ŵ on the grid, greedily, one input after the other (`dovetail.reconstruct`)

Source: Frantar et al. 2022, §3. Nearer to the layer's outputs than `int` on the same grid, most of all at 2 and 3 bits;
costs a Gram matrix of the layer's inputs and a factorisation. Each group's scale is made from its weights as they are
when the first of its columns is reached. act_order: the inputs of the largest norm are rounded first, with scales made
beforehand from the original weights ("static groups"), so that the codes are stored in the layer's own order and cost
nothing to read; it is the default, being nearer on inputs of uneven size.

A weight that is zero before stays exactly zero, and the others make up for it. An input that calibration never saw is
rounded to the nearest (the authors' code zeroes its weights). Where the Gram matrix is singular even with ten and a
hundred times the damping, the layer is rounded to nearest, with a CalibrationWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chain.link import register
from dovetail.errors import CalibrationWarning
from dovetail.input_statistics import InputStatistics
from dovetail.quantize.affine import AffineQuantizer, AffineWeight, affine_range
from dovetail.quantize.storage import identity_of, refuse_bad_weight
from dovetail.reconstruct import factor, reconstruct


@register("gptq")
@dataclass(frozen=True)
class GPTQ(AffineQuantizer):
    """Integers of 2, 3, 4 or 8 bits; `group` inputs share a float16 scale (0: one group a row).

    act_order  largest inputs first
    damping    share of the Gram matrix's mean diagonal that is added to its diagonal
    """

    act_order: bool = True
    damping: float = 0.01

    calibrated: ClassVar[bool] = True
    needs_gram: ClassVar[bool] = True
    summary: ClassVar[str] = "integers, each column's rounding error made up for by the next; needs calibration data"
    source: ClassVar[str] = "Frantar et al. 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise self._bad(f"damping={self.damping}", "damping lies in [0, 1]", "damping=0.01")

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> AffineWeight:
        """The grid and packed codes of weight_oi (o, i), any float. Raises DovetailError on NaN, inf, overflow."""
        return self._round(weight_oi, inputs, None)

    def quantize_from(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> tuple[AffineWeight, Tensor]:
        """The same, and the weights as they were when their column was reached, the errors before it made up for."""
        rounded = weight_oi.to(torch.float32, copy=True)
        quantized = self._round(weight_oi, inputs, rounded)
        start = rounded.to(weight_oi.dtype)
        values = quantized.dequantize(torch.empty_like(rounded))
        # What a narrow dtype rounds over a boundary starts from the code's own value.
        moved = quantized.snap_(start.to(torch.float32, copy=True).contiguous(), 0) != values
        return quantized, torch.where(moved, values.to(weight_oi.dtype), start)

    def _round(self, weight_oi: Tensor, inputs: InputStatistics | None, rounded_oi: Tensor | None) -> AffineWeight:
        """Codes and scales; `rounded_oi`, where given, is filled with what was rounded."""
        assert inputs is not None
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        i = weight_32.shape[1]
        groups = self._groups(i, self.name)
        scale_og, zero_og = affine_range(weight_32, groups, bits=self.bits, symmetric=self.symmetric, where=self.name)
        found = factor(inputs, self.damping, by_size=self.act_order)
        if found is None:
            warnings.warn(
                f"{self.name}: the Gram matrix of {inputs.tokens} tokens is singular; a layer was rounded to nearest. "
                "More calibration data mends it.",
                CalibrationWarning,
                stacklevel=2,
            )
        else:
            grid = _Grid(scale_og, zero_og, i // groups, self.bits, fixed=self.act_order or groups == 1)
            order = found.order_i
            stays_io = (weight_32 != 0)[:, order].t() if bool((weight_32 == 0).any()) else None

            def visit(weight_bo: Tensor, diagonal_b: Tensor, places: slice) -> Callable[[int, Tensor], Tensor]:
                columns: list[int] = order[places].tolist()
                stays_bo = None if stays_io is None else stays_io[places].to(weight_bo.dtype)

                def column(j: int, weight_o: Tensor) -> Tensor:
                    grid.begin(columns[j], weight_bo, j)
                    wanted = weight_o if stays_bo is None else weight_o * stays_bo[j]
                    if rounded_oi is not None:
                        rounded_oi[:, columns[j]] = wanted
                    return grid.nearest(columns[j], wanted)

                return column

            together = 1 if grid.fixed else i // groups
            weight_32 = reconstruct(weight_32.to(found.lower_ii.dtype), found, visit, together).to(torch.float32)
        return AffineWeight.from_scales(weight_32, scale_og, zero_og, bits=self.bits, identity=identity_of(self))


class _Grid:
    """The scales while columns are visited: fixed, or made anew where a group begins.

    scale_og, zero_og   of the original weights, replaced in place unless `fixed`
    """

    def __init__(self, scale_og: Tensor, zero_og: Tensor | None, group: int, bits: int, *, fixed: bool) -> None:
        self.scale_og, self.zero_og, self.group, self.bits, self.fixed = scale_og, zero_og, group, bits, fixed
        self._prepare()

    def _prepare(self) -> None:
        scale = self.scale_og.t().contiguous().float()
        self._scale_go = scale
        self._step_go = scale.masked_fill(scale == 0, torch.inf)
        self._zero_go = None if self.zero_og is None else self.zero_og.t().contiguous()
        half = 2 ** (self.bits - 1)
        self._low, self._high = (-half, half - 1) if self.zero_og is None else (0, 2**self.bits - 1)

    def begin(self, column: int, weight_bo: Tensor, j: int) -> None:
        """Makes a group's scales from its weights as they are now, where `column` is its first."""
        if self.fixed or column % self.group:
            return
        g = column // self.group
        now_oi = weight_bo[j : j + self.group].t().to(torch.float32).contiguous()
        scale, zero = affine_range(now_oi, 1, bits=self.bits, symmetric=self.zero_og is None, where="gptq")
        self.scale_og[:, g] = scale[:, 0]
        self._scale_go[g] = scale[:, 0].float()
        self._step_go[g] = self._scale_go[g].masked_fill(self._scale_go[g] == 0, torch.inf)
        if zero is not None and self.zero_og is not None and self._zero_go is not None:
            self.zero_og[:, g] = zero[:, 0]
            self._zero_go[g] = zero[:, 0]

    def nearest(self, column: int, weight_o: Tensor) -> Tensor:
        """The nearest values on the grid of that column, (o,)."""
        g = column // self.group
        code = (weight_o / self._step_go[g]).round_()
        if self._zero_go is None:
            return code.clamp_(self._low, self._high).mul_(self._scale_go[g])
        zero = self._zero_go[g]
        return code.add_(zero).clamp_(self._low, self._high).sub_(zero).mul_(self._scale_go[g])
