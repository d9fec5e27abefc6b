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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from html import escape
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from dovetail.chains.assignment import assign
from dovetail.chains.check import check, check_merge
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.held import held
from dovetail.chains.layer.linear import adapter_dtype
from dovetail.chains.link import Adapter, Chain, Link, Quantizer, format_value
from dovetail.chains.notation import chain
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.footprint import stored_nbytes
from dovetail.checkpoint.load import held_in
from dovetail.compression.apply import apply_on_meta
from dovetail.display.format import format_score, metric_name
from dovetail.display.html import html_table, section
from dovetail.errors import ChainError, InUse, SearchError
from dovetail.files import check_folder
from dovetail.models.targets import find_targets, matches
from dovetail.runs.flow import run
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Report, TaskInfo, finite
from dovetail.runs.search_settings import LayerSettings
from dovetail.searches.knapsack import Knapsack
from dovetail.searches.pareto import crowding_distance, pareto_rank
from dovetail.searches.report import SearchReport, Trial, format_objective
from dovetail.searches.scores import entropy, gradient_scores
from dovetail.searches.space import Candidate, Fixed, OnScore, Preview, Scored
from dovetail.searches.task_space import TaskSpace
from dovetail.searches.trial import Applied, Workbench, check_one_stage
from dovetail.searches.units import Unit, units

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import CategoricalDistribution

_FACTOR = 3
"""Of the candidates of a rung, one in three goes on to the next (successive halving)."""
_START = 5
"""Points of the start's front that are tried; the paper's population."""
_TUNING = 5
"""The model is tuned for a fifth of a training before its layers are scored."""
_MEASURED_STEPS = 4
TRIALS, _BASES = "trials", "bases"

Choice = tuple[int, ...]
"""The index of a value for each key of the space."""


@dataclass(frozen=True)
class Size:
    """What layers store with one choice.

    weight_nbytes   of the pruned and quantized weights, with masks
    nbytes          with adapters, and all else
    parameters      trained
    """

    weight_nbytes: int
    nbytes: int
    parameters: int


class LayerSpace(TaskSpace):
    """The assignments of a recipe (`dovetail.runs.search_settings.LayerSettings`)."""

    settings: LayerSettings

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.search, LayerSettings)
        self.settings = recipe.search
        assignment = assign(recipe.chain, recipe.layers, held_in(recipe.model))
        self.chain = assignment.chain
        check_one_stage(assignment)
        if recipe.merge == "exact":
            check_merge(self.chain)
        self.task = TaskInfo.of(self.search_task, "validation", self.settings.samples)
        self.keys = _keys(self.settings.space, self.chain)
        self._check_rungs()
        self._empty = self.empty_model()
        targets = find_targets(self._empty, recipe.targets)
        self.fixed_layers = self._fixed(targets)
        free = [target for target in targets if target.name not in self.fixed_layers]
        if not free:
            rule = "at least one target must be left to search"
            raise SearchError("search.fixed", found="every target", rule=rule, fix="remove a pattern of search.fixed")
        self.units = units(self._empty, free, self.settings.unit)
        apply_on_meta(self._empty, recipe.chain, recipe.targets)
        self.choices: list[Choice] = list(product(*(range(len(values)) for values in self.settings.space.values())))
        self._chains = {choice: self._chain_with(choice) for choice in self.choices}
        self.sizes = self._sizes()
        self._check_budget()

    # The space.

    def _fixed(self, targets: Sequence[Any]) -> dict[str, str]:
        """Return layer -> chain of the layers that `fixed` or the recipe's `layers` pin."""
        pinned = {**self.recipe.layers, **self.settings.fixed}
        assign(self.recipe.chain, pinned, self.chain.held).on(targets, lambda name: held(self._empty, name))
        return {
            target.name: str(chain(text))
            for pattern, text in pinned.items()
            for target in targets
            if matches(target, pattern)
        }

    def chain_of(self, choice: Choice) -> CheckedChain:
        """Return the chain of a layer with this choice."""
        return self._chains[choice]

    def _chain_with(self, choice: Choice) -> CheckedChain:
        """Return the chain with the values of a choice; ChainError for a value that an argument cannot have."""
        links = list(self.chain.links)
        try:
            for (key, values), index in zip(self.settings.space.items(), choice, strict=True):
                for place, argument in self.keys[key]:
                    links[place] = replace(links[place], **{argument: values[index]})
            return check(chain(str(Chain(tuple(links)))), self.chain.held)  # the notation checks the types
        except ChainError as error:
            where = f"search.space with {self.label(choice)}"
            raise ChainError(where, found=error.found, rule=error.rule, fix=error.fix) from None

    def _sizes(self) -> dict[tuple[str, Choice], Size]:
        """Return the size of each unit with each choice; ChainError where a choice cannot be used on a layer."""
        return {
            (unit.name, choice): _total(self._size(name, links) for name in unit.layers)
            for unit in self.units
            for choice, links in self._chains.items()
        }

    def _size(self, name: str, links: Chain) -> Size:
        """Return the size of a layer under a chain; ChainError where a link cannot be used on it."""
        record = applied(self._empty)
        layer = record.layers[name]
        checked = check(chain(str(links)), record.assignment.at(name).held)  # a layer may have another grid than others
        for link in checked:
            link.check(layer.site)
        o, i = layer.base.shape
        quantizer, stage = checked.quantizer, checked.stages[0]
        weight = o * i * layer.base.dtype.itemsize if quantizer is None else quantizer.stored_nbytes(layer.site)
        weight += o * -(-i // 8) if stage.keep_mask else 0
        parameters = sum(math.prod(s) for link in stage.adapters for s in link.parameter_shapes(layer.site).values())
        return Size(weight, weight + parameters * adapter_dtype(layer.base.dtype).itemsize, parameters)

    @cached_property
    def _outside(self) -> tuple[Size, int]:
        """What all candidates share, the layers that are fixed included; and the number of weights under the chain."""
        layers = applied(self._empty).layers
        fixed = _total(self._size(name, chain(text)) for name, text in self.fixed_layers.items())
        inside = [p for layer in layers.values() for p in layer.links.parameters()]
        chained = sum(stored_nbytes(layer.base) for layer in layers.values()) + sum(p.nbytes for p in inside)
        trained = sum(p.numel() for p in self._empty.parameters() if p.requires_grad) - sum(p.numel() for p in inside)
        rest = Size(0, stored_nbytes(self._empty) - chained, trained)
        return _total([fixed, rest]), sum(math.prod(layer.base.shape) for layer in layers.values())

    def size(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Return nbytes, trainable_parameters and bits_per_weight of an assignment: a choice for each unit."""
        outside, weights = self._outside
        parts = (self.sizes[unit.name, choice] for unit, choice in zip(self.units, choices, strict=True))
        found = _total([outside, *parts])
        return {
            "nbytes": found.nbytes,
            "trainable_parameters": found.parameters,
            "bits_per_weight": 8 * found.weight_nbytes / weights,
        }

    def fits(self, choices: Sequence[Choice]) -> bool:
        """Return whether an assignment is within the budget."""
        return not self._exceeded(choices)

    def _exceeded(self, choices: Sequence[Choice]) -> list[str]:
        """Return the limits of the budget that an assignment exceeds."""
        found = self.size(choices)
        return [name for name, limit in self.settings.budget if limit is not None and found[name] > limit]

    def _check_budget(self) -> None:
        """Raise SearchError for a budget below the smallest assignment, or above the largest."""
        for name, limit in self.settings.budget:
            if limit is None:
                continue
            ends = [
                self.size([choose(self.choices, key=lambda c, u=unit: self._cost(u, c, name)) for unit in self.units])
                for choose in (min, max)
            ]
            least, most = (end[name] for end in ends)
            if not least <= limit <= most:
                rule = f"the smallest assignment has {least:,} and the largest {most:,}"  # all digits: both are legal
                fix = f"set search.budget.{name} from the one to the other, or leave it out"
                raise SearchError(f"search.budget.{name}", found=f"{limit:,}", rule=rule, fix=fix)

    def _cost(self, unit: Unit, choice: Choice, name: str) -> float:
        """Return what a unit with a choice adds to a limit of the budget."""
        field = {"bits_per_weight": "weight_nbytes", "trainable_parameters": "parameters"}.get(name, "nbytes")
        return getattr(self.sizes[unit.name, choice], field)

    def _check_rungs(self) -> None:
        rungs, steps = self.settings.rungs, self.steps
        if rungs and rungs[-1] > steps:
            rule = f"the training of the recipe has {steps} steps, of which each rung trains the first"
            raise SearchError("search.rungs", found=f"{rungs[-1]} steps", rule=rule, fix="raise train.max_steps")
        if self.settings.proxy == "super":
            rule = "this version scores candidates by training alone"
            raise SearchError("search.proxy", found="super", rule=rule, fix="set proxy: none")

    # Parameters of a trial: a value for each unit and key.

    def params(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return an assignment as the parameters of a trial."""
        return {
            f"{unit.name}/{key}": values[index]
            for unit, choice in zip(self.units, choices, strict=True)
            for (key, values), index in zip(self.settings.space.items(), choice, strict=True)
        }

    def choices_of(self, params: Mapping[str, Any]) -> list[Choice]:
        """Return the choice of each unit; the reverse of `params`. A key with one value may be left out."""
        return [
            tuple(
                values.index(params.get(f"{unit.name}/{key}", values[0])) for key, values in self.settings.space.items()
            )
            for unit in self.units
        ]

    @property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        from optuna.distributions import CategoricalDistribution

        return {
            f"{unit.name}/{key}": CategoricalDistribution(values)
            for unit in self.units
            for key, values in self.settings.space.items()
        }

    def suggest(self, trial: optuna.Trial) -> None:
        for name, distribution in self.distributions.items():
            trial.suggest_categorical(name, distribution.choices)

    def repaired(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters, moved into the budget: the units that save most for their score step down first."""
        choices = self.choices_of(params)
        while over := self._exceeded(choices):
            steps = [
                (_differing(choice, smaller) > 1, self._loss(unit, smaller) - self._loss(unit, choice), place, smaller)
                for place, (unit, choice) in enumerate(zip(self.units, choices, strict=True))
                for smaller in self.choices
                if self._saves(unit, choice, smaller, over)
            ]
            *_, place, smaller = min(steps)
            choices[place] = smaller
        return {name: value for name, value in self.params(choices).items() if name in params}

    def _saves(self, unit: Unit, choice: Choice, smaller: Choice, over: Sequence[str]) -> bool:
        """Return whether a step lowers one of the limits that the assignment exceeds, and adds to no limit."""
        limits = [name for name, limit in self.settings.budget if limit is not None]
        added = {name: self._cost(unit, smaller, name) - self._cost(unit, choice, name) for name in limits}
        return max(added.values()) <= 0 and any(added[name] < 0 for name in over)

    def _loss(self, unit: Unit, choice: Choice) -> float:
        """Return the loss that the scores predict of a unit with a choice; without scores, by its bytes saved."""
        scores = self.prepared.get("scores")
        if scores:
            return scores[unit.name][self.choices.index(choice)]
        return -self._cost(unit, choice, "nbytes") / max(self._cost(unit, each, "nbytes") for each in self.choices)

    def layers_of(self, choices: Sequence[Choice]) -> dict[str, str]:
        """Return the `layers` of a recipe: the chain of each layer that differs from the recipe's chain."""
        common = str(self.chain)
        found = dict(self.fixed_layers)
        for unit, choice in zip(self.units, choices, strict=True):
            text = str(self.chain_of(choice))
            found |= dict.fromkeys(unit.layers, text)
        return {name: text for name, text in found.items() if text != common}

    def candidate_recipe(self, candidate: Candidate) -> Recipe:
        layers = self.layers_of(self.choices_of(candidate.params))
        calibration = self.recipe.calibration.model_copy(update={"inputs": "original"})
        changed = {"layers": layers, "search": None, "output": None, "calibration": calibration}
        return self.recipe.model_copy(update=changed)

    # Scores and the start.

    def prepare(self) -> dict[str, Any]:
        """Score every unit with every choice, and solve the start; as JSON, so that one worker does it for all."""
        start, scores = self._uniform(), {}
        if self.settings.start in ("gradient", "entropy"):
            scores = self._scores()
            costs = [[self._cost(unit, choice, self._limited) for choice in self.choices] for unit in self.units]
            knapsack = Knapsack([scores[unit.name] for unit in self.units], costs)
            limit = self._limit or float("inf")
            count = min(_START, max(1, self.settings.trials - 1))
            front = [[self.choices[index] for index in each] for each in knapsack.front(limit, count)]
            front = [choices for choices in front if self.fits(choices)]
            uniform = [choices for choices in self._uniform() if choices not in front]
            room = max(1, (self.settings.trials - len(front)) // 2)
            start = [*front, *uniform[::-1][:room]]
        elif self.settings.start == "none":
            start = []
        return {"scores": scores, "start": [self.params(choices) for choices in start[: self.settings.trials]]}

    @property
    def _limited(self) -> str:
        """The limit of the budget that the knapsack works with; bytes without a budget."""
        return next((name for name, limit in self.settings.budget if limit is not None), "nbytes")

    @property
    def _limit(self) -> float | None:
        """What the units may cost of that limit."""
        limit = getattr(self.settings.budget, self._limited)
        if limit is None:
            return None
        outside, weights = self._outside
        shares = {"nbytes": limit - outside.nbytes, "trainable_parameters": limit - outside.parameters}
        return shares.get(self._limited, limit * weights / 8 - outside.weight_nbytes)

    def _uniform(self) -> list[list[Choice]]:
        """Return the assignments within the budget that give all units one choice, the smallest first.

        Arguments of adapters are those of the recipe, where the space has them, else those in the middle.
        """
        indices: list[Sequence[int]] = []
        for key, values in self.settings.space.items():
            links = [self.chain.links[place] for place, _ in self.keys[key]]
            if any(isinstance(link, Adapter) for link in links):
                own = getattr(links[0], self.keys[key][0][1])
                indices.append([values.index(own) if own in values else len(values) // 2])
            else:
                indices.append(range(len(values)))
        found = [[choice] * len(self.units) for choice in product(*indices)]
        return sorted(filter(self.fits, found), key=lambda choices: self.size(choices)["nbytes"])

    def _scores(self) -> dict[str, list[float]]:
        """Return the loss that is predicted of each unit with each choice; the largest of all units add up to 1.

        Half of it is the error of pruning and quantizing; the other half is what a smaller rank leaves out.
        """
        options = {name: self._applied(name) for unit in self.units for name in unit.layers}
        ranks = [max((getattr(link, "r", 0) for link in self._adapters(choice)), default=0) for choice in self.choices]
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
        """Return the Fisher score of each layer's applied links, and the gradient's energy at each rank."""
        with self._bench.tuned(max(1, self.steps // _TUNING)):
            found = gradient_scores(self._bench, options, ranks, self.settings.samples)
        return found.fisher, found.energy

    def _by_entropy(
        self, options: Mapping[str, Sequence[Applied]], ranks: Sequence[int]
    ) -> tuple[dict[tuple[str, Applied], float], Mapping[str, Sequence[float]]]:
        """Return the same by QR-Adaptor's measure (eq. 6): layers of more information get more bits and larger ranks.

        The information, counted from that of the least informative layer, weights the relative squared error of a
        layer's weights, and the share of the largest rank. It is measured on the tuned model for bits, and on the
        quantized one for ranks.
        """
        bench = self._bench
        with bench.tuned(max(1, self.steps // _TUNING)):
            information = _from_least(entropy(bench, self.settings.samples))
        error = {}
        for name, choices in options.items():
            original = bench.base(name, ()).matrix(torch.float32)
            for links in choices:
                change = bench.base(name, links).matrix(torch.float32) - original
                relative = float(change.square().sum() / original.square().sum().clamp_min(1e-30))
                error[name, links] = information[name] * relative
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

    def label(self, choice: Choice) -> str:
        """Return a choice in words: "bits 4, ranks 8"."""
        return ", ".join(
            f"{key} {format_value(values[index])}"
            for (key, values), index in zip(self.settings.space.items(), choice, strict=True)
        )

    def _checkpoints(self, params: Mapping[str, Any]) -> Path | None:
        """Return the folder of a candidate's checkpoints, from which its next rung goes on."""
        if self.folder is None:
            return None
        return self.folder / TRIALS / hashlib.sha256(repr(sorted(params.items())).encode()).hexdigest()[:16]

    def preview(self) -> Preview:
        largest = [max(self.choices, key=lambda c, u=unit: self._cost(u, c, "nbytes")) for unit in self.units]
        started = perf_counter()
        bench = self._bench
        ready = perf_counter() - started
        seconds = []
        for steps in (1, 1 + _MEASURED_STEPS):  # the difference leaves out what every training does once
            seconds.append(bench.trial(self.layers_of(largest), steps).seconds)
        step = max(0.0, seconds[1] - seconds[0]) / _MEASURED_STEPS
        once = max(0.0, seconds[0] - step)
        rungs = self.settings.rungs or (self.steps,)
        counts = [(count, rung - before) for count, rung, before in zip(self._counts, rungs, (0, *rungs), strict=False)]
        scoring = self.steps // _TUNING * step if self.settings.start in ("gradient", "entropy") else 0.0
        finish = {"best": 1, "front": _START, "none": 0}[self.settings.finish] * self.steps * step
        trained = sum(count * (steps * step + once) for count, steps in counts)
        recipe = self.candidate_recipe(Candidate(self.params(largest)))
        return Preview(
            points=len(self.choices) ** len(self.units),
            trials=self.settings.trials,
            seconds=ready + scoring + trained + finish,
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
            for label, trial in self._references(report).items()
        }
        return {"split": self.test, "runs": scores, "references": uniform}

    def _references(self, report: SearchReport) -> dict[str, Trial]:
        """Return the uniform models among the trials, by their labels, each at its highest rung."""
        known = {repr(sorted(self.params(c).items())): f"uniform {self.label(c[0])}" for c in self._uniform()}
        found: dict[str, Trial] = {}
        for trial in sorted(report.trials, key=lambda trial: trial.rung):
            label = known.get(repr(sorted(trial.params.items())))
            if label is not None and trial.state == "complete":
                found[label] = trial
        return found

    def headline(self, report: SearchReport) -> str:
        winner, metric = report.trial(report.best), report.task.metric
        bits = f"{winner.details['bits_per_weight']:.3g} bits per weight"
        if "quality" not in report.objectives:
            objective = next(iter(report.objectives))
            value = format_objective(objective, winner.values[objective], metric)
            return f"The best candidate by {objective.replace('_', ' ')}: {value}, with {bits}"
        score = format_score(metric, winner.values["quality"])
        said = f"{metric_name(metric)} {score} at {winner.details['bits_per_weight']:.3g} bits per weight"
        uniform = self._references(report)
        label = next((name for name, trial in uniform.items() if trial.params == winner.params), None)
        if label is not None:
            return f"No mixture is better than the {label} model: {said}"
        sign = -1.0 if report.objectives.get("quality") == "minimize" else 1.0
        as_small = {
            name: trial for name, trial in uniform.items()
            if trial.rung == winner.rung and trial.details["nbytes"] <= winner.details["nbytes"]
        }  # fmt: skip
        if not as_small:
            return f"The best mixture: {said}; no uniform model of its size was trained as long"
        name, best = max(as_small.items(), key=lambda item: sign * item[1].values["quality"])
        other = format_score(metric, best.values["quality"])
        if sign * best.values["quality"] >= sign * winner.values["quality"]:
            return f"No mixture is better than the {name} model of the same size, with {other}: {said}"
        return f"The best mixture: {said}; the {name} model, no larger, has {other}"

    def sections(self, report: SearchReport) -> list[str]:
        chosen = report.trial(report.best).details["choices"]
        found = [section("Chosen for each unit", self._picture(self.choices_of(report.trial(report.best).params)))]
        if scores := self.prepared.get("scores"):
            found.append(section("Scores of the units", self._score_table(scores, chosen)))
        note = "Layers are calibrated on the outputs of the original blocks, in all trials and in the final training."
        return [*found, f'<p class="note">{escape(note)}</p>']

    def _picture(self, choices: Sequence[Choice]) -> str:
        """Draw a table with a row for each block and a column for each unit in it; darker cells have larger values."""
        cells: dict[str, dict[str, str]] = {}
        columns: dict[str, None] = {}
        for unit, choice in zip(self.units, choices, strict=True):
            row, column = _place(unit.name)
            share = sum(
                index / max(1, len(values) - 1)
                for index, values in zip(choice, self.settings.space.values(), strict=True)
            )
            tint = f"background:color-mix(in srgb, currentColor {4 + 26 * share / len(choice):.0f}%, transparent)"
            text = "<br>".join(escape(part) for part in self.label(choice).split(", "))
            cells.setdefault(row, {})[column] = f'<td style="{tint}">{text}</td>'
            columns[column] = None
        head = "<th>block</th>" + "".join(f"<th>{escape(column)}</th>" for column in columns)
        rows = (
            f"<td>{escape(row)}</td>" + "".join(found.get(column, "<td></td>") for column in columns)
            for row, found in cells.items()
        )
        return html_table(head, rows)

    def _score_table(self, scores: Mapping[str, Sequence[float]], chosen: Mapping[str, str]) -> str:
        head = "<th>unit</th><th>chosen</th>" + "".join(
            f'<th class="number">{escape(self.label(choice))}</th>' for choice in self.choices
        )
        rows = (
            f"<td>{escape(unit.name)}</td><td>{escape(chosen[unit.name])}</td>"
            + "".join(f'<td class="number">{score:.3g}</td>' for score in scores[unit.name])
            for unit in self.units
        )
        note = (
            "Smaller is better: half of a score is the error of pruning and quantizing, half what a smaller rank "
            "leaves out; the largest values of all units add up to 1."
        )
        return html_table(head, rows) + f'\n<p class="note">{escape(note)}</p>'


def _keys(space: Mapping[str, Sequence[Any]], links: Chain) -> dict[str, list[tuple[int, str]]]:
    """Return key of the space -> the links that it changes, by place, and the argument; SearchError for an unknown one.

    "bits" is the argument of the quantizer, "ranks" that of every adapter with a rank; else LINK.ARGUMENT.
    """
    found = {}
    for key in space:
        name, _, argument = key.partition(".")
        if key == "bits":
            places = [(place, "bits") for place, link in enumerate(links) if isinstance(link, Quantizer)]
        elif key == "ranks":
            places = [(place, "r") for place, link in enumerate(links) if isinstance(link, Adapter)]
        else:
            places = [(place, argument) for place, link in enumerate(links) if link.name == name]
        places = [(place, each) for place, each in places if each in {one.name for one in fields(links.links[place])}]
        if not places:
            what = {"bits": "a quantizer with the argument bits", "ranks": "an adapter with a rank"}
            raise SearchError(
                f"search.space.{key}",
                found=f"chain {links}",
                rule=f"the chain must have {what.get(key, f'a link {name} with the argument {argument}')}",
                fix="use int(bits=4) or gptq(bits=4)" if key == "bits" else f"remove {key} from search.space",
            )
        found[key] = places
    return found


def _from_least(information: Mapping[str, float]) -> dict[str, float]:
    """Return values from 0.1 for the least to 1.1 for the largest, so that no layer counts for nothing."""
    least, most = min(information.values()), max(information.values())
    return {name: 0.1 + (value - least) / ((most - least) or 1.0) for name, value in information.items()}


def _total(sizes: Iterable[Size]) -> Size:
    listed = list(sizes)
    return Size(*(sum(getattr(one, field.name) for one in listed) for field in fields(Size)))


def _differing(one: Choice, other: Choice) -> int:
    """Return the number of keys to which two choices give different values."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def _place(name: str) -> tuple[str, str]:
    """Return the block of a unit and its name within; a unit outside of a block is one by itself."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])
