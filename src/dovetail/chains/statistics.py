"""What calibration knows of a layer's input X (tokens, in), added up batch by batch; no activation is kept.

square_i   Σ x_i²         for scores such as Wanda's |W|·‖x_i‖
gram_ii    X^T X          for GPTQ and SparseGPT, whose error ‖(W - Ŵ) X^T‖² it measures
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dovetail.chains.linalg import times_transposed

_PANEL = 256
"""Columns of the Gram matrix that are computed at once: it is symmetric, so each panel starts at its diagonal."""


class InputStatistics:
    """Statistics of one layer's input; layers that read the same tensor share one object.

    tokens    rows of X that were counted
    square_i  (i,) float64
    gram_ii   (i, i) float32 (float64 for float64 inputs), symmetric once `finish` was called; None unless asked for
    factors   what was made of the Gram matrix, kept for other layers with the same input (`dovetail.reconstruct`)
    """

    def __init__(self, in_features: int, *, gram: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = 0
        self.factors: dict[object, object] = {}
        self.square_i = torch.zeros(in_features, dtype=torch.float64, device=device)
        wide = torch.promote_types(dtype, torch.float32)
        self.gram_ii = torch.zeros(in_features, in_features, dtype=wide, device=device) if gram else None

    def add(self, rows_ni: Tensor) -> None:
        """Counts a batch: rows of X, any float dtype (`input_rows`)."""
        if self.gram_ii is None:
            wide_ni = rows_ni.to(torch.promote_types(rows_ni.dtype, torch.float32))
            self.square_i += torch.linalg.vector_norm(wide_ni, dim=0).square()
        else:
            columns_in = rows_ni.to(self.gram_ii.dtype).t().contiguous()
            for start in range(0, len(self.square_i), _PANEL):
                panel = slice(start, start + _PANEL)
                self.gram_ii[start:, panel] += times_transposed(columns_in[start:], columns_in[panel])
        self.tokens += len(rows_ni)

    def finish(self) -> None:
        """Fills in what `add` left: the Gram matrix's upper half, and the squares from its diagonal."""
        if self.gram_ii is not None:
            for start in range(0, len(self.square_i), _PANEL):
                stop = start + _PANEL
                self.gram_ii[start:stop, stop:] = self.gram_ii[stop:, start:stop].t()
            self.square_i = self.gram_ii.diagonal().to(torch.float64)

    @property
    def norm_i(self) -> Tensor:
        """‖x_i‖₂ of each input feature over all tokens, (i,) float32."""
        return self.square_i.sqrt().to(torch.float32)


def padding_mask(batch: Mapping[str, Tensor], key: str = "attention_mask") -> Tensor | None:
    """(b, t) bool, False where the batch is padding; None where nothing is, or where it doesn't say."""
    mask = batch.get(key)
    return None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask.bool()
