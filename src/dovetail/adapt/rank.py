"""What the low-rank methods have in common: the checks of rank, alpha and dropout, and their initial values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dovetail.chain.link import Site
from dovetail.errors import ChainError

MOST = 1 << 16
"""The largest rank: no layer is that wide, and a chain comes from outside."""


def check_rank(method: str, r: int, alpha: float | None = None, dropout: float = 0.0) -> None:
    """ChainError unless 1 <= r <= MOST, alpha is finite and 0 <= dropout < 1."""
    if alpha is not None and not math.isfinite(alpha):
        raise ChainError(method, found=f"alpha={alpha}", rule="alpha is a finite number", fix=f"alpha={r}")
    if not 1 <= r <= MOST:
        raise ChainError(method, found=f"r={r}", rule=f"the rank r is at least 1 and at most {MOST}", fix="r=8")
    if not 0 <= dropout < 1:
        raise ChainError(method, found=f"dropout={dropout}", rule="dropout lies in [0, 1)", fix="dropout=0.05")


def check_width(method: str, r: int, site: Site) -> None:
    """ChainError when the rank is over the layer's width: more columns than the weight has could never matter."""
    width = min(site.out_features, site.in_features)
    if r > width:
        raise ChainError(
            f"{method} at {site.name}",
            found=f"r={r}, layer of {site.out_features} x {site.in_features}",
            rule="the rank r is at most the layer's smaller side",
            fix=f"r={width}, or leave this layer out of the targets",
        )


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator, a: float = math.sqrt(5)) -> Tensor:
    """Uniform in ±sqrt(6 / ((1 + a²) fan_in)), fan_in the last axis, as torch's `kaiming_uniform_`. float32, CPU."""
    bound = math.sqrt(6 / ((1 + a * a) * shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
