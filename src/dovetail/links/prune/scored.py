"""Pruning by a score: one function computes the importance of each weight, all else is shared.

    keep = the weights with the highest scores of each row, of the layer, or of every M consecutive inputs (N:M)

SQFT (Munoz et al. 2024, §2.1) writes the score as an arbitrary function Ψ of the weight and its input. `scoring` makes
a link of such a function. The remaining weights keep their values. A method that updates them, such as SparseGPT, is a
`Pruner` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from dovetail.chains.link import arguments
from dovetail.chains.registry import links, register
from dovetail.chains.statistics import InputStatistics
from dovetail.errors import ChainError, DovetailError
from dovetail.links.prune.pattern import SparsityPruner
from dovetail.links.prune.select import keep_pattern, keep_top


@dataclass(frozen=True)
class ScoredPruner(SparsityPruner):
    """Keeps the weights with the highest scores; made by `scoring`.

    per  weights are compared within the "layer" or within each output "row"; a pattern compares within windows
    """

    score: ClassVar[Callable[..., Tensor]]

    per: Literal["layer", "row"] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self.name, "allocation", self.allocation, ("uniform", "outlier"))
        _one_of(self.name, "per", self.per, ("layer", "row"))

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self.name, arguments(self))  # the class may be bound to another name than its own

    def scores(self, weight_oi: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Return the scores of the function; raise DovetailError where they are not scores of this weight."""
        if not self.statistics:
            return self._checked(self.score(weight_oi), weight_oi, None)
        assert inputs is not None
        return self._checked(self.score(weight_oi, inputs.norm_i), weight_oi, inputs.norm_i)

    def prune(self, weight_oi: Tensor, inputs: InputStatistics | None) -> tuple[Tensor, Tensor]:
        scores_oi = self.scores(weight_oi, inputs)
        if self.window is not None:
            self.check_width(self.name, weight_oi.shape[1])
            keep = keep_pattern(scores_oi, *self.window)
        elif self.per == "row":
            keep = keep_top(scores_oi, self.sparsity)
        else:
            keep = keep_top(scores_oi.reshape(1, -1), self.sparsity).view_as(scores_oi)
        return keep, weight_oi

    def _checked(self, scores: object, weight_oi: Tensor, input_norm_i: Tensor | None) -> Tensor:
        fix = f"check the function that scores {self.name}"
        if not isinstance(scores, Tensor) or scores.shape != weight_oi.shape or not scores.is_floating_point():
            found = repr(scores)[:200]
            if isinstance(scores, Tensor):
                found = f"scores of shape {tuple(scores.shape)} and type {scores.dtype}"
            rule = f"scores must be floating-point numbers, one per weight, of shape {tuple(weight_oi.shape)}"
            raise DovetailError(self.name, found=found, rule=rule, fix=fix)
        bad = scores.numel() - int(torch.isfinite(scores).sum())
        if bad:
            cause = ""
            if not bool(torch.isfinite(weight_oi).all()):
                cause, fix = ", as are weights", "check the checkpoint"
            elif input_norm_i is not None and not bool(torch.isfinite(input_norm_i).all()):
                cause, fix = ", as are the layer's inputs", "check the calibration data, or load the model in float32"
            found = f"{bad} of {scores.numel()} scores are NaN or infinite{cause}"
            raise DovetailError(self.name, found=found, rule="scores must be finite", fix=fix)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


Score = Callable[..., Tensor]
"""(weight_oi, input_norm_i) -> scores, or (weight_oi) -> scores where nothing is known of the input."""


def scoring(
    name: str, *, per: Literal["layer", "row"], calibrated: bool, summary: str, source: str
) -> Callable[[Score], type[ScoredPruner]]:
    """Return a decorator that registers a pruner which keeps the weights with the highest scores.

    name        of the link in chains: `name(0.5, pattern="2:4")`
    per         where weights are compared unless the chain says otherwise: in the "layer" or in each output "row"
    calibrated  whether the score needs the input: the function is called with (weight_oi, input_norm_i) then, and with
                (weight_oi) otherwise. weight_oi (o, i) has any float dtype; input_norm_i (i,) float32 is the L2 norm of
                each input feature over the calibration tokens
    summary, source   what `dovetail methods` tells

    The function returns (o, i), any float dtype, finite, larger is more important. `Class.score` is the function.
    """
    _one_of(name, "per", per, ("layer", "row"))  # now, not when the first chain names it

    def add(score: Score) -> type[ScoredPruner]:
        cls = cast(
            type[ScoredPruner],
            make_dataclass(
                name.title().replace("_", ""),
                [("per", Literal["layer", "row"], per)],
                bases=(ScoredPruner,),
                frozen=True,
                namespace={
                    "score": staticmethod(score),
                    "statistics": frozenset({"norm"}) if calibrated else frozenset(),
                    "summary": summary,
                    "source": source,
                    "__doc__": score.__doc__,
                },
            ),
        )
        cls.__module__ = score.__module__
        return register(name)(cls)

    return add


def _remake(name: str, values: dict[str, Any]) -> Any:
    return links()[name](**values)


def _one_of(method: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        rule = f"{name} must be {' or '.join(allowed)}"
        raise ChainError(method, found=f"{name}={value!r}", rule=rule, fix=f"set {name}={allowed[0]}")
