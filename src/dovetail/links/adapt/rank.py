"""What the low-rank methods have in common: checks of rank, alpha, dropout and elastic ranks, and initial values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.chains.link import Site
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


def elastic_ranks(method: str, r: int, elastic: Sequence[int]) -> tuple[int, ...]:
    """The list of elastic ranks, the largest first; ChainError unless each is an integer from 1 to r, and one is r.

    >>> elastic_ranks("lora", 32, [16, 32, 24])
    (32, 24, 16)
    """
    if not isinstance(elastic, list | tuple):
        raise ChainError(method, found=f"elastic={elastic!r}", rule="elastic is a list of ranks", fix=f"elastic=[{r}]")
    wrong = [k for k in elastic if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= r]
    right = sorted({k for k in elastic if k not in wrong} | {r}, reverse=True)
    fix = f"elastic={right}"
    if wrong:
        rule = f"each elastic rank is an integer from 1 to r={r}"
        if isinstance(wrong[0], int) and wrong[0] > r:
            fix = f"r={wrong[0]}, or {fix}"
        raise ChainError(method, found=f"{wrong[0]!r} in elastic={list(elastic)}"[:300], rule=rule, fix=fix)
    if len(set(elastic)) < len(elastic):
        raise ChainError(method, found=f"elastic={list(elastic)}", rule="each elastic rank is named once", fix=fix)
    if elastic and max(elastic) != r:
        found, rule = f"r={r}, elastic={list(elastic)}", "the largest elastic rank is r, which is what is trained"
        raise ChainError(method, found=found, rule=rule, fix=f"r={max(elastic)}, or {fix}")
    return tuple(sorted(elastic, reverse=True))


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
