"""remask: the weight keeps the base's zeros.

    W' = M ⊙ W        M fixed by the pruner; the gradient is masked likewise

Source: SQFT §2.3, eq. 1-2 (SparsePEFT): the sum of a sparse base W^p and a masked update is sparse. Here M multiplies
the whole weight, which is the same for LoRA (the base is zero outside M) and is correct for every other chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.link import Base, Constraint
from dovetail.chains.registry import register


@register("remask")
@dataclass(frozen=True)
class Remask(Constraint):
    """Zero wherever the pruner put a zero."""

    restores: ClassVar[Literal["zeros", "grid"]] = "zeros"
    masks_by_base: ClassVar[bool] = True
    summary: ClassVar[str] = "keeps the pruner's zeros, so that merging loses no sparsity"
    source: ClassVar[str] = "SQFT §2.3"

    def project(self, weight_oi: Tensor, base: Base) -> Tensor:
        # Not a product: a negative weight times zero is -0.0, whose bits are not those of zero.
        return torch.where(base.mask_rows(slice(None)), weight_oi, 0)

    def project_rows_(self, rows_ni: Tensor, start: int, base: Base, grad_ni: Tensor | None = None) -> None:
        self._mask_(rows_ni, start, base)
        if grad_ni is not None:
            self._mask_(grad_ni, start, base)

    def mask_gradient_(self, grad_ni: Tensor, start: int, base: Base) -> None:
        self._mask_(grad_ni, start, base)

    def _mask_(self, rows_ni: Tensor, start: int, base: Base) -> None:
        # A bitwise AND with all ones or zeros: several times faster than `where`, and NaN cannot survive it.
        words = base.mask_words(slice(start, start + rows_ni.shape[0]), rows_ni.dtype)
        rows_ni.view(words.dtype).bitwise_and_(words)
