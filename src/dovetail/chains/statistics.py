"""The statistics of a layer's input X (tokens, in), accumulated batch by batch; no activation is kept.

norm        ‖x_i‖₂        for scores such as Wanda's |W|·‖x_i‖
magnitude   mean |x_i|    for scales by activation, such as AWQ's
gram        XᵀX           for GPTQ and SparseGPT, which minimize ‖(W - Ŵ) Xᵀ‖²
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from dovetail.chains.linalg import times_transposed

Statistic = Literal["norm", "magnitude", "gram"]

_PANEL = 256
"""Columns of the Gram matrix that are computed at once: it is symmetric, so each panel starts at its diagonal."""


class InputStatistics:
    """Statistics of one layer's input; layers that read the same tensor share one object.

    tokens       rows of X that were counted
    square_i     (i,) float64, Σ x_i²; always there
    absolute_i   (i,) float64, Σ |x_i|; None unless "magnitude" was asked for
    gram_ii      (i, i) float32 (float64 for float64 inputs), symmetric once `finish` was called; None unless "gram"
                 was asked for
    factors      what was made of the Gram matrix, kept for other layers with the same input
                 (`dovetail.links.column_solver`)
    """

    def __init__(
        self, in_features: int, wanted: Collection[Statistic], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tokens = 0
        self.factors: dict[object, object] = {}
        self.square_i = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.absolute_i = torch.zeros_like(self.square_i) if "magnitude" in wanted else None
        wide = torch.promote_types(dtype, torch.float32)
        self.gram_ii = torch.zeros(in_features, in_features, dtype=wide, device=device) if "gram" in wanted else None

    @classmethod
    def uniform(
        cls, in_features: int, wanted: Collection[Statistic], *, dtype: torch.dtype, device: torch.device
    ) -> InputStatistics:
        """Return the statistics of independent features of norm 1, with which a method works as one without data."""
        found = cls(in_features, wanted, dtype=dtype, device=device)
        found.tokens = 1
        found.square_i += 1
        if found.absolute_i is not None:
            found.absolute_i += 1
        if found.gram_ii is not None:
            found.gram_ii.fill_diagonal_(1)
        return found

    def add(self, rows_ni: Tensor) -> None:
        """Count a batch: rows of X, any float dtype (`input_rows`)."""
        wide_ni = rows_ni.to(torch.promote_types(rows_ni.dtype, torch.float32))
        if self.gram_ii is None:
            self.square_i += torch.linalg.vector_norm(wide_ni, dim=0).square()
        else:
            columns_in = rows_ni.to(self.gram_ii.dtype).t().contiguous()
            for start in range(0, len(self.square_i), _PANEL):
                panel = slice(start, start + _PANEL)
                self.gram_ii[start:, panel] += times_transposed(columns_in[start:], columns_in[panel])
        if self.absolute_i is not None:
            self.absolute_i += torch.linalg.vector_norm(wide_ni, ord=1, dim=0)
        self.tokens += len(rows_ni)

    def finish(self) -> None:
        """Fill in what `add` left: the Gram matrix's upper half, and the squares from its diagonal."""
        if self.gram_ii is not None:
            for start in range(0, len(self.square_i), _PANEL):
                stop = start + _PANEL
                self.gram_ii[start:stop, stop:] = self.gram_ii[stop:, start:stop].t()
            self.square_i = self.gram_ii.diagonal().to(torch.float64)

    @property
    def norm_i(self) -> Tensor:
        """‖x_i‖₂ of each input feature over all tokens, (i,) float32."""
        return self.square_i.sqrt().to(torch.float32)

    @property
    def magnitude_i(self) -> Tensor:
        """Mean |x_i| of each input feature over all tokens, (i,) float32. Needs "magnitude"."""
        assert self.absolute_i is not None, "declare statistics = {'magnitude'}"
        return (self.absolute_i / max(self.tokens, 1)).to(torch.float32)


def padding_mask(batch: Mapping[str, Tensor], key: str = "attention_mask") -> Tensor | None:
    """(b, t) bool, False where the batch is padding; None where nothing is, or where it does not say."""
    mask = batch.get(key)
    return None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask.bool()
