"""`init=lqlora`: the weight is a low rank plus a quantized matrix, chosen in turn until the error rises.

    B A = the first r singular triplets of W - Q (of W at first),   Q = Q(W - B A),   until ‖W - Q - B A‖ rises

Source: Guo et al. 2023 (LQ-LoRA), algorithm 1, without the weights from Fisher information (§3.3), which need data, and
with an exact decomposition instead of a randomized one; at most T = 100 iterations, as there. Beside `loftq`: it begins
with the low rank and ends with the quantizer, so that the rest is quantized on a grid of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.chains.terms import LowRank, without
from dovetail.links.adapt.starts.factors import Quantize, best_low_rank


def lqlora(weight_oi: Tensor, quantize: Quantize, rank: int, iterations: int) -> tuple[LowRank, LowRank]:
    """Return the low rank whose rest is quantized best: taken, and given back by the adapter."""
    found, least = best_low_rank(weight_oi, rank)[0], torch.tensor(torch.inf)
    base_oi = torch.zeros_like(weight_oi)
    for _ in range(iterations):
        current, _ = best_low_rank(weight_oi - base_oi, rank)
        rest_oi = without(weight_oi, current)
        base_oi = quantize(rest_oi)
        error = torch.linalg.matrix_norm(rest_oi - base_oi)
        if not bool(error < least):
            break
        found, least = current, error
    return found, found
