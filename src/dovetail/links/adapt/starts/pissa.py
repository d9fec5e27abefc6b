"""`init=pissa`: the adapter starts as the principal part of the weight, and the base is the rest.

    B A = the first r singular triplets of W        base = Q(W - B A), or W - B A without a quantizer

Source: Meng et al. 2024 (PiSSA), eq. 2-4; with a quantizer QPiSSA (§4), without its optional iterations. Idea: training
changes the largest directions of the weight first, and the rest has smaller values, so that quantizing it errs less.
Without a quantizer the model starts as it was, to rounding.
"""

from __future__ import annotations

from torch import Tensor

from dovetail.chains.terms import LowRank
from dovetail.links.adapt.starts.factors import Quantize, best_low_rank


def pissa(weight_oi: Tensor, quantize: Quantize, rank: int, iterations: int) -> tuple[LowRank, LowRank]:
    """Return the principal part: taken, and given back by the adapter."""
    principal, _ = best_low_rank(weight_oi, rank)
    return principal, principal
