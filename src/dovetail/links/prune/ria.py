"""RIA: the importance of a weight is its share of its row and of its column, times the root of its input's size.

    score = (|W[o, i]| / Σ_o |W[o, i]| + |W[o, i]| / Σ_i |W[o, i]|) · √‖x_i‖₂, compared within the layer

Source: Zhang et al. 2024 (Plug-and-Play: RIA and channel permutation), §3, with their exponent 1/2. Compared with
Wanda, rows and columns of small weights and inputs of small norm get fewer zeros.
Difference from the authors' code: a row or column of zeros scores 0 (there 0/0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.links.prune.scored import scoring


def ria_scores(weight_oi: Tensor, input_norm_i: Tensor) -> Tensor:
    """Return the importance of each weight: its relative importance times √‖x_i‖₂  (Zhang et al. 2024).

    weight_oi     (out, in)  any float; scored in float32
    input_norm_i  (in,)      L2 norm of each input feature over the calibration tokens
    returns       (out, in)  float32, larger is more important
    """
    size = weight_oi.abs().to(torch.float32)
    of_column, of_row = size.sum(dim=0, keepdim=True), size.sum(dim=1, keepdim=True)
    relative = size / of_column.masked_fill(of_column == 0, 1) + size / of_row.masked_fill(of_row == 0, 1)
    return relative * input_norm_i.to(torch.float32).sqrt()


Ria = scoring(
    "ria",
    per="layer",
    calibrated=True,
    summary="zeroes by share of row and column times the root of the input norm; needs calibration data",
    source="Zhang et al. 2024",
)(ria_scores)
