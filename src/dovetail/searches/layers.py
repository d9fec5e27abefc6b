"""The search over the arguments of each unit of layers, such as its bits and ranks (QR-Adaptor, §3).

    start     scores of every unit and choice on a shortly tuned model, and a knapsack: the best assignment of each size
    propose   the start's front, uniform models, and what the sampler makes of the scored trials
    train     every candidate on one workbench (`searches/trial.py`), in rungs of steps: a third goes on at each rung
    finish    the best candidate, or the front, in full, scored on the test split

Source: QR-Adaptor, §3.1 to §3.3, eq. 5. Differences from the paper: a unit may be finer than a block; the first
candidates solve a knapsack exactly instead of being sampled around one ranking; candidates share their records and
their bases, so that a trial costs its training alone; no candidate exceeds the budget.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from dovetail.chains.check import check
from dovetail.chains.layer.applied import applied
from dovetail.chains.link import Link, arguments
from dovetail.chains.notation import chain
from dovetail.errors import InUse, SearchError
from dovetail.files import check_folder
from dovetail.runs.flow import run
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Report, finite
from dovetail.searches import layer_page
from dovetail.searches.assignment_space import AssignmentSpace, Choice
from dovetail.searches.knapsack import Knapsack
from dovetail.searches.pareto import crowding_distance, pareto_rank
from dovetail.searches.report import SearchReport, Trial
from dovetail.searches.scores import entropy, gradient_scores, weight_errors
from dovetail.searches.space import Candidate, Fixed, OnScore, Preview, Scored
from dovetail.searches.trial import Applied, Workbench

_FACTOR = 3
"""Of the candidates of a rung, one in three goes on to the next (successive halving)."""
_START = 5
"""Points of the start's front that are tried; the paper's population."""
_TUNING = 5
"""The model is tuned for a fifth of a training before its layers are scored."""
_MEASURED_STEPS, _MEASURED_RECORDS = 4, 16
TRIALS, _BASES = "trials", "bases"


class LayerSpace(AssignmentSpace):
    """The search of a recipe over its layers."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._check_rungs()

    def _check_rungs(self) -> None:
        rungs, steps = self.settings.rungs, self.steps
        if rungs and rungs[-1] > steps:
            rule = f"the training of the recipe has {steps} steps, of which each rung trains the first"
            raise SearchError("search.rungs", found=f"{rungs[-1]} steps", rule=rule, fix="raise train.max_steps")
        if self.settings.proxy == "super":
            rule = "a super-adapter predicts no more than the scores of the start do (docs/search.md), so there is none"
            raise SearchError("search.proxy", found="super", rule=rule, fix="set proxy: none")

    # Scores and the start.

    def prepare(self) -> dict[str, Any]:
        """Score every unit with every choice, and solve the start; as JSON, so that one worker does it for all."""
        start, scores = self.uniform(), {}
        if self.settings.start in ("gradient", "entropy"):
            scores = self._scores()
            costs = [[self.cost(unit, choice, self.limited) for choice in self.choices] for unit in self.units]
            knapsack = Knapsack([scores[unit.name] for unit in self.units], costs)
            limit = float("inf") if self.limit is None else self.limit
            count = min(_START, max(1, self.settings.trials - 1))
            front = [[self.choices[index] for index in each] for each in knapsack.front(limit, count)]
            front = [choices for choices in front if self.fits(choices)]
            uniform = [choices for choices in self.uniform() if choices not in front]
            room = max(1, (self.settings.trials - len(front)) // 2)
            start = [*front, *uniform[::-1][:room]]
        elif self.settings.start == "none":
            start = []
        return {"scores": scores, "start": [self.params(choices) for choices in start[: self.settings.trials]]}

    def _scores(self) -> dict[str, list[float]]:
        """Return the loss that is predicted of each unit with each choice; the largest of all units add up to 1.

        Half of it is the error of pruning and quantizing; the other half is what a smaller rank leaves out.
        """
        options = {name: self._applied(name) for unit in self.units for name in unit.layers}
        ranks = [
            max((arguments(link).get("r", 0) for link in self._adapters(choice)), default=0) for choice in self.choices
        ]
        distinct = sorted(set(ranks) - {0})
        make = self._by_gradient if self.settings.start == "gradient" else self._by_entropy
        error, energy = make(options, distinct)
        errors, left = {}, {}
        for unit in self.units:
            applied = [self.chain_of(choice).stages[0].applied for choice in self.choices]
            errors[unit.name] = [sum(error[name, links] for name in unit.layers) for links in applied]
            kept = [sum(energy[name][at] for name in unit.layers) for at in range(len(distinct))]
            left[unit.name] = [kept[-1] - kept[distinct.index(rank)] if rank else 0.0 for rank in ranks]
        worst, most = (sum(max(row) for row in rows.values()) or 1.0 for rows in (errors, left))
        return {
            unit.name: [
                0.5 * one / worst + 0.5 * other / most
                for one, other in zip(errors[unit.name], left[unit.name], strict=True)
            ]
            for unit in self.units
        }

    def _by_gradient(
        self, options: Mapping[str, Sequence[Applied]], ranks: Sequence[int]
    ) -> tuple[dict[tuple[str, Applied], float], Mapping[str, Sequence[float]]]:
        """Return the error of each layer's weights with its applied links, and the gradient's energy at each rank.

        A Fisher score of the error is no better: on a real decoder it is far from the divergence that the error of one
        unit causes, of which the relative error of the weights gives the order (docs/search.md).
        """
        error = weight_errors(self._bench, options)
        if len(ranks) < 2:  # no choice depends on a gradient
            return error, {name: (0.0,) * len(ranks) for name in options}
        with self._bench.tuned(max(1, self.steps // _TUNING)):
            scores = gradient_scores(self._bench, dict.fromkeys(options, ()), ranks, self.settings.samples)
        return error, scores.energy

    def _by_entropy(
        self, options: Mapping[str, Sequence[Applied]], ranks: Sequence[int]
    ) -> tuple[dict[tuple[str, Applied], float], Mapping[str, Sequence[float]]]:
        """Return the same by QR-Adaptor's measure (eq. 6): layers of more information get more bits and larger ranks.

        The information, counted from that of the least informative layer, weights the relative squared error of a
        layer's weights, and the share of the largest rank. It is measured on the tuned model for bits, and for ranks on
        the model that is quantized with the last choice of the space, whose adapters are untrained.
        """
        bench = self._bench
        with bench.tuned(max(1, self.steps // _TUNING)):
            information = _from_least(entropy(bench, self.settings.samples))
        relative = weight_errors(bench, options)
        error = {(name, links): information[name] * value for (name, links), value in relative.items()}
        with bench.candidate(self.layers_of([self.choices[-1]] * len(self.units))):
            quantized = _from_least(entropy(bench, self.settings.samples))
        return error, {name: [quantized[name] * rank / ranks[-1] for rank in ranks] for name in options}

    def _applied(self, name: str) -> list[Applied]:
        """Return the pruners and quantizers of a layer with each choice."""
        if name in self.fixed_layers:
            return [check(chain(self.fixed_layers[name]), self.chain.held).stages[0].applied]
        return list(dict.fromkeys(self.chain_of(choice).stages[0].applied for choice in self.choices))

    def _adapters(self, choice: Choice) -> list[Link]:
        return list(self.chain_of(choice).stages[0].adapters)

    @cached_property
    def _bench(self) -> Workbench:
        """The workbench that all trials of a worker share."""
        calibration = self.recipe.calibration.model_copy(update={"inputs": "original"})
        recipe = self.recipe.model_copy(update={"calibration": calibration, "layers": {}, "search": None})
        layers = applied(self._empty).layers
        pinned = [check(chain(text), self.chain.held) for text in self.fixed_layers.values()]
        starts = any(links.stages[0].keep_start for links in (*self._chains.values(), *pinned))
        return Workbench(
            recipe, self.search_task, applied={name: self._applied(name) for name in layers}, starts=starts,
            samples=self.settings.samples,
            folder=None if self.folder is None else self.folder / f"{_BASES}-{os.getpid()}",
        )  # fmt: skip

    # Trials.

    @property
    def _counts(self) -> list[int]:
        """The candidates of each rung."""
        counts = [self.settings.trials]
        for _ in self.settings.rungs[1:]:
            counts.append(math.ceil(counts[-1] / _FACTOR))
        return counts

    @property
    def trainings(self) -> int:
        return sum(self._counts)

    def fixed(self, trials: Sequence[Trial]) -> list[Fixed]:
        found = [
            Fixed(f"start {place}", Candidate(params)) for place, params in enumerate(self.prepared.get("start", ()))
        ]
        asked = self.settings.trials
        for rung in range(1, len(self.settings.rungs)):
            before = [trial for trial in trials if trial.rung == rung - 1][:asked]
            if len(before) < asked:
                break
            going_on = self._fittest(before)[: math.ceil(asked / _FACTOR)]
            asked = len(going_on)
            found += [
                Fixed(f"rung {rung} of trial {trial.number}", Candidate(trial.params, rung)) for trial in going_on
            ]
        return found

    def _fittest(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the complete trials by Pareto rank, then by crowding distance, the fittest first."""
        import numpy as np

        complete = [trial for trial in trials if trial.state == "complete"]
        if not complete:
            return []
        signs = [-1.0 if direction == "maximize" else 1.0 for direction in self.objectives.values()]
        losses = np.array([
            [sign * trial.values[name] for sign, name in zip(signs, self.objectives, strict=True)] for trial in complete
        ])  # fmt: skip
        rank_n = pareto_rank(losses)
        order = np.lexsort((-crowding_distance(losses, rank_n), rank_n))
        return [complete[place] for place in order]

    def score(self, candidate: Candidate, report: OnScore) -> Scored:
        choices = self.choices_of(candidate.params)
        layers, rungs = self.layers_of(choices), self.settings.rungs
        steps = rungs[candidate.rung] if rungs else None
        try:
            found = self._bench.trial(
                layers, steps, folder=self._checkpoints(candidate.params) if len(rungs) > 1 else None
            )
        except InUse:  # another worker trains the same candidate
            found = self._bench.trial(layers, steps)
        sizes = {
            "nbytes": float(found.footprint.nbytes),
            "trainable_parameters": float(found.footprint.trainable_parameters),
        }
        values = {"quality": found.score, **sizes}
        if "peak_memory" in self.settings.objectives:
            values["peak_memory"] = self.peak_memory(self.candidate_recipe(candidate))
        details = {
            "bits_per_weight": found.footprint.bits_per_weight, "loss": finite(found.loss), "steps": found.steps,
            **sizes,
            "choices": {
                unit.name: self.label(choice) for unit, choice in zip(self.units, choices, strict=True)
            },
        }  # fmt: skip
        return Scored(values, details)

    def _checkpoints(self, params: Mapping[str, Any]) -> Path | None:
        """Return the folder of a candidate's checkpoints, from which its next rung goes on."""
        if self.folder is None:
            return None
        return self.folder / TRIALS / hashlib.sha256(repr(sorted(params.items())).encode()).hexdigest()[:16]

    def preview(self) -> Preview:
        largest = [max(self.choices, key=lambda c, u=unit: self.cost(u, c, "nbytes")) for unit in self.units]
        started = perf_counter()
        bench, layers = self._bench, self.layers_of(largest)
        ready = perf_counter() - started
        records = len(self.search_task.split("validation")[: bench.samples])
        bench.samples = min(records, _MEASURED_RECORDS)
        # The difference leaves out what every training does once.
        seconds = [bench.trial(layers, steps).seconds for steps in (1, 1 + _MEASURED_STEPS)]
        step = max(0.0, seconds[1] - seconds[0]) / _MEASURED_STEPS
        with bench.candidate(layers):
            started = perf_counter()
            bench.score()
            scoring = perf_counter() - started
        once = max(0.0, seconds[0] - step - scoring) + scoring * records / bench.samples
        rungs = self.settings.rungs or (self.steps,)
        counts = [(count, rung - before) for count, rung, before in zip(self._counts, rungs, (0, *rungs), strict=False)]
        tuning = self.steps // _TUNING * step if self.settings.start in ("gradient", "entropy") else 0.0
        finish = {"best": 1, "front": _START, "none": 0}[self.settings.finish] * self.steps * step
        trained = sum(count * (steps * step + once) for count, steps in counts)
        recipe = self.candidate_recipe(Candidate(self.params(largest)))
        return Preview(
            points=len(self.choices) ** len(self.units),
            trials=self.settings.trials,
            seconds=ready + tuning + trained + finish,
            peak_memory_nbytes=self.predicted_peak(recipe),
            facts={
                "units": f"{len(self.units)}, of {sum(len(unit.layers) for unit in self.units)} layers",
                "choices of a unit": f"{len(self.choices)}: " + ", ".join(
                    f"{key} {', '.join(map(str, values))}" for key, values in self.settings.space.items()
                ),
                "rungs": ", ".join(f"{count} x {steps} steps" for count, steps in counts),
            },
        )  # fmt: skip

    # The end.

    def finish(self, folder: Path, report: SearchReport, *, progress: bool) -> dict[str, Any]:
        """Train the best candidate, or the front, in full, and score it on the test split."""
        numbers = {"best": [report.best], "front": report.front, "none": []}[self.settings.finish]
        scores = {}
        for number in numbers:
            place = folder / ("best" if self.settings.finish == "best" else f"trained/{number}")
            if (place / REPORT).is_file():
                done = Report.load(place)
            else:
                check_folder(place)
                done = run(report.recipe(number), output=place, progress=progress)
            scores[str(number)] = {
                "folder": str(place.relative_to(folder)), "score": done.score(done.stages[-1]),
                "exact": None if done.merge is None else done.merge.exact,
            }  # fmt: skip
        shutil.rmtree(folder / TRIALS, ignore_errors=True)
        for place in folder.glob(f"{_BASES}-*"):
            shutil.rmtree(place, ignore_errors=True)
        uniform = {
            label: {name: trial.details[name] for name in ("nbytes", "trainable_parameters")} | trial.values
            for label, trial in layer_page.references(self, report).items()
        }
        return {"split": self.test, "runs": scores, "references": uniform}

    def headline(self, report: SearchReport) -> str:
        return layer_page.headline(self, report)

    def sections(self, report: SearchReport) -> list[str]:
        return layer_page.sections(self, report)


def _from_least(information: Mapping[str, float]) -> dict[str, float]:
    """Return values from 0.1 for the least to 1.1 for the largest, so that no layer counts for nothing."""
    least, most = min(information.values()), max(information.values())
    return {name: 0.1 + (value - least) / ((most - least) or 1.0) for name, value in information.items()}
