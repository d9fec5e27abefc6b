"""VeRA: shared frozen random projections, with two trained vectors per layer.

    W' = W + diag(b) B diag(d) A        A (r, i), B (o, r) frozen and shared by all layers; b (o,), d (r,) trained

Source: Kopiczko et al. 2024, eq. 2. Ten times fewer parameters than LoRA; A and B are remade from a seed, so that
they cost nothing to store. Narrower layers use leading slices of the widest layer's A and B. Wants a large rank and
learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.chains.link import Adapter, Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, Term
from dovetail.links.adapt.rank import check_rank, elastic_ranks, kaiming_uniform


@register("vera")
@dataclass(frozen=True)
class VeRA(Adapter):
    """Vector-based random matrix adaptation.

    r          rank of the shared projections
    d_initial  initial value of d; b starts at zero
    seed       of the projections; the run's seed when not given
    dropout    probability with which an input of A is dropped while training
    elastic    ranks to train for, the largest r (`adapt/elastic.py`)
    """

    r: int = always_print(256)
    d_initial: float = 0.1
    seed: int | None = None
    dropout: float = 0.0
    elastic: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 1e-1
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "d": 0}
    summary: ClassVar[str] = "shared frozen random projections, two trained vectors a layer"
    source: ClassVar[str] = "Kopiczko et al. 2024"

    def __post_init__(self) -> None:
        check_rank(self.name, self.r, dropout=self.dropout)
        object.__setattr__(self, "elastic", elastic_ranks(self.name, self.r, self.elastic))
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise self._bad(f"seed={self.seed}", "seed is 0 or more and below 2^63", "seed=0")

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.elastic

    def plain(self, rank: int) -> VeRA:
        # Over leading parts of the same projections: those drawn for the smaller rank would be others.
        return replace(self, r=rank, elastic=())

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"b": (site.out_features,), "d": (self.r,)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"b": torch.zeros(site.out_features), "d": torch.full((self.r,), self.d_initial)}

    def constants(self, widest: tuple[int, int], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed if self.seed is None else self.seed)
        out_features, in_features = widest
        # A first, then B: the order in which peft draws them (its gain is that of a = 0, sqrt(2)).
        a = kaiming_uniform((self.r, in_features), generator, a=0.0)
        b = kaiming_uniform((out_features, self.r), generator, a=0.0)
        return {"A": a.to(dtype), "B": b.to(dtype)}

    def local(self, shared: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        return {"A": shared["A"][:, : site.in_features], "B": shared["B"][: site.out_features]}

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return weight_oi + (p["b"][:, None] * p["B"]) @ (p["d"][:, None] * p["A"]), bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        # d goes to B's side: then A is frozen, and no (r, i) gradient is ever made.
        return [LowRank(p["A"], p["b"][:, None] * p["B"] * p["d"], self.dropout)]
