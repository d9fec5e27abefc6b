"""Weights with correlated inputs, and the Gram matrix of the inputs: what GPTQ and SparseGPT are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.chains.statistics import InputStatistics


def sample(o: int, i: int, *, tokens: int = 2000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (o, i) and correlated inputs (tokens, i) of uneven size, float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.3 * torch.randn(i, i, generator=generator) + torch.eye(i)
    x = torch.randn(tokens, i, generator=generator) @ mix * (3 * torch.rand(i, generator=generator) + 0.1)
    return torch.randn(o, i, generator=generator), x


def gram_of(x: Tensor, dtype: torch.dtype = torch.float64) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], {"gram"}, dtype=dtype, device=x.device)
    for part in x.to(dtype).split(700):
        statistics.add(part)
    statistics.finish()
    return statistics


def error(weight: Tensor, new: Tensor, x: Tensor) -> float:
    return float((x.double() @ (weight.double() - new.double()).t()).norm())
