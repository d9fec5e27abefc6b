"""Wanda: the importance of a weight is its size times the size of its input.

    score = |W[o, i]| · ‖x_i‖₂, compared within each output row

Source: Sun et al. 2023, eq. 1 and §3 (per-output comparison group). One pass over a little calibration data, no weight
update; much better than magnitude on language models, whose activations have outlier features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.links.prune.scored import scoring


def wanda_scores(weight_oi: Tensor, input_norm_i: Tensor) -> Tensor:
    """Return the importance of each weight: |W[o,i]| * ‖x_i‖₂  (Sun et al. 2023, eq. 1).

    weight_oi     (out, in)  any float; scored in float32
    input_norm_i  (in,)      L2 norm of each input feature over the calibration tokens
    returns       (out, in)  float32, larger is more important
    """
    return weight_oi.abs().to(torch.float32) * input_norm_i.to(torch.float32)


Wanda = scoring(
    "wanda",
    per="row",
    calibrated=True,
    summary="zeroes by weight times input norm, per output row; needs calibration data",
    source="Sun et al. 2023",
)(wanda_scores)
