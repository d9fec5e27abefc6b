"""The `search` part of a recipe: what a search chooses, from what, and how much it may cost.

A search of kind "ranks" runs inside `dovetail run`, after training. One of kind "layers" or "chains" trains many
candidates; `dovetail search` runs it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dovetail.tasks.spec import Part, Positive

Objective = Literal["quality", "nbytes", "peak_memory", "trainable_parameters"]
Sampler = Literal["three_stage", "prga", "refine", "nsga2", "tpe", "random"]


def _different(objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
    if len(set(objectives)) < len(objectives):
        raise ValueError("each objective must be named once")
    return objectives


Objectives = Annotated[tuple[Objective, ...], Field(min_length=1), pydantic.AfterValidator(_different)]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each value must be named once")
    return values


Values = Annotated[tuple[bool | int | float | str, ...], Field(min_length=1), pydantic.AfterValidator(_distinct)]


class RankSettings(Part):
    """The search over elastic ranks after training; each key is an argument of `dovetail.search_ranks`."""

    kind: Literal["ranks"] = "ranks"
    turns: Positive = 10
    neighbours: Positive = 8
    step: Positive = 2
    samples: Positive = 100
    split: Literal["train", "validation"] = "validation"


class Budget(Part):
    """Limits that no candidate exceeds.

    bits_per_weight       mean over the weights under the chain
    nbytes                of the whole model with its adapters
    trainable_parameters  of the last stage
    """

    bits_per_weight: Annotated[float, Field(gt=0)] | None = None
    nbytes: Positive | None = None
    trainable_parameters: Positive | None = None


class LayerSettings(Part):
    """The search over the arguments of the links of each unit of layers, such as bits and ranks (QR-Adaptor).

    space       "bits" of the quantizer, "ranks" of the adapters, or LINK.ARGUMENT -> the values to choose from
    unit        the layers that share their arguments: a block, the layers that serving engines fuse, or one layer
    fixed       pattern of layers -> the links of the recipe's chain with the arguments that these layers keep
    start       the scores that the first candidates are solved from; none: no scores
    proxy       what scores candidates without training them; "super", one training with arguments drawn anew in every
                step, is refused: it predicted no more than the scores of the start (docs/search.md)
    trials      candidates that are trained
    candidates  candidates that the proxy scores; without a proxy it has no effect
    rungs       training steps of the first, second, ... rung of successive halving; none: every trial trains in full
    samples     records that candidates are scored on, and that layers are scored on
    budget      limits that no candidate exceeds
    alpha       weight of the quality in eq. 5, by which the best candidate is chosen and `refine` proposes
    finish      the candidates that are trained in full at the end: the best, the whole front, or none
    """

    kind: Literal["layers"]
    space: dict[str, Values] = Field({"bits": (2, 3, 4, 8), "ranks": (2, 4, 8, 16)}, min_length=1)
    unit: Literal["block", "fused", "layer"] = "fused"
    fixed: dict[str, str] = Field({})
    start: Literal["entropy", "gradient", "uniform", "none"] = "gradient"
    proxy: Literal["none", "super"] = "none"
    sampler: Sampler = "three_stage"
    trials: Positive = 9
    candidates: Positive = 200
    rungs: tuple[Positive, ...] = ()
    samples: Positive = 128
    objectives: Objectives = ("quality", "nbytes")
    budget: Budget = Budget()
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
    finish: Literal["best", "front", "none"] = "best"

    @pydantic.field_validator("rungs")
    @classmethod
    def _rising(cls, rungs: tuple[int, ...]) -> tuple[int, ...]:
        if any(one >= other for one, other in pairwise(rungs)):
            raise ValueError("the steps of the rungs must rise, as in [60, 180, 540]")
        return rungs


class ChainSettings(Part):
    """The search over chains of adapters (CLAM §4): a link and its rank in each slot, and one factor of learning rates.

    prefix         pruners and quantizers before the slots, such as "nf4" or "wanda(0.5) >> nf4"
    slots          the number of adapters of a chain
    suffix         constraints after the slots, such as "remask >> regrid"
    links          what a slot may hold; a link that has a rank takes each of 4, 8, 16, 32 and 64
    ranks          searched; or fixed, with the ranks that `links` states and the factor 1 (CLAM-2*, CLAM-3*)
    learning_rate  scaled: a factor on the rate of each link; or global: one rate for all links (CLAM-2†, CLAM-3†)
    trials         chains that are trained
    sampler        of Optuna or of Dovetail
    pruning        of trials by epoch, where quality is the only objective
    budget         limits that no proposal exceeds
    alpha          weight of the quality in eq. 5 of QR-Adaptor, which chooses the best of several objectives
    seeds          the winner is trained on the whole training split with each of these seeds, and scored on test
    """

    kind: Literal["chains"]
    prefix: str = ""
    slots: Annotated[int, Field(ge=1, le=5)] = 2
    suffix: str = ""
    links: Annotated[tuple[str, ...], Field(min_length=1)] = ("ia3", "lora", "loha", "vera")
    ranks: Literal["searched", "fixed"] = "searched"
    learning_rate: Literal["scaled", "global"] = "scaled"
    trials: Positive = 40
    sampler: Sampler = "tpe"
    pruning: Literal["none", "median", "hyperband"] = "none"
    objectives: Objectives = ("quality",)
    budget: Budget = Budget()
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.7
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = (0, 1, 2)

    @pydantic.model_validator(mode="after")
    def _one_objective(self) -> ChainSettings:
        if self.pruning != "none" and self.objectives != ("quality",):
            raise ValueError("pruning compares qualities: set objectives: [quality], or pruning: none")
        if self.ranks == "fixed" and self.learning_rate == "global":
            raise ValueError("ranks: fixed keeps the learning rates of the links too: set one of the two")
        return self


SEARCHES: dict[str, type[Part]] = {"ranks": RankSettings, "layers": LayerSettings, "chains": ChainSettings}
"""Kind of a search -> its keys."""


def _kind(value: Any) -> str:
    return str(value.get("kind", "ranks")) if isinstance(value, dict) else getattr(value, "kind", "ranks")


Search = Annotated[
    Annotated[RankSettings, pydantic.Tag("ranks")]
    | Annotated[LayerSettings, pydantic.Tag("layers")]
    | Annotated[ChainSettings, pydantic.Tag("chains")],
    pydantic.Discriminator(
        _kind, custom_error_type="kind", custom_error_message="kind must be layers, chains or ranks"
    ),
]
"""The `search` part of a recipe. A part without `kind` searches ranks."""
