"""GPTQ: integers on an affine grid, rounded column by column; later columns compensate for the error of each.

    minimise ‖(W - Ŵ)Xᵀ‖²  over Ŵ on the grid, greedily, one input after the other (`links/column_solver.py`)

Source: Frantar et al. 2022, §3. Its outputs are nearer to the layer's than those of `int` on the same grid, most of all
at 2 and 3 bits. It costs a Gram matrix of the layer's inputs and a factorization. Scales and zero points are computed
beforehand, from the original weights. The paper computes a group's scale at its first column, from weights that contain
the earlier errors: measured in groups of 32, this increases the output error by up to a quarter at 2 and 3 bits, and
changes nothing at 4 and 8. With act_order, the default, the inputs of the largest norm are rounded first, which helps
for inputs of uneven size. Codes are stored in the layer's own order in any case.

A zero weight stays exactly zero, and the others compensate. An input that calibration never saw is rounded to the
nearest (the authors' code zeroes its weights). A layer whose Gram matrix is singular even with ten and a hundred times
the damping is rounded to nearest, with a CalibrationWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.grid import refuse_bad_weight
from dovetail.chains.link import added, identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics, Statistic
from dovetail.errors import CalibrationWarning
from dovetail.links.column_solver import factor, reconstruct
from dovetail.links.quantize.affine import AffineQuantizer, AffineWeight


@register("gptq")
@dataclass(frozen=True)
class GPTQ(AffineQuantizer):
    """Integers of 2, 3, 4 or 8 bits; `group` inputs share a float16 scale (0: one group a row).

    act_order   largest inputs first
    damping     share of the Gram matrix's mean diagonal that is added to its diagonal
    scale_bits  significant bits of a scale, 4 or 7; none: the 11 of a float16 number (`ranges`)
    scales      range: those that span each group; search: those of the least squared error
    """

    act_order: bool = True
    damping: float = 0.01
    scale_bits: int | None = added(None)
    scales: Literal["range", "search"] = added("range")

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"gram"})
    summary: ClassVar[str] = "integers, later columns compensate for each rounding error; needs calibration data"
    source: ClassVar[str] = "Frantar et al. 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_scales(self.scale_bits, self.scales)
        if not 0 <= self.damping <= 1:
            raise self._bad(f"damping={self.damping}", "damping must be in [0, 1]", "set damping=0.01")

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> AffineWeight:
        """Return the grid and packed codes of weight_oi (o, i), any float. DovetailError on NaN, inf, overflow."""
        return self._round(weight_oi, inputs, None)

    def quantize_from(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> tuple[AffineWeight, Tensor]:
        """Return the same, and the weights that were rounded, corrected for the errors of earlier columns."""
        rounded = weight_oi.to(torch.float32, copy=True)
        quantized = self._round(weight_oi, inputs, rounded)
        start = rounded.to(weight_oi.dtype)
        values = quantized.dequantize(torch.empty_like(rounded))
        # What a narrow dtype rounds over a boundary starts from the code's own value.
        moved = quantized.snap_(start.to(torch.float32, copy=True).contiguous(), 0) != values
        return quantized, torch.where(moved, values.to(weight_oi.dtype), start)

    def _round(self, weight_oi: Tensor, inputs: InputStatistics | None, rounded_oi: Tensor | None) -> AffineWeight:
        """Return the codes and scales; `rounded_oi`, where given, is filled with the weights that were rounded."""
        assert inputs is not None
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        i = weight_32.shape[1]
        scale_og, zero_og = self._ranges(weight_32, self.scale_bits, self.scales)
        found = factor(inputs, self.damping, by_size=self.act_order)
        if found is None:
            warnings.warn(
                f"{self.name}: the Gram matrix of {inputs.tokens} tokens is singular; a layer was rounded to nearest. "
                "Add calibration data.",
                CalibrationWarning,
                stacklevel=2,
            )
        else:
            nearest = _on_grid(scale_og, zero_og, self.bits)
            order, group = found.order_i, i // scale_og.shape[1]
            stays_io = (weight_32 != 0)[:, order].t() if bool((weight_32 == 0).any()) else None

            def visit(weight_bo: Tensor, diagonal_b: Tensor, places: slice) -> Callable[[int, Tensor], Tensor]:
                columns: list[int] = order[places].tolist()
                stays_bo = None if stays_io is None else stays_io[places].to(weight_bo.dtype)

                def column(j: int, weight_o: Tensor) -> Tensor:
                    wanted = weight_o if stays_bo is None else weight_o * stays_bo[j]
                    if rounded_oi is not None:
                        rounded_oi[:, columns[j]] = wanted
                    return nearest(columns[j] // group, wanted)

                return column

            weight_32 = reconstruct(weight_32.to(found.lower_ii.dtype), found, visit).to(torch.float32)
        return AffineWeight.from_scales(weight_32, scale_og, zero_og, bits=self.bits, identity=identity_of(self))


def _on_grid(scale_og: Tensor, zero_og: Tensor | None, bits: int) -> Callable[[int, Tensor], Tensor]:
    """Return a function of a group's number and weights (o,) that gives the nearest grid values, a new tensor."""
    scale_go = scale_og.t().float().contiguous()
    step_go = scale_go.masked_fill(scale_go == 0, torch.inf)
    if zero_og is None:
        half = 2 ** (bits - 1)
        return lambda g, weight_o: (weight_o / step_go[g]).round_().clamp_(-half, half - 1).mul_(scale_go[g])
    zero_go = zero_og.t().contiguous()

    def nearest(g: int, weight_o: Tensor) -> Tensor:
        code_o = (weight_o / step_go[g]).round_().add_(zero_go[g])
        return code_o.clamp_(0, 2**bits - 1).sub_(zero_go[g]).mul_(scale_go[g])

    return nearest
