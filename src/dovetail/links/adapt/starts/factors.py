"""What the starts share: their contract, and the best low rank of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.chains.terms import LowRank

Quantize = Callable[[Tensor], Tensor]
"""Weight (o, i) -> the values that it has once it is the base (`Adapter.decompose`)."""


Choose = Callable[[Tensor, Quantize, int, int], tuple[LowRank | None, LowRank]]
"""Weight (o, i), float32 or float64; quantize; rank; iterations -> what is taken from the weight, None for nothing,
before it becomes the base Q(W - taken), and the low rank B A at the start."""


@dataclass(frozen=True)
class Start:
    """A way to choose the base and a low rank, so that their sum is near the weight.

    choose      the method
    quantizer   whether a quantizer must come before the adapter
    iterations  how often base and low rank are chosen in turn, unless told; 0: the method does not iterate
    """

    choose: Choose
    quantizer: bool
    iterations: int = 0


def best_low_rank(weight_oi: Tensor, rank: int) -> tuple[LowRank, Tensor]:
    """Return the nearest matrix of a rank, by the singular value decomposition, and the distance to it.

    returns  A = sqrt(S) Vᵀ (rank, i) and B = U sqrt(S) (o, rank); the Frobenius norm of W - B A, a scalar
    """
    u, s, vt = torch.linalg.svd(weight_oi, full_matrices=False)
    root = s[:rank].sqrt()
    return LowRank(root[:, None] * vt[:rank], u[:, :rank] * root), torch.linalg.vector_norm(s[rank:])
