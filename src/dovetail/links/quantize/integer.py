"""`int`: integers, rounded to the nearest, with one scale per group of inputs.

Idea: cut each row into groups, spread 2^bits equidistant values over the range of a group, and round each weight to the
nearest. It needs no data and no solver.

    code = clamp(round(w / scale) + zero, 0, 2^bits - 1)            value = (code - zero) * scale

`ranges` computes scales and zero points; without zero points, zero = 2^(bits-1). The scale is rounded to float16
first, so the codes are the nearest for the stored scale; a group whose scale underflows float16 becomes zero. The range
always contains 0, and 0 has a code: a pruned weight stays zero.

Source: the round-to-nearest baseline of GPTQ (Frantar et al. 2022, §3) and SQFT (Munoz et al. 2024, §2.2, eq. 1).
Trade-off: `nf4(double=True)` at 4.13 bits has the error of `int(bits=4)` at 4.31, but no other width and no integer
arithmetic; `fp8` needs no groups; GPTQ finds better codes for the same grid, at the cost of a solver. Size: bits +
16/group bits per weight, and bits/group more for the zero points if asymmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dovetail.chains.grid import refuse_bad_weight
from dovetail.chains.link import added, identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics
from dovetail.links.quantize.affine import AffineQuantizer, AffineWeight


@register("int")
@dataclass(frozen=True)
class Int(AffineQuantizer):
    """Integers of 2, 3, 4 or 8 bits; `group` inputs share a float16 scale (0: one group a row).

    scale_bits  significant bits of a scale, 4 or 7; none: the 11 of a float16 number (`ranges`)
    scales      range: those that span each group; search: those of the least squared error
    """

    scale_bits: int | None = added(None)
    scales: Literal["range", "search"] = added("range")

    summary: ClassVar[str] = "integers of 2, 3, 4 or 8 bits, rounded to nearest, one scale per group"
    source: ClassVar[str] = "round-to-nearest, SQFT §2.2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_scales(self.scale_bits, self.scales)

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> AffineWeight:
        """Return the grid and packed codes of weight_oi (o, i), any float. DovetailError on NaN, inf, overflow."""
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        scale_og, zero_og = self._ranges(weight_32, self.scale_bits, self.scales)
        return AffineWeight.from_scales(weight_32, scale_og, zero_og, bits=self.bits, identity=identity_of(self))
