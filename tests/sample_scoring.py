"""Wanda with dampened inputs: score = |W| · ‖x‖^½."""

from torch import Tensor

import dovetail


@dovetail.scoring(
    "damped_wanda", per="row", calibrated=True, summary="Wanda with the root of the input norm", source="an example"
)
def damped_wanda(weight_oi: Tensor, input_norm_i: Tensor) -> Tensor:
    """Importance (out, in) of each weight (out, in), given the L2 norm (in,) of each input feature."""
    return weight_oi.abs().float() * input_norm_i.sqrt()
