"""Magnitude pruning: zeroes the smallest weights.

    score = |W|, compared within the layer, or within each output row

Source: Han et al. 2015. It needs no data. At 50% and more it loses much more quality than Wanda.
"""

from __future__ import annotations

from torch import Tensor

from dovetail.links.prune.scored import scoring


def magnitude_scores(weight_oi: Tensor) -> Tensor:
    """Return the importance of each weight: |W[o,i]|. (out, in), the weight's dtype."""
    return weight_oi.abs()


Magnitude = scoring(
    "magnitude", per="layer", calibrated=False, summary="zeroes the smallest weights", source="Han et al. 2015"
)(magnitude_scores)
