"""A search without models, whose trials take as long as a test wants; and processes that work on it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from random import Random

import optuna

from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import TaskInfo
from dovetail.runs.search_settings import ChainSettings
from dovetail.searches.report import Trial
from dovetail.searches.space import Candidate, Fixed, OnScore, Preview, Scored, SearchSpace
from dovetail.searches.study import finished, open_study, work

NAME = "quick"
KILLS = int(os.environ.get("DOVETAIL_TEST_KILLS", "4"))
"""How often a test kills a worker. With more, the tests take longer and find rarer races."""


class QuickSpace(SearchSpace):
    """Integers a and b; quality is largest at a = 30, b = 70, and nbytes grows with a.

    There are so many that no two trials have the same ones by chance.
    """

    def __init__(
        self, trials: int = 6, *, seconds: float = 0.0, sampler: str = "random",
        objectives: Sequence[str] = ("quality",), pruning: str = "none",
    ) -> None:  # fmt: skip
        super().__init__(Recipe.parse({
            "model": "playground", "data": {"task": "word_problems"}, "seed": 3, "merge": "none",
            "search": {
                "kind": "chains", "trials": trials, "sampler": sampler, "objectives": list(objectives),
                "pruning": pruning,
            },
        }))  # fmt: skip
        assert isinstance(self.recipe.search, ChainSettings)
        self.settings, self.seconds = self.recipe.search, seconds
        self.task = TaskInfo(name="quick", kind="generation", metric="exact_match", split="validation")

    def preview(self) -> Preview:
        return Preview(10_000, self.settings.trials, None, None)

    def suggest(self, trial: optuna.Trial) -> None:
        trial.suggest_int("a", 0, 9999)
        trial.suggest_int("b", 0, 9999)

    def candidate_recipe(self, candidate: Candidate) -> Recipe:
        return self.recipe.model_copy(update={"chain": f"lora(r={1 + candidate.params['a']})", "search": None})

    def score(self, candidate: Candidate, report: OnScore) -> Scored:
        time.sleep(self.seconds)
        a, b = candidate.params["a"], candidate.params["b"]
        quality = -((a - 30) ** 2) - (b - 70) ** 2
        for step in range(3):
            report(step, quality * (3 - step))
        return Scored({"quality": quality, "nbytes": 1000 + a}, {"trainable_parameters": a})


class RacingSpace(QuickSpace):
    """The same with two fixed candidates, and a second rung for the best three of them all."""

    def fixed(self, trials: Sequence[Trial]) -> list[Fixed]:
        start = [Fixed(f"start {a}", Candidate({"a": a, "b": 50})) for a in (10, 20)]
        first = [trial for trial in trials if trial.rung == 0]
        if len(first) < self.settings.trials:
            return start
        best = sorted(first, key=lambda trial: -trial.values["quality"])[:3]
        return start + [Fixed(f"rung 1 of trial {trial.number}", Candidate(trial.params, 1)) for trial in best]


def begin(url: str, space: SearchSpace) -> BaseProcess:
    """Start a process that works on the study; a forked one, which has nothing to import."""
    process = multiprocessing.get_context("fork").Process(target=_work, args=(url, space))
    process.start()
    return process


def _work(url: str, space: SearchSpace) -> None:
    with open_study(url, NAME, space, {"recipe": "quick"}) as study:
        work(study, space)


def kill_workers(url: str, space: SearchSpace, *, workers: int, kills: int, seed: int) -> None:
    """Let processes work on the study, and kill -9 one of them so many times at random moments; new ones follow."""
    random = Random(seed)
    processes = [begin(url, space) for _ in range(workers)]
    for _ in range(kills):
        time.sleep(random.uniform(0.05, 0.5))
        place = random.randrange(workers)
        if processes[place].is_alive():
            os.kill(processes[place].pid or 0, signal.SIGKILL)
        processes[place].join()
        processes[place] = begin(url, space)
    for process in processes:
        process.join()
        assert process.exitcode == 0


def check_nothing_lost(url: str, space: SearchSpace, *, workers: int) -> list[Trial]:
    """Every proposed configuration is finished once, none is left, and few are more than asked."""
    with open_study(url, NAME, space, {"recipe": "quick"}) as study:
        states = [trial.state.name for trial in study.get_trials()]
        trials = finished(study, space)
    assert set(states) <= {"COMPLETE", "FAIL"}  # failed: enqueued twice by racing workers, and then left out
    assert len(trials) == states.count("COMPLETE")
    first = [trial for trial in trials if trial.rung == 0]
    asked = space.settings.trials
    assert asked <= len(first) <= asked + workers - 1, [(t.number, t.params) for t in trials]
    configurations = [(trial.rung, *sorted(trial.params.items())) for trial in trials]
    assert len(set(configurations)) == len(configurations)
    assert all(trial.values["quality"] <= 0 for trial in trials)
    return trials
