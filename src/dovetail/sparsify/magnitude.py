"""Magnitude pruning: the smallest weights go.

    score = |W|, compared within the layer, or within each output row

Source: Han et al. 2015. Needs no data; at 50% and more it costs much more quality than Wanda, which it is the
baseline for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dovetail.chain.link import Pruner, first, register
from dovetail.sparsify.select import check_sparsity, keep_top


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Pruner):
    """Prunes by |W|.

    sparsity  fraction of zeros
    per       weights are compared within the "layer" or within each output "row"
    """

    sparsity: float = first(0.5)
    per: Literal["layer", "row"] = "layer"

    summary: ClassVar[str] = "zeroes the smallest weights"
    source: ClassVar[str] = "Han et al. 2015"

    def __post_init__(self) -> None:
        check_sparsity(self.name, self.sparsity)

    def keep(self, weight_oi: Tensor, input_norm_i: Tensor | None) -> Tensor:
        scores = weight_oi.abs()
        groups = scores if self.per == "row" else scores.reshape(1, -1)
        return keep_top(groups, self.sparsity).view_as(weight_oi)
