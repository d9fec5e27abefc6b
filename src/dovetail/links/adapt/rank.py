"""The base class of the low-rank adapters: the checks of rank, alpha and dropout, elastic ranks, and peft's fields."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor

from dovetail.chains.link import Site
from dovetail.errors import ChainError
from dovetail.links.adapt.peft import Number, PeftAdapter, PeftConfig, PeftLink, Rank, match_patterns

MOST = 1 << 16
"""The largest rank. No layer is wider, and a chain may come from outside."""


class RankConfig(PeftConfig):
    """peft's fields of a method that has a rank and an alpha."""

    r: Rank = 8
    alpha: Number = 8
    rank_pattern: dict[str, Rank] = pydantic.Field(default_factory=dict)
    alpha_pattern: dict[str, Number] = pydantic.Field(default_factory=dict)

    def divisor(self, rank: int) -> float:
        """Return the number that divides alpha at this rank."""
        return rank


class RankAdapter(PeftAdapter):
    """An adapter of a rank r, whose change of the weight is multiplied by a scale alpha / r.

    A subclass is a dataclass with the fields `r` and `elastic`, and `alpha` and `dropout` where the method has them.
    """

    r: int
    elastic: tuple[int, ...]
    alpha: float | None = None
    dropout: float = 0.0

    peft_alpha: ClassVar[str] = "alpha"
    """peft's name of alpha."""
    peft_up: ClassVar[str] = "B"
    """The parameter that takes up the difference where a layer's scale is not the link's."""

    def __post_init__(self) -> None:
        check_rank(self.name, self.r, self.alpha, self.dropout)
        object.__setattr__(self, "elastic", elastic_ranks(self.name, self.r, self.elastic))

    def divisor(self, rank: int) -> float:
        """Return the number that divides alpha at this rank."""
        return rank

    @property
    def scale(self) -> float:
        """The scale c in the method's formula."""
        return (self.r if self.alpha is None else self.alpha) / self.divisor(self.r)

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.elastic

    def plain(self, rank: int) -> RankAdapter:
        alpha = self.alpha if rank == self.r else self.scale * self.divisor(rank)
        return replace(self, r=rank, alpha=alpha, elastic=())  # type: ignore[type-var]

    def check(self, site: Site) -> None:
        """Raise ChainError when the rank exceeds the layer's smaller side: more ranks could not change the weight."""
        width = min(site.out_features, site.in_features)
        if self.r > width:
            raise ChainError(
                f"{self.name} at {site.name}",
                found=f"r={self.r}, layer of {site.out_features} x {site.in_features}",
                rule="the rank r must be at most the layer's smaller side",
                fix=f"set r={width}, or exclude this layer from the targets",
            )

    def peft_fields(self) -> dict[str, Any]:
        """Return the arguments of peft's configuration class that only this method has."""
        return {}

    @classmethod
    def peft_arguments(cls, config: Any, where: str) -> dict[str, Any]:
        """Return the arguments of the link other than r, alpha and elastic."""
        return {}

    @classmethod
    def to_peft(cls, links: Mapping[Site, Any], *, seed: int, where: str) -> dict[str, Any]:
        # The most common rank and alpha, and patterns for the layers that have others. peft takes the first pattern p
        # for which `(.*\.)?(p)$` matches; a leading ^ makes it match one path only. peft annotates alpha as an integer
        # and computes with any number.
        ranks, alphas = {}, {}
        for site, link in links.items():
            alpha = link.r if link.alpha is None else link.alpha
            ranks[f"^{re.escape(site.name)}"] = link.r
            alphas[f"^{re.escape(site.name)}"] = int(alpha) if float(alpha).is_integer() else alpha
        (r, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
        return {
            "r": r,
            cls.peft_alpha: alpha,
            "rank_pattern": {pattern: value for pattern, value in ranks.items() if value != r},
            "alpha_pattern": {pattern: value for pattern, value in alphas.items() if value != alpha},
            **next(iter(links.values())).peft_fields(),
        }

    @classmethod
    def from_peft(cls, config: Any, layers: Mapping[Site, Collection[str]], *, where: str) -> PeftLink:
        assert isinstance(config, RankConfig)
        names = [site.name for site in layers]
        ranks = match_patterns(where, config.rank_pattern, names, config.r)
        alphas = match_patterns(where, config.alpha_pattern, names, config.alpha)
        scales = {name: alphas[name] / config.divisor(ranks[name]) for name in names}
        # A link has one scale. Where the layers have several, the B of the others takes up the difference.
        common, _ = Counter(scales.values()).most_common(1)[0]
        if not common:
            common = next((scale for scale in scales.values() if scale), 0.0)
        values = sorted(set(ranks.values()), reverse=True)
        elastic = tuple(values) if len(values) > 1 else ()
        link: Any = cls(r=values[0], elastic=elastic, **cls.peft_arguments(config, where))  # type: ignore[call-arg]
        if elastic or len(set(scales.values())) > 1 or link.divisor(link.r) != config.divisor(link.r):
            alpha = common * link.divisor(link.r)
        else:
            alpha = alphas[names[0]]
        factors = {name: {cls.peft_up: scale / common if common else 1.0} for name, scale in scales.items()}
        return PeftLink(replace(link, alpha=alpha), ranks, factors)


def check_rank(method: str, r: int, alpha: float | None = None, dropout: float = 0.0) -> None:
    """Raise ChainError unless 1 <= r <= MOST, alpha is finite and 0 <= dropout < 1."""
    if alpha is not None and not math.isfinite(alpha):
        raise ChainError(method, found=f"alpha={alpha}", rule="alpha must be a finite number", fix=f"set alpha={r}")
    if not 1 <= r <= MOST:
        raise ChainError(method, found=f"r={r}", rule=f"the rank r must be from 1 to {MOST}", fix="set r=8")
    if not 0 <= dropout < 1:
        raise ChainError(method, found=f"dropout={dropout}", rule="dropout must be in [0, 1)", fix="set dropout=0.05")


def elastic_ranks(method: str, r: int, elastic: Sequence[int]) -> tuple[int, ...]:
    """Return the elastic ranks, the largest first; raise ChainError unless all are from 1 to r and one is r.

    >>> elastic_ranks("lora", 32, [16, 32, 24])
    (32, 24, 16)
    """
    if not isinstance(elastic, list | tuple):
        rule = "elastic must be a list of ranks"
        raise ChainError(method, found=f"elastic={elastic!r}", rule=rule, fix=f"set elastic=[{r}]")
    wrong = [k for k in elastic if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= r]
    right = sorted({k for k in elastic if k not in wrong} | {r}, reverse=True)
    fix = f"set elastic={right}"
    if wrong:
        rule = f"each elastic rank must be an integer from 1 to r={r}"
        if isinstance(wrong[0], int) and wrong[0] > r:
            fix = f"set r={wrong[0]} or elastic={right}"
        raise ChainError(method, found=f"{wrong[0]!r} in elastic={list(elastic)}"[:300], rule=rule, fix=fix)
    if len(set(elastic)) < len(elastic):
        raise ChainError(method, found=f"elastic={list(elastic)}", rule="each elastic rank must be named once", fix=fix)
    if elastic and max(elastic) != r:
        found, rule = f"r={r}, elastic={list(elastic)}", "the largest elastic rank must be r, the rank that is trained"
        raise ChainError(method, found=found, rule=rule, fix=f"set r={max(elastic)} or elastic={right}")
    return tuple(sorted(elastic, reverse=True))


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator, a: float = math.sqrt(5)) -> Tensor:
    """Draw from ±sqrt(6 / ((1 + a²) fan_in)), fan_in the last axis, as torch's `kaiming_uniform_`. float32, CPU."""
    bound = math.sqrt(6 / ((1 + a * a) * shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
