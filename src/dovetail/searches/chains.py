"""The search over chains of adapters: a link and its rank in each slot, and one factor of the learning rates.

    prefix >> slot 1 >> ... >> slot n >> suffix         c · (learning rate of each link)

Source: CLAM (Velingker et al. 2024), §3.3, §4.1, §4.2 and A.9. A slot holds IA3, or LoRA, LoHa or VeRA with one of 5
ranks, which are 16 choices; with 4 factors c there are 1,024 chains of two slots (CLAM-2) and 16,384 of three (CLAM-3).
A candidate is trained on a part of the training records, scored after each epoch on the others, and keeps its best
score. The best candidate is trained on all of them, once for each seed, and scored on the test split.

Differences from the paper: a rank is proposed as a number, on a logarithmic scale, and not as a category; the number of
parameters is limited by the recipe and not by a baseline; the paper does not state the learning rates of its ablation
with a global one, which here are those of Table 7.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from html import escape
from itertools import product
from math import ceil, isfinite, log2, prod
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.chains.check import check, check_merge
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.linear import adapter_dtype
from dovetail.chains.link import Adapter, Chain, Constraint, Link
from dovetail.chains.notation import chain
from dovetail.checkpoint.config import best_device, grid_of, held_in
from dovetail.checkpoint.footprint import footprint, stored_nbytes, weight_nbytes
from dovetail.compression.apply import apply, apply_on_meta
from dovetail.display.format import format_score, metric_name
from dovetail.display.html import html_table, section
from dovetail.errors import CannotMerge, ChainError, SearchError
from dovetail.files import check_folder
from dovetail.runs.flow import run
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Report, TaskInfo, finite
from dovetail.runs.search_settings import ChainSettings
from dovetail.runs.steps import calibration, load_base
from dovetail.searches.report import SearchReport
from dovetail.searches.space import Candidate, OnScore, Preview, Scored
from dovetail.searches.task_space import TaskSpace
from dovetail.tasks.scoring import evaluate
from dovetail.training.train import train

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANKS = (4, 8, 16, 32, 64)
"""The ranks of LoRA, LoHa and VeRA (CLAM §4.2)."""
SCALES = (0.1, 0.4, 1.0, 4.0)
"""The factors c on the learning rates (CLAM §4.2)."""
RATES = (1e-4, 4e-4, 1e-3, 4e-3, 1e-2, 4e-2, 1e-1, 4e-1)
"""The learning rates of the ablation with one rate for all links: those of CLAM's Table 7."""
_MEASURED_STEPS, _MEASURED_RECORDS = 4, 64

WINNER = "winner"


@dataclass(frozen=True)
class Option:
    """What a slot may hold.

    label   of the link without its rank
    link    with its rank
    rank    None for a link without one
    parameters, nbytes   trained parameters and their bytes on all target layers
    """

    label: str
    link: Link
    rank: int | None
    parameters: int
    nbytes: int


class ChainSpace(TaskSpace):
    """The chains of a recipe (`dovetail.runs.search_settings.ChainSettings`)."""

    settings: ChainSettings

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.search, ChainSettings)
        self.settings = recipe.search
        self._prefix = _links("search.prefix", self.settings.prefix, "a pruner or a quantizer", _applied_once)
        self._suffix = _links("search.suffix", self.settings.suffix, "a constraint", _is_constraint)
        self.task = TaskInfo.of(self.search_task, "validation", recipe.train.evaluate_limit)
        self._links = _labelled([_adapter(text) for text in self.settings.links])
        self._held = held_in(recipe.model, grid_of(self.settings.prefix))
        self._sequences = self._legal_sequences()
        self._empty = self._smallest_model()
        self.options = self._legal_options()
        self._sequences = [each for each in self._sequences if set(each) <= {option.label for option in self.options}]
        self._heads, self._base_nbytes, self._bits = self._fixed_sizes()
        self._check_budget()

    # The space.

    def _legal_sequences(self) -> list[tuple[str, ...]]:
        """Return the labels of each legal chain; ChainError or CannotMerge where none is legal."""
        found, problem = [], None
        for labels in product(self._links, repeat=self.settings.slots):
            try:
                checked = check(self._chain([self._links[label] for label in labels]), self._held)
                if self.recipe.merge == "exact" or (
                    self.recipe.merge == "lossy" and not all(link.mergeable for link in checked)
                ):
                    check_merge(checked)
                found.append(labels)
            except (ChainError, CannotMerge) as error:
                problem = problem or error
        if not found:
            assert problem is not None
            fix = "set search.suffix: remask >> regrid, or merge: none" if isinstance(problem, CannotMerge) else ""
            raise type(problem)(
                f"search.slots, {problem.where}", found=problem.found, rule=problem.rule, fix=fix or problem.fix
            )
        return found

    def _smallest_model(self) -> PreTrainedModel:
        links = [self._links[label] for label in self._sequences[0]]
        smallest = [_with_rank(link, 1) if _ranked(link) else link for link in links]
        return apply_on_meta(self.empty_model(), self._chain(smallest), self.recipe.targets)  # pyright: ignore[reportReturnType]

    def _legal_options(self) -> list[Option]:
        """Return what each slot may hold on this model; raise the first ChainError where that is nothing."""
        layers = applied(self._empty).layers.values()
        found, problem = [], None
        for label, link in self._links.items():
            ranks = [None] if not _ranked(link) or self.settings.ranks == "fixed" else list(RANKS)
            for rank in ranks:
                ranked = link if rank is None else _with_rank(link, rank)
                try:
                    sizes = [
                        (sum(map(prod, ranked.parameter_shapes(layer.site).values())), adapter_dtype(layer.base.dtype))
                        for layer in layers
                        if ranked.check(layer.site) is None
                    ]
                except ChainError as error:
                    problem = problem or error
                    continue
                nbytes = sum(count * dtype.itemsize for count, dtype in sizes)
                found.append(Option(label, ranked, rank, sum(count for count, _ in sizes), nbytes))
        if not found:
            assert problem is not None
            raise problem
        return found

    def _fixed_sizes(self) -> tuple[int, int, float]:
        """Return what all candidates share: the parameters of heads, the bytes of the base, its bits per weight."""
        layers = applied(self._empty).layers.values()
        adapters = [p for layer in layers for state in layer.states for p in state.parameters()]
        trained = sum(p.numel() for p in self._empty.parameters() if p.requires_grad)
        weights = sum(prod(layer.base.shape) for layer in layers)
        return (
            trained - sum(p.numel() for p in adapters),
            stored_nbytes(self._empty) - sum(p.nbytes for p in adapters),
            8 * sum(map(weight_nbytes, layers)) / weights,
        )

    def _check_budget(self) -> None:
        """Raise SearchError for a budget that no candidate meets, or that is above every candidate."""
        budget, ends = self.settings.budget, self._ends
        sizes = [self._size([ends[label][end] for label in labels]) for labels in self._sequences for end in (0, 1)]
        for name, limit, found in [
            ("bits_per_weight", budget.bits_per_weight, [self._bits]),
            ("trainable_parameters", budget.trainable_parameters, [parameters for parameters, _ in sizes]),
            ("nbytes", budget.nbytes, [nbytes for _, nbytes in sizes]),
        ]:
            least, most = min(found), max(found)
            if limit is None or least <= limit <= most or (name == "bits_per_weight" and least <= limit):
                continue  # bits per weight depend on the prefix alone
            rule = f"the smallest candidate has {least:,.10g} and the largest {most:,.10g}"
            fix = f"set search.budget.{name} from the one to the other, or leave it out"
            raise SearchError(f"search.budget.{name}", found=f"{limit:,}", rule=rule, fix=fix)

    def _size(self, options: Sequence[Option]) -> tuple[int, int]:
        """Return the trained parameters and the bytes of the model with these adapters."""
        parameters = self._heads + sum(option.parameters for option in options)
        return parameters, self._base_nbytes + sum(option.nbytes for option in options)

    @cached_property
    def _ends(self) -> dict[str, tuple[Option, Option]]:
        """Label -> its option with the fewest parameters, and the one with the most."""
        found: dict[str, list[Option]] = {}
        for option in self.options:
            found.setdefault(option.label, []).append(option)
        size = attrgetter("parameters")
        return {label: (min(options, key=size), max(options, key=size)) for label, options in found.items()}

    def _fits(self, chosen: Sequence[Option]) -> bool:
        """Return whether a legal chain within the budget begins with these options."""
        labels, budget = tuple(option.label for option in chosen), self.settings.budget
        for sequence in self._sequences:
            if sequence[: len(labels)] == labels:
                rest = [self._ends[label][0] for label in sequence[len(labels) :]]
                parameters, nbytes = self._size([*chosen, *rest])
                if parameters <= (budget.trainable_parameters or parameters) and nbytes <= (budget.nbytes or nbytes):
                    return True
        return False

    def chains(self) -> Iterator[list[Option]]:
        """Yield the options of every chain of the space, without the learning rates."""
        legal = set(self._sequences)
        for options in product(self.options, repeat=self.settings.slots):
            if tuple(option.label for option in options) in legal and self._fits(options):
                yield list(options)

    @property
    def _rates(self) -> tuple[float, ...]:
        if self.settings.ranks == "fixed":
            return (1.0,)
        return RATES if self.settings.learning_rate == "global" else SCALES

    def suggest(self, trial: optuna.Trial) -> None:
        chosen: list[Option] = []
        for slot in range(1, self.settings.slots + 1):
            fitting = [option for option in self.options if self._fits([*chosen, option])]
            labels = list(dict.fromkeys(option.label for option in fitting))
            # Optuna's categories do not change: a slot with fewer choices is another parameter.
            name = f"slot_{slot}" if len(labels) == len(self._links) else f"slot_{slot}:{','.join(labels)}"
            label = trial.suggest_categorical(name, labels)
            ranks = [option.rank for option in fitting if option.label == label and option.rank is not None]
            rank = None
            if ranks:
                low, high = round(log2(min(ranks))), round(log2(max(ranks)))
                rank = 2 ** trial.suggest_int(f"slot_{slot}_log2_rank", low, high)
            chosen.append(next(option for option in fitting if (option.label, option.rank) == (label, rank)))
        if len(self._rates) > 1:
            trial.suggest_categorical(self._rate_name, self._rates)

    @property
    def _rate_name(self) -> str:
        return "learning_rate" if self.settings.learning_rate == "global" else "lr_scale"

    def _chosen(self, params: Mapping[str, Any]) -> list[Option]:
        """Return the options of a candidate."""
        found = []
        for slot in range(1, self.settings.slots + 1):
            label = next(value for name, value in params.items() if name.split(":")[0] == f"slot_{slot}")
            power = params.get(f"slot_{slot}_log2_rank")
            rank = None if power is None else 2**power
            found.append(next(option for option in self.options if (option.label, option.rank) == (label, rank)))
        return found

    def _chain(self, links: Sequence[Link]) -> Chain:
        return Chain((*self._prefix, *links, *self._suffix))

    def candidate_recipe(self, candidate: Candidate) -> Recipe:
        train = self.recipe.train
        rate = candidate.params.get(self._rate_name)
        if rate is not None and self._rate_name == "learning_rate":
            train = train.model_copy(update={"link_learning_rate": rate})
        elif rate is not None:
            train = train.model_copy(update={"lr_scale": train.lr_scale * rate})
        text = str(self._chain([option.link for option in self._chosen(candidate.params)]))
        return self.recipe.model_copy(update={"chain": text, "train": train, "search": None, "output": None})

    # A trial.

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[dict[str, Tensor]]]:
        """The model, the tokenizer and the calibration data, which all trials of a worker share."""
        model, tokenizer = load_base(self.recipe, self.whole_task)
        torch.nn.Module.to(model, best_device())
        model.requires_grad_(False)
        return model, tokenizer, calibration(self.recipe, self.search_task, model, tokenizer)

    def _applied(self, recipe: Recipe) -> PreTrainedModel:
        """Return a copy of the model with the chain of a candidate."""
        base, _, batches = self._loaded
        model = copy.deepcopy(base)
        apply(
            model, recipe.chain, targets=recipe.targets, calibration=batches,
            calibration_inputs=recipe.calibration.inputs, seed=recipe.seed,
        )  # fmt: skip
        return model

    def score(self, candidate: Candidate, report: OnScore) -> Scored:
        recipe = self.candidate_recipe(candidate)
        model = self._applied(recipe)
        scores: list[float] = []

        def on_log(stage: int, step: int, what: dict[str, Any]) -> None:
            if "validation" in what:
                scores.append(what["validation"][self.task.metric])
                report(len(scores) - 1, scores[-1])

        steps = self.steps
        settings: dict[str, Any] = recipe.train.model_dump() | {"evaluate_every": max(1, steps // self._scorings)}
        train(model, self._loaded[1], self.search_task, seed=recipe.seed, progress=False, on_log=on_log, **settings)
        size = footprint(model)
        values = {
            "quality": self._best(scores),
            "nbytes": float(size.nbytes),
            "trainable_parameters": float(size.trainable_parameters),
        }
        if "peak_memory" in self.settings.objectives:
            values["peak_memory"] = self.peak_memory(recipe)
        details = {
            "scores": list(map(finite, scores)),
            "trainable_parameters": size.trainable_parameters,
            "bits_per_weight": size.bits_per_weight,
            "nbytes": size.nbytes,
        }
        return Scored(values, details)

    def _best(self, scores: Sequence[float]) -> float:
        """Return the best of the scores of the epochs; NaN where none is finite."""
        good = [score for score in scores if isfinite(score)]
        choose = max if self.objectives.get("quality", "maximize") == "maximize" else min
        return choose(good, default=float("nan"))

    @property
    def _scorings(self) -> int:
        """How often a candidate is scored: after each epoch."""
        return ceil(self.steps / self.steps_per_epoch)

    def preview(self) -> Preview:
        count, largest = 0, None
        for options in self.chains():
            count += 1
            if largest is None or self._size(options) > self._size(largest):
                largest = options
        assert largest is not None
        settings, links = self.recipe.train, self._chain([option.link for option in largest])
        recipe = self.recipe.model_copy(update={"chain": str(links), "search": None})
        step, record = self._measure(recipe)
        trial = self.steps * step + self._scorings * len(self.search_task.split("validation")) * record
        share = len(self.whole_task.split("train")) / len(self.search_task.split("train"))
        test = len(self.whole_task.split(self.test)[: self.recipe.evaluate.limit])
        final = (self.steps * (1 if settings.max_steps else share)) * step + 3 * test * record
        return Preview(
            points=count * len(self._rates),
            trials=self.settings.trials,
            seconds=self.settings.trials * trial + len(self.settings.seeds) * final,
            peak_memory_nbytes=self.predicted_peak(recipe),
            facts={"largest candidate": str(links), "steps of a trial": f"{self.steps:,}"},
        )

    def _measure(self, recipe: Recipe) -> tuple[float, float]:
        """Return the seconds of a training step and of scoring a record, measured on the largest candidate."""
        model, tokenizer = self._applied(recipe), self._loaded[1]
        settings: dict[str, Any] = recipe.train.model_dump() | {"evaluate_every": None}
        seconds = []
        for steps in (1, 1 + _MEASURED_STEPS):  # the difference leaves out what every training does once
            started = perf_counter()
            settings["max_steps"] = steps
            train(model, tokenizer, self.search_task, seed=0, progress=False, **settings)
            seconds.append(perf_counter() - started)
        started = perf_counter()
        records = len(self.search_task.split("validation")[:_MEASURED_RECORDS])
        evaluate(model, tokenizer, [self.search_task], split="validation", limit=records, progress=False)
        return max(0.0, seconds[1] - seconds[0]) / _MEASURED_STEPS, (perf_counter() - started) / records

    # The end.

    def finish(self, folder: Path, report: SearchReport, *, progress: bool) -> dict[str, Any]:
        """Train the best candidate on all training records with each seed, and score it on the test split."""
        scores = []
        for seed in self.settings.seeds:
            place = folder / WINNER / f"seed-{seed}"
            if (place / REPORT).is_file():
                done = Report.load(place)
            else:
                check_folder(place)
                recipe = report.recipe(report.best).model_copy(update={"seed": seed})
                done = run(recipe, output=place, progress=progress)
            scores.append(done.score(done.stages[-1]))
        good = [score for score in scores if score is not None]
        return {
            "split": self.test,
            "seeds": list(self.settings.seeds),
            "scores": scores,
            "mean": statistics.mean(good) if len(good) == len(scores) else None,
            "sd": statistics.stdev(good) if len(good) == len(scores) > 1 else None,
        }

    def headline(self, report: SearchReport) -> str:
        winner, found = report.trial(report.best), report.finish
        said = f"{winner.chain} is the best of {len(report.trials)} chains"
        if found.get("mean") is None:
            return f"{said}; its score on {self.test} is not finite"
        mean = format_score(self.task.metric, found["mean"])
        spread = "" if found["sd"] is None else f" (standard deviation {format_score(self.task.metric, found['sd'])})"
        seeds = "1 seed" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds"
        return f"{said}: {metric_name(self.task.metric)} {mean}{spread} on {self.test}, {seeds}"

    def sections(self, report: SearchReport) -> list[str]:
        metric, found = report.task.metric, report.finish
        head = f'<th>seed</th><th class="number">{escape(metric_name(metric))}</th><th>folder</th>'
        rows = [
            f'<td>{seed}</td><td class="number">{escape(format_score(metric, score))}</td>'
            f"<td><code>{WINNER}/seed-{seed}</code></td>"
            for seed, score in zip(found["seeds"], found["scores"], strict=True)
        ]
        note = f"Trained on all records of the training split, scored on the {found['split']} split."
        return [section("The best chain", html_table(head, rows) + f'\n<p class="note">{escape(note)}</p>')]


def _links(where: str, text: str, what: str, fits: Any) -> tuple[Link, ...]:
    links = chain(text).links if text else ()
    for link in links:
        if not fits(link):
            raise SearchError(where, found=f"{link}, a {link.kind}", rule=f"each link must be {what}", fix="move it")
    return tuple(links)


def _applied_once(link: Link) -> bool:
    return link.kind in ("pruner", "quantizer")


def _is_constraint(link: Link) -> bool:
    return isinstance(link, Constraint)


def _adapter(text: str) -> Adapter:
    links = chain(text).links
    if len(links) != 1 or not isinstance(links[0], Adapter):
        rule = "each of the links must be one adapter"
        raise SearchError("search.links", found=text, rule=rule, fix="links: [ia3, lora, loha, vera]")
    return links[0]


def _labelled(links: Sequence[Adapter]) -> dict[str, Adapter]:
    """Return label -> link: the name of a link where it is the only one of that name, else its text."""
    names = [link.name for link in links]
    found = {link.name if names.count(link.name) == 1 else str(link): link for link in links}
    if len(found) < len(links):
        raise SearchError(
            "search.links", found=", ".join(map(str, links)), rule="links must differ", fix="name each once"
        )
    return found


def _ranked(link: Link) -> bool:
    return any(field.name == "r" for field in fields(link))


def _with_rank(link: Adapter, rank: int) -> Adapter:
    return replace(link, r=rank)  # pyright: ignore[reportCallIssue]
