"""The report of a search, as `search.json` holds it: the trials, the front and the best of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dovetail.chains.link import format_value
from dovetail.display.format import format_score, size
from dovetail.errors import SearchError
from dovetail.files import read_json, write_whole
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import MAX_NBYTES, ReportPart, TaskInfo
from dovetail.searches.pareto import pareto_rank
from dovetail.searches.samplers.refine import weighted_score

JSON = "search.json"
Direction = Literal["minimize", "maximize"]


class Trial(ReportPart):
    """A candidate that was scored.

    number    in the study
    state     complete; pruned by its scores of early epochs; failed: `problem` says why
    rung      of successive halving, from 0
    params    name -> value, as the sampler proposed them
    values    objective -> value; empty unless the trial is complete
    seconds   of training and scoring
    ended     seconds from the start of the first trial of the study to the end of this one
    recipe    what `dovetail run` trains for this candidate; {} for a trial that failed before it was proposed
    details   what the kind of search remembers of a candidate
    """

    number: int
    state: Literal["complete", "pruned", "failed"]
    rung: int
    params: dict[str, Any]
    values: dict[str, float]
    seconds: float
    ended: float
    recipe: dict[str, Any]
    details: dict[str, Any] = Field(default_factory=dict)
    problem: str = ""

    @property
    def chain(self) -> str:
        """The chain of the candidate."""
        return str(self.recipe.get("chain", ""))

    @property
    def summary(self) -> str:
        """What sets the candidate apart: its chain, or how many units have each value, such as "bits 4 x 3, 8 x 5"."""
        found: dict[str, Counter[str]] = {}
        for name, value in self.params.items():
            unit, _, key = name.rpartition("/")
            if unit:
                found.setdefault(key, Counter())[format_value(value)] += 1
        said = [
            f"{key} {', '.join(f'{value} x {count}' for value, count in sorted(counts.items(), key=_by_number))}"
            for key, counts in found.items()
        ]
        return "; ".join(said) or self.chain


def _by_number(item: tuple[str, int]) -> tuple[float, str]:
    """Return a key that sorts the texts of numbers by their values, and other texts after them."""
    try:
        return float(item[0]), ""
    except ValueError:
        return math.inf, item[0]


class SearchReport(ReportPart):
    """The report of a whole search.

    task         scored; its split is the one that candidates were scored on
    objectives   objective -> direction, in order
    trials       in the order in which they were proposed
    front        numbers of the trials that no other trial dominates, by the first objective
    best         number of the best trial of the front (eq. 5 of QR-Adaptor with the recipe's alpha)
    headline     the result in one sentence
    finish       what the kind of search did with the best candidates
    seconds      of all trials, over all workers
    identity     digests of the recipe, the data and the base; {} in reports of earlier versions
    """

    kind: str
    model: str
    sampler: str
    seed: int
    task: TaskInfo
    objectives: dict[str, Direction]
    trials: list[Trial]
    front: list[int]
    best: int
    headline: str
    finish: dict[str, Any]
    seconds: float
    environment: dict[str, str]
    identity: dict[str, str] = Field(default={})

    def trial(self, number: int) -> Trial:
        """Return a trial by its number; SearchError where there is none."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        rule = f"the search has trials {', '.join(str(trial.number) for trial in self.trials)}"
        raise SearchError(f"trial {number}", found="no such trial", rule=rule[:300], fix="name one of these")

    def recipe(self, trial: int | Trial) -> Recipe:
        """Return the recipe of a candidate, ready for `dovetail.run`."""
        found = self.trial(trial) if isinstance(trial, int) else trial
        if not found.recipe:
            rule = "a trial that failed before it was proposed has no recipe"
            raise SearchError(f"trial {found.number}", found=found.problem, rule=rule, fix="name another trial")
        return Recipe.parse(found.recipe)

    def save(self, directory: Path) -> None:
        """Write search.json atomically."""
        write_whole(directory / JSON, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> SearchReport:
        """Read the search.json of a folder; raise LoadError where it is none."""
        rule, fix = "the folder of a search must contain a search.json", "pass the folder given as --output"
        return read_json(Path(directory) / JSON, cls, rule=rule, fix=fix, limit=MAX_NBYTES)


def format_objective(objective: str, value: float, metric: str) -> str:
    """Format the value of an objective; `metric` is the metric of the task, which quality is."""
    if objective == "quality":
        return format_score(metric, value)
    return f"{value:,.0f}" if objective == "trainable_parameters" else size(value)


def front(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> list[Trial]:
    """Return the complete trials that no other one dominates, by the first objective, the best first.

    Of several trials of one candidate, the one of the highest rung counts. Of equal candidates the first one counts.
    """
    last: dict[str, Trial] = {}
    for trial in _complete(trials):
        key = repr(sorted(trial.params.items()))
        if key not in last or trial.rung > last[key].rung:
            last[key] = trial
    if not last:
        return []
    ranks = pareto_rank(np.array([_losses(trial, objectives) for trial in last.values()]))
    found: dict[tuple[float, ...], Trial] = {}
    for trial, rank in zip(last.values(), ranks, strict=True):
        if rank == 1:
            found.setdefault(_losses(trial, objectives), trial)
    return [found[losses] for losses in sorted(found)]


def best(trials: Sequence[Trial], objectives: Mapping[str, Direction], alpha: float) -> Trial:
    """Return the trial of the front with the largest weighted sum of its z-scored objectives (QR-Adaptor, eq. 5).

    The objectives are z-scored over the complete trials. The first one has the weight alpha. With rungs, the trials of
    the last one are compared: others were trained for fewer steps.
    """
    complete, shown = _complete(trials), front(trials, objectives)
    scores = weighted_score(np.array([_losses(trial, objectives) for trial in complete]), alpha)
    of_trial = {trial.number: score for trial, score in zip(complete, scores, strict=True)}
    last = max(trial.rung for trial in shown)
    return max((t for t in shown if t.rung == last), key=lambda trial: (of_trial[trial.number], -trial.number))


def _complete(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == "complete"]


def _losses(trial: Trial, objectives: Mapping[str, Direction]) -> tuple[float, ...]:
    """Return the values of a trial in the order of the objectives, signed so that smaller is better."""
    return tuple(
        -trial.values[name] if direction == "maximize" else trial.values[name] for name, direction in objectives.items()
    )


def growth(trials: Sequence[Trial], objectives: Mapping[str, Direction]) -> list[tuple[int, float, float]]:
    """Return how the front grew: (finished trials, seconds since the search began, value) after each complete trial.

    The value is the best objective so far; with several objectives the hypervolume of the front so far, each objective
    scaled to [0, 1] over all complete trials, with the reference point 1.1.
    """
    done = sorted(_complete(trials), key=lambda trial: trial.ended)
    if len(objectives) == 1:
        (name,) = objectives
        choose = max if objectives[name] == "maximize" else min
        so_far = [choose(trial.values[name] for trial in done[: count + 1]) for count in range(len(done))]
        return [(count + 1, trial.ended, value) for count, (trial, value) in enumerate(zip(done, so_far, strict=True))]
    from optuna._hypervolume import compute_hypervolume

    losses_nm = np.array([_losses(trial, objectives) for trial in done])
    spans = np.ptp(losses_nm, axis=0)
    scaled_nm = (losses_nm - losses_nm.min(axis=0)) / np.where(spans > 0, spans, 1.0)
    reference = np.full(len(objectives), 1.1)
    return [
        (count + 1, trial.ended, float(compute_hypervolume(scaled_nm[: count + 1], reference)))
        for count, trial in enumerate(done)
    ]
