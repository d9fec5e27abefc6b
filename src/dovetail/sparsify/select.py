"""What pruners share: the check of a sparsity, and keeping the best-scored weights exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.errors import ChainError


def check_sparsity(method: str, sparsity: float) -> None:
    """ChainError unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ChainError(
            method, found=f"sparsity={sparsity}", rule="sparsity, the fraction of zeros, lies in [0, 1)", fix="0.5"
        )


def keep_top(scores_gn: Tensor, sparsity: float) -> Tensor:
    """Keeps all but the round(sparsity · n) lowest scores of each row, exactly; among equal scores the first ones go.

    scores_gn  (groups, n) any float dtype
    returns    (groups, n) bool, True where a weight stays
    """
    n = scores_gn.shape[1]
    zeros = round(sparsity * n)
    keep = torch.ones_like(scores_gn, dtype=torch.bool)
    if zeros:
        lowest = torch.sort(scores_gn, dim=1, stable=True).indices[:, :zeros]
        keep.scatter_(1, lowest, False)
    return keep
