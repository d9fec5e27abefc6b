"""A Bᵀ for calibration: on CPUs in float32 by oneDNN, which torch uses for narrower types only.

torch computes a float32 product by the BLAS that it was built with. MKL, in the usual builds, is slow on processors of
other makers than Intel: measured on an AMD core with AVX512, oneDNN does 205 GFLOP/s and MKL 95, on the same float32
numbers; they differ in the order of the sums. Most of calibration is such products. Training, evaluation and merging do
not use this function: they agree to the bit with the stock layers of a merged model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times_transposed(a_ni: Tensor, b_oi: Tensor) -> Tensor:
    """Return A Bᵀ, (n, o), in the dtype of both; no gradient."""
    known = a_ni.device.type == "cpu" and a_ni.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not known or not a_ni.numel():
        return a_ni @ b_oi.t()
    # Contiguous: with any other strides oneDNN takes a hundred to a thousand times as long.
    return torch.ops.mkldnn._linear_pointwise(a_ni.contiguous(), b_oi.contiguous(), None, "none", [], "")
