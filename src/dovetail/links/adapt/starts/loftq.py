"""`init=loftq`: the adapter starts as the best low rank of the quantizer's error, both chosen in turn.

    repeat T times:   Q_t = Q(W - B_(t-1) A_(t-1)),   B_t A_t = the first r singular triplets of W - Q_t

Source: Li et al. 2023 (LoftQ), algorithm 1; T = 5 as in its experiments. Difference: the iteration with the least error
‖W - Q - B A‖ is kept, which is not always the last one, so more iterations are never worse. With T = 1 the base is
that of the quantizer alone.
"""

from __future__ import annotations

from torch import Tensor

from dovetail.chains.terms import LowRank, without
from dovetail.links.adapt.starts.factors import Quantize, best_low_rank


def loftq(weight_oi: Tensor, quantize: Quantize, rank: int, iterations: int) -> tuple[LowRank | None, LowRank]:
    """Return what is taken before the last quantization, and the best low rank of the error that is left."""
    taken: LowRank | None = None
    best: LowRank | None = None
    found, least = best_low_rank(weight_oi - quantize(weight_oi), rank)
    current = found
    for _ in range(iterations - 1):
        start, (current, error) = current, best_low_rank(weight_oi - quantize(without(weight_oi, current)), rank)
        if bool(error < least):
            taken, best, least = start, current, error
    return taken, found if best is None else best
