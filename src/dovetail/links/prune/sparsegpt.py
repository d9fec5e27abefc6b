"""SparseGPT: prunes column by column; the remaining weights compensate for the pruned ones.

    score = w² / [U]_jj²        U the Cholesky factor of the inverse of the inputs' Gram matrix, w the updated weight

Source: Frantar and Alistarh 2023, §3.2-3.4. In blocks of 128 inputs the weights with the lowest scores over all rows
are pruned, and the later inputs compensate for their error (`links/column_solver.py`). It needs a Gram matrix, that is
some thousands of tokens. It is nearer to the dense layer than `wanda`, most of all at 60 % and more. Where weights are
fine-tuned afterwards, `wanda` takes less time and does not change the remaining weights.
The number of zeros is exact; the authors' code has one more per block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics, Statistic
from dovetail.errors import DovetailError
from dovetail.links.column_solver import factor, reconstruct
from dovetail.links.prune.pattern import SparsityPruner
from dovetail.links.prune.select import keep_pattern, keep_top


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(SparsityPruner):
    """Prunes, and changes the remaining weights.

    damping  share of the Gram matrix's mean diagonal that is added to its diagonal
    """

    damping: float = 0.01

    statistics: ClassVar[frozenset[Statistic]] = frozenset({"gram"})
    moves_weights: ClassVar[bool] = True
    summary: ClassVar[str] = "zeroes input by input, the remaining weights compensate; needs calibration data"
    source: ClassVar[str] = "Frantar and Alistarh 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping <= 1:
            raise self._bad(f"damping={self.damping}", "damping must be in [0, 1]", "set damping=0.01")

    def scores(self, weight_oi: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Return the weights' part of the output, (|w| ‖x‖)², which equals U for uncorrelated inputs."""
        assert inputs is not None
        return (weight_oi.abs().to(torch.float32) * inputs.norm_i).square()

    def prune(self, weight_oi: Tensor, inputs: InputStatistics | None) -> tuple[Tensor, Tensor]:
        assert inputs is not None
        found = factor(inputs, self.damping)
        if found is None:
            raise DovetailError(
                self.name,
                found=f"a Gram matrix of {inputs.tokens} tokens that is singular even with damping 1",
                rule="the inputs' Gram matrix must be invertible",
                fix="add calibration data, or use wanda",
            )
        weight_oi = weight_oi.detach()
        alive_io = (weight_oi != 0).t()
        keep_io = torch.zeros_like(alive_io, memory_format=torch.contiguous_format)
        self.check_width(self.name, weight_oi.shape[1])
        stay, window = self.window or (0, 1)
        rows = weight_oi.shape[0]

        def visit(weight_bo: Tensor, diagonal_b: Tensor, places: slice) -> Callable[[int, Tensor], Tensor]:
            alive_bo, keep_bo, importance_b1 = alive_io[places], keep_io[places], diagonal_b.square()[:, None]
            if self.pattern is None:
                # Differences of rounded totals, so that the layer's number of zeros is exact.
                zeros = round(self.sparsity * places.stop * rows) - round(self.sparsity * places.start * rows)
                scores_bo = _scores(weight_bo, importance_b1, alive_bo)
                keep_bo.copy_(keep_top(scores_bo.view(1, -1), zeros / scores_bo.numel()).view_as(scores_bo))

            def column(j: int, weight_o: Tensor) -> Tensor:
                if self.pattern is not None and j % window == 0:
                    here = slice(j, j + window)
                    scores_wo = _scores(weight_bo[here], importance_b1[here], alive_bo[here])
                    keep_bo[here] = keep_pattern(scores_wo.t(), stay, window).t()
                keep_bo[j] &= alive_bo[j]
                return weight_o * keep_bo[j]

            return column

        new = reconstruct(weight_oi.to(found.lower_ii.dtype), found, visit, window)
        return keep_io.t(), new.to(weight_oi.dtype)


def _scores(weight_bo: Tensor, importance_b1: Tensor, alive_bo: Tensor) -> Tensor:
    """Return w² / U_jj², and a lower score where a weight was zero before, so that it stays zero."""
    return (weight_bo.square() / importance_b1).masked_fill_(~alive_bo, -1)
