"""What a kind of search implements: which candidates there are, the recipe of each, and how one is scored.

The search itself (`searches/flow.py`) and its workers (`searches/study.py`) know no kinds. A search goes like this:

    space = ...                                         checks the recipe; no weights are read
    space.begin(space.prepare())                        by one worker; the others read it from the study
    until `trials` candidates of rung 0 are scored:     in every worker, which share nothing but the study
        for each of space.fixed(trials):                candidates that are tried in any case: a start population, and
            enqueue it                                  the survivors of a rung
        trial = study.ask()
        space.suggest(trial)                            the sampler proposes what is not fixed yet
        space.score(candidate, report)                  trains and measures it
    space.finish(folder, report)                        once, by one worker

A worker may be killed at any time, and another one repeats the trial with the same parameters. So everything that is
random follows from the recipe's seed and the candidate's parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import TaskInfo
from dovetail.runs.search_settings import ChainSettings, LayerSettings
from dovetail.searches.report import Direction, SearchReport, Trial
from dovetail.tasks.task import LOWER_IS_BETTER

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

OnScore = Callable[[int, float], None]
"""Called with a step, from 0, and the quality at that step. It raises optuna.TrialPruned to end the trial."""


@dataclass(frozen=True)
class Candidate:
    """A point of the space.

    params   name -> value: what `suggest` asked the trial for
    rung     of successive halving, from 0; 0 without rungs
    """

    params: Mapping[str, Any]
    rung: int = 0


@dataclass(frozen=True)
class Fixed:
    """A candidate that is tried whatever the sampler proposes.

    key         names it among all fixed candidates of the study, such as "start 3" or "rung 1 of trial 5"
    candidate   its parameters; those that it leaves out are sampled
    """

    key: str
    candidate: Candidate


@dataclass(frozen=True)
class Scored:
    """The result of a trial.

    values   objective -> value, of at least the objectives of the search
    details  what the report shows beside it; must be writable as JSON
    """

    values: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """What a search will cost.

    points     number of candidates in the space; None where it is not counted
    trials     candidates that are scored
    seconds    predicted from a few measured training steps of the largest candidate, for one worker; None where
               it is not predicted
    peak_memory_nbytes  predicted, of the largest candidate; None where it is not predicted
    facts      further lines: name -> text
    """

    points: int | None
    trials: int
    seconds: float | None
    peak_memory_nbytes: int | None
    facts: Mapping[str, str] = field(default_factory=dict)


class SearchSpace(ABC):
    """The candidates of one recipe. The constructor checks everything that needs no weights.

    recipe    of the search
    settings  its `search` part
    prepared  what `prepare` returned
    folder    for files that make repeated trials cheaper, such as checkpoints; None: without them
    task      what candidates are scored on; its split is the search's validation split
    """

    settings: ChainSettings | LayerSettings
    task: TaskInfo

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.prepared: dict[str, Any] = {}
        self.folder: Path | None = None

    @property
    def objectives(self) -> dict[str, Direction]:
        """Objective -> direction; quality is the first one, which has the weight alpha."""
        names = sorted(self.settings.objectives, key=lambda name: name != "quality")
        quality: Direction = "minimize" if self.task.metric in LOWER_IS_BETTER else "maximize"
        return {name: quality if name == "quality" else "minimize" for name in names}

    @abstractmethod
    def preview(self) -> Preview:
        """Return what the search will cost. It may load the model and measure a few steps."""

    def fixed(self, trials: Sequence[Trial]) -> Sequence[Fixed]:
        """Return the candidates that must be tried, given the finished trials of the study.

        Every worker calls this before each trial, and a candidate whose key is in the study already is not tried again.
        The result must depend on the arguments alone. Candidates of a rung above 0 do not count towards `trials`.
        """
        return ()

    def prepare(self) -> dict[str, Any]:
        """Return what all workers share before the first trial, such as scores of layers; writable as JSON.

        It follows from the recipe alone. The worker that makes it first keeps it in the study.
        """
        return {}

    def begin(self, prepared: dict[str, Any]) -> None:
        """Take what `prepare` returned, in this process or in another one."""
        self.prepared = prepared

    @property
    def trainings(self) -> int:
        """The number of trials, with those of later rungs."""
        return self.settings.trials

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """The distribution of each parameter, where all candidates have the same ones; else {}."""
        return {}

    def repaired(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the candidate to try in place of this one, which may exceed the budget; only with `distributions`."""
        return dict(params)

    @abstractmethod
    def suggest(self, trial: optuna.Trial) -> None:
        """Ask the trial for all parameters of a candidate, which is legal and within the budget whatever they are."""

    @abstractmethod
    def candidate_recipe(self, candidate: Candidate) -> Recipe:
        """Return the recipe with which `dovetail run` trains a candidate in full."""

    @abstractmethod
    def score(self, candidate: Candidate, report: OnScore) -> Scored:
        """Train and measure a candidate.

        report   takes the quality as training goes on, which pruning needs

        The first call of a worker loads the model. Raises NotFinite or TrainError where the training of this candidate
        diverges; the trial has failed then, and the search goes on. Other errors end the search.
        """

    def finish(self, folder: Path, report: SearchReport, *, progress: bool) -> dict[str, Any]:
        """Train what the recipe asks for at the end, in `folder`; return what the report holds of it as `finish`.

        A killed search calls this again with the same folder, so that finished trainings are kept. The key
        "references", name -> objective -> value, holds models that the page shows beside the trials.
        """
        return {}

    def headline(self, report: SearchReport) -> str:
        """Return the result in one sentence; `report` has everything but the headline."""
        return ""

    def sections(self, report: SearchReport) -> list[str]:
        """Return further sections of report.html (`dovetail.display.html.section`)."""
        return []
