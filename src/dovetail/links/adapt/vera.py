"""VeRA: shared frozen random projections, with two trained vectors per layer.

    W' = W + diag(b) B diag(d) A        A (r, i), B (o, r) frozen and shared by all layers; b (o,), d (r,) trained

Source: Kopiczko et al. 2024, eq. 2. VeRA trains ten times fewer parameters than LoRA. A and B are drawn again from a
seed, so they take no storage. Narrower layers use leading slices of the widest layer's A and B. VeRA needs a large
rank and a large learning rate.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dovetail.chains.link import Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, Term
from dovetail.errors import ChainError
from dovetail.links.adapt.peft import Number, PeftConfig, PeftLink, Rank
from dovetail.links.adapt.rank import RankAdapter, kaiming_uniform


class VeraConfig(PeftConfig):
    """peft's fields of VeRA."""

    r: Rank = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Number = 0.0
    d_initial: Number = 0.1

    @property
    def stores_constants(self) -> bool:
        return self.save_projection


@register("vera")
@dataclass(frozen=True)
class VeRA(RankAdapter):
    """Vector-based random matrix adaptation.

    r          rank of the shared projections
    d_initial  initial value of d; b starts at zero
    seed       seed of the projections; the run's seed when not given
    dropout    probability that an input of A is dropped during training
    elastic    ranks to train for, of which the largest is r (`chains/layer/elastic.py`)
    """

    r: int = always_print(256)
    d_initial: float = 0.1
    seed: int | None = None
    dropout: float = 0.0
    elastic: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 1e-1
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "d": 0}
    summary: ClassVar[str] = "shared frozen random projections, two trained vectors per layer"
    source: ClassVar[str] = "Kopiczko et al. 2024"
    peft_type: ClassVar[str] = "VERA"
    peft_tensors: ClassVar[Mapping[str, str]] = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    peft_constants: ClassVar[Mapping[str, str]] = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
    peft_config: ClassVar[type[VeraConfig]] = VeraConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise self._bad(f"seed={self.seed}", "seed must be from 0 to 2^63 - 1", "set seed=0")

    def plain(self, rank: int) -> VeRA:
        # It keeps the leading parts of the same projections: those drawn for the smaller rank would be others.
        return replace(self, r=rank, elastic=())

    def check(self, site: Site) -> None:
        """Accept every layer: the rank of the shared projections may exceed the layer's width."""

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
        # d multiplies B's side: A is frozen then, and no (r, i) gradient is computed.
        return [LowRank(p["A"], p["b"][:, None] * p["B"] * p["d"], self.dropout)]

    @classmethod
    def to_peft(cls, links: Mapping[Site, VeRA], *, seed: int, where: str) -> dict[str, Any]:
        ranks = sorted({link.r for link in links.values()})
        if len(ranks) > 1:
            rule, fix = "peft's VeRA has one rank for all layers", "set the rank of every group to the same value"
            raise ChainError(where, found=f"ranks {ranks}", rule=rule, fix=fix)
        link = next(iter(links.values()))
        return {
            "r": link.r,
            "projection_prng_key": seed if link.seed is None else link.seed,
            "save_projection": True,
            "vera_dropout": link.dropout,
            "d_initial": link.d_initial,
        }

    @classmethod
    def from_peft(cls, config: VeraConfig, layers: Mapping[Site, Collection[str]], *, where: str) -> PeftLink:
        key, dropout = config.projection_prng_key, config.vera_dropout
        return PeftLink(cls(r=config.r, d_initial=config.d_initial, seed=key, dropout=dropout))
