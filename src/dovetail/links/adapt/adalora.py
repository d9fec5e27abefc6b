"""AdaLoRA: a low rank in the form of a singular value decomposition, whose ranks move to the layers that need them.

    W' = W + c B diag(E) A        A (r, i), E (r,), B (o, r), c = alpha / r; the paper's Q, Λ, P

Source: Zhang et al. 2023, algorithm 1. Every layer starts with rank r. After each step, the importance of a triplet
(row of A, number of E, column of B) is

    s = S(E) + mean S(A) + mean S(B),   S(w) = Ī Ū,   I = |w ∂L/∂w| (eq. 8),   Ī, Ū smoothed (eq. 9-11)

and the E of the least important triplets of all layers become zero, so that the number of triplets falls from r to
`budget` per layer along a cubic schedule (eq. 12). A penalty draws A Aᵀ and Bᵀ B to the identity; its gradient is added
to that of the loss. As in peft, the penalty is the mean of ‖A Aᵀ - 1‖ and ‖Bᵀ B - 1‖, not of their squares; I is taken
after the step; and c is alpha / (r + 1e-5). Beside `lora` of the same number of ranks, the layers that need more ranks
get more; training holds the sensitivities as well, twice the adapter. Layers with the same arguments share a budget.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from dovetail.chains.link import Site, always_print
from dovetail.chains.registry import register
from dovetail.chains.terms import LowRank, Term
from dovetail.errors import ChainError, LoadError
from dovetail.links.adapt.peft import Number, PeftAdapter, PeftConfig, PeftLink, Rank
from dovetail.links.adapt.rank import check_rank

SMOOTHING = 0.85
"""Share of the past in the smoothed sensitivity and uncertainty: β1 and β2."""
TINY = 1e-5
"""What peft adds to r where it divides by it."""


class AdaloraConfig(PeftConfig):
    """peft's fields of AdaLoRA; those of its schedule change nothing that the adapter computes."""

    r: Any = None
    init_r: Rank = 12
    target_r: Rank = 8
    alpha: Number = pydantic.Field(default=8, validation_alias="lora_alpha")
    lora_dropout: Number = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: Rank = 1
    beta1: Number = SMOOTHING
    beta2: Number = SMOOTHING
    orth_reg_weight: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.5
    total_step: Rank = 1
    rank_pattern: dict[str, list[bool]] | None = None
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    alpha_pattern: Any = None


@register("adalora")
@dataclass(frozen=True)
class AdaLoRA(PeftAdapter):
    """Low-rank update with a budget of ranks.

    r              rank of every layer at the start
    budget         mean rank of a layer at the end
    alpha          numerator of the scale alpha / r; r when not given
    dropout        probability that an input of A is dropped during training
    warmup         share of the steps before the first rank is pruned
    cooldown       share of the steps after the last one; the ranks are fixed then
    interval       steps between two prunings
    orthogonality  weight of the penalty
    """

    r: int = always_print(12)
    budget: int = always_print(8)
    alpha: float | None = None
    dropout: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.3
    interval: int = 1
    orthogonality: float = 0.5

    learning_rate: ClassVar[float] = 1e-3
    rank_axes: ClassVar[Mapping[str, int]] = {"A": 0, "E": 0, "B": 1}
    summary: ClassVar[str] = "low rank in SVD form; ranks are pruned to a budget over all layers"
    source: ClassVar[str] = "Zhang et al. 2023"
    peft_type: ClassVar[str] = "ADALORA"
    peft_tensors: ClassVar[Mapping[str, str]] = {"A": "lora_A", "E": "lora_E", "B": "lora_B"}
    peft_config: ClassVar[type[AdaloraConfig]] = AdaloraConfig

    def __post_init__(self) -> None:
        check_rank(self.name, self.r, self.alpha, self.dropout)
        if not 1 <= self.budget <= self.r:
            rule = f"budget must be from 1 to r={self.r}"
            raise self._bad(f"budget={self.budget}", rule, f"set budget={max(1, self.r * 2 // 3)}")
        if not (self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown < 1):
            rule = "warmup and cooldown are shares of the steps, whose sum must be less than 1"
            raise self._bad(f"warmup={self.warmup}, cooldown={self.cooldown}", rule, "set warmup=0.1 and cooldown=0.3")
        if self.interval < 1:
            raise self._bad(f"interval={self.interval}", "interval must be at least 1 step", "set interval=1")
        if not 0 <= self.orthogonality < torch.inf:
            rule = "the weight of the penalty must be a finite number and at least 0"
            raise self._bad(f"orthogonality={self.orthogonality}", rule, "set orthogonality=0.5")

    @property
    def scale(self) -> float:
        """The scale c in the method's formula."""
        return (self.r if self.alpha is None else self.alpha) / (self.r + TINY)

    def check(self, site: Site) -> None:
        """Raise ChainError when the rank exceeds the layer's smaller side."""
        widest = min(site.out_features, site.in_features)
        if self.r > widest:
            found, rule = f"r={self.r}", f"the rank must be at most {widest}, the layer's smaller side"
            raise ChainError(f"{self.name} at {site.name}", found=found, rule=rule, fix=f"set r={widest}")

    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        return {"A": (self.r, site.in_features), "E": (self.r,), "B": (site.out_features, self.r)}

    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.parameter_shapes(site)
        return {
            "A": torch.empty(shapes["A"]).normal_(0, 0.02, generator=generator),
            "E": torch.zeros(shapes["E"]),
            "B": torch.empty(shapes["B"]).normal_(0, 0.02, generator=generator),
        }

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return weight_oi + self.scale * (p["B"] * p["E"] @ p["A"]), bias_o

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return [LowRank(p["A"], self.scale * p["E"] * p["B"], self.dropout)]

    # The budget.

    def before_step(
        self, p: Mapping[str, Mapping[str, Tensor]], step: int, steps: int, kept: dict[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        begin, end = int(self.warmup * steps), steps - int(self.cooldown * steps)
        graded = any(tensor.grad is not None for own in p.values() for tensor in own.values())
        if 0 < step < end and graded:
            for layer, own in p.items():
                for name, tensor in own.items():
                    _smooth(kept, f"{layer}/{name}", tensor)
        ranks = {layer: kept[f"{layer}/ranks"] for layer in p if f"{layer}/ranks" in kept}
        if not ranks and (step == end or (begin < step < end and step % self.interval == 0)):
            ranks = self._important(p, kept, self.budget_at(step, begin, end, len(p)))
            if step == end:
                kept.clear()
                kept.update({f"{layer}/ranks": own for layer, own in ranks.items()})
        for layer, own in ranks.items():
            p[layer]["E"].masked_fill_(~own, 0.0)
        return self._penalty(p)

    def budget_at(self, step: int, begin: int, end: int, layers: int) -> int:
        """Return the number of triplets of all layers that remain after a step (eq. 12)."""
        left = (1 - (step - begin) / (end - begin)) ** 3
        return int((self.r - self.budget) * layers * left + self.budget * layers)

    def _important(
        self, p: Mapping[str, Mapping[str, Tensor]], kept: Mapping[str, Tensor], budget: int
    ) -> dict[str, Tensor]:
        """Return layer -> which of its triplets are among the `budget` most important ones, (r,) bool."""
        scores = {}
        for layer, own in p.items():
            score = {
                name: kept[f"{layer}/{name}/sensitivity"] * kept[f"{layer}/{name}/uncertainty"]
                if f"{layer}/{name}/sensitivity" in kept
                else torch.zeros_like(tensor)
                for name, tensor in own.items()
            }
            scores[layer] = score["E"] + (score["A"].mean(1) + score["B"].mean(0))
        every = torch.cat(list(scores.values()))
        pruned = len(every) - budget
        if pruned < 1:
            return {layer: torch.ones_like(score, dtype=torch.bool) for layer, score in scores.items()}
        threshold = every.kthvalue(pruned).values
        return {layer: score > threshold for layer, score in scores.items()}

    def _penalty(self, p: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Return the gradient of the mean of ‖A Aᵀ - 1‖ and ‖Bᵀ B - 1‖ over all layers, times its weight."""
        share = self.orthogonality / (2 * len(p))
        if not share:
            return {}
        return {
            layer: {"A": share * _away(own["A"]) @ own["A"], "B": share * (own["B"] @ _away(own["B"].t()))}
            for layer, own in p.items()
        }

    # peft's format.

    @classmethod
    def peft_shape(cls, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape, 1) if name == "E" else shape

    @classmethod
    def to_peft(cls, links: Mapping[Site, AdaLoRA], *, seed: int, where: str) -> dict[str, Any]:
        link, *others = dict.fromkeys(links.values())
        if others:
            rule, fix = "peft's AdaLoRA has one rank and one alpha for all layers", "give all layers the same arguments"
            raise ChainError(where, found=f"{link} and {others[0]}", rule=rule, fix=fix)
        alpha = link.r if link.alpha is None else link.alpha
        if alpha <= 0:
            rule = "peft takes r for an alpha that is not positive"
            raise ChainError(where, found=f"alpha={alpha}", rule=rule, fix="merge the chain and save the model")
        total = 1000  # peft requires a schedule, which says nothing about a trained adapter
        return {
            "init_r": link.r,
            "target_r": link.budget,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": link.dropout,
            "tinit": int(link.warmup * total),
            "tfinal": int(link.cooldown * total),
            "deltaT": link.interval,
            "orth_reg_weight": link.orthogonality,
            "total_step": total,
        }

    @classmethod
    def from_peft(cls, config: AdaloraConfig, layers: Mapping[Site, Collection[str]], *, where: str) -> PeftLink:
        r, total = config.init_r, config.total_step
        link = cls(
            r=r,
            budget=min(config.target_r, r),
            alpha=config.alpha if config.alpha > 0 else None,
            dropout=config.lora_dropout,
            warmup=config.tinit / total,
            cooldown=config.tfinal / total,
            interval=config.deltaT,
            orthogonality=config.orth_reg_weight,
        )
        patterns = {key.removesuffix(".lora_E"): kept for key, kept in (config.rank_pattern or {}).items()}
        names = {site.name for site in layers}
        for name, kept in patterns.items():
            if name not in names or len(kept) != r:
                rule = f"rank_pattern must say of every adapted layer which of its {r} ranks remain"
                found = f"rank_pattern of {name!r} with {len(kept)} ranks"[:200]
                raise LoadError(where, found=found, rule=rule, fix="save it with peft again")
        return PeftLink(link, kept=patterns)


def _smooth(kept: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    """Smooth the sensitivity |w ∂L/∂w| and its distance to the smoothed one, in place."""
    now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
    for what in ("sensitivity", "uncertainty"):
        if f"{key}/{what}" not in kept:
            kept[f"{key}/{what}"] = torch.zeros_like(tensor)
    sensitivity, uncertainty = kept[f"{key}/sensitivity"], kept[f"{key}/uncertainty"]
    sensitivity.mul_(SMOOTHING).add_(now, alpha=1 - SMOOTHING)
    uncertainty.mul_(SMOOTHING).add_((now - sensitivity).abs(), alpha=1 - SMOOTHING)


def _away(rows: Tensor) -> Tensor:
    """Return the gradient of ‖M Mᵀ - 1‖ by M, without its last factor M; zero where the rows are orthonormal."""
    distance = rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    norm = torch.linalg.matrix_norm(distance)
    return 2 * distance / torch.where(norm == 0, 1, norm)
