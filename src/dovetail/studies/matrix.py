"""The matrix of runs of a study: rows x points of the axes x seeds.

A row with a chain runs at every point of the axes that its chain names in braces and of those that are recipe keys. A
row with `of` runs nothing: it shows the model of another row at an earlier stage. Equal recipes are one run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dovetail.errors import CannotMerge, ChainError, RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.runs.rows import row_names
from dovetail.runs.steps import check_layers, checked_chain, legal_chain
from dovetail.studies.axes import Value, fill, fits, labelled, put
from dovetail.studies.spec import Row, Study, parse_row
from dovetail.tasks.find import load_task, number_of_labels
from dovetail.tasks.task import HEAD_KINDS, Task

_OF_THE_BASE = ("model", "dtype", "trust_remote_code", "data", "evaluate", "seed")
"""The keys of a recipe that the scores of its base depend on."""


@dataclass(frozen=True)
class Run:
    """One run of the matrix; several lines may show it.

    slug  its folder's name
    """

    slug: str
    recipe: Recipe


@dataclass(frozen=True)
class Line:
    """A row at one point of the axes: a line of the table.

    point  axis -> the label of its value, of the axes that the row runs along
    task   name of the task of its runs
    stage  whose scores the line shows; None: merged where merging is exact, else the last stage before
    runs   one for each seed, in order
    """

    row: str
    point: dict[str, Value]
    task: str
    stage: str | None
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Refused:
    """A point of a row that cannot run, and the reason."""

    row: str
    point: dict[str, Value]
    error: ChainError | CannotMerge

    @property
    def why(self) -> str:
        """The reason in one line."""
        return ": ".join(filter(None, [self.error.found or self.error.where, self.error.rule])).replace("\n", " ")


@dataclass(frozen=True)
class Matrix:
    """The lines of a study in order: rows, and the points of each; and the points that cannot run."""

    lines: list[Line]
    refused: list[Refused]


def expand(study: Study) -> Matrix:
    """Return the matrix of a study. Equal recipes are one run.

    A point whose chain is illegal, does not fit the model, or cannot be merged as its recipe asks, is refused. Only the
    configuration of the model is read.

    Raises RecipeError or ChainError for a row that is not a valid recipe at some point, and for an unknown stage; and
    the error of the first point of a row that has no other points.
    """
    known: dict[str, Run] = {}
    checks = _Checks()
    found: dict[str, list[Line]] = {}
    refused: list[Refused] = []
    for row in study.rows:
        if row.of is None:
            found[row.name], bad = [], []
            for line in _lines(study, row, known):
                error = checks.refusal(line)
                if error is None:
                    found[row.name].append(line)
                else:
                    bad.append(Refused(line.row, line.point, error))
            if not found[row.name]:
                raise bad[0].error
            refused += bad
    for row in study.rows:
        if row.of is not None and row.stage is not None:
            found[row.name] = _at(row.name, row.stage, found[row.of])
    return Matrix([line for row in study.rows for line in found[row.name]], refused)


class _Checks:
    """The answers to whether recipes can run; recipes that differ in data or training alone share one."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._answers: dict[str, ChainError | CannotMerge | None] = {}

    def refusal(self, line: Line) -> ChainError | CannotMerge | None:
        """Return why a line cannot run, or None."""
        where = f"row {label(line.row, line.point)}"
        if not line.runs:
            rule, fix = "a chain must have a link", "leave the point out under skip, or add a row with stage: base"
            return ChainError(where, found="no links", rule=rule, fix=fix)
        recipe = line.runs[0].recipe
        data = recipe.data.model_dump_json()
        if data not in self._tasks:
            self._tasks[data] = load_task(recipe.data)
        task = self._tasks[data]
        read = {"chain", "layers", "targets", "model", "dtype", "trust_remote_code", "merge", "search", "export"}
        head = f"{task.kind} {number_of_labels(task, recipe.data.num_labels)}" if task.kind in HEAD_KINDS else ""
        key = f"{recipe.model_dump_json(include=read)} {recipe.train.gradient_checkpointing} {head}"
        if key not in self._answers:
            self._answers[key] = None
            try:
                check_layers(recipe, task, legal_chain(recipe))
            except (ChainError, CannotMerge) as error:
                said = {"found": error.found, "rule": error.rule, "fix": error.fix}
                self._answers[key] = type(error)(f"{where}, {error.where}", **said)
        return self._answers[key]


def _at(row: str, stage: str, lines: list[Line]) -> list[Line]:
    """Return lines of a row that show a stage of the runs of other lines; those that show the same scores are one.

    Scores of the base, and those after pruning and quantizing, do not depend on the rest of the chain. The line keeps
    the axes on which all lines that show these scores agree. A line whose chain has no such stage is left out.
    """
    alike: dict[str, list[Line]] = {}
    for line in lines:
        recipe = line.runs[0].recipe
        stages = _stages(recipe)
        if stage in stages:
            alike.setdefault(_scores_key(recipe, stages, stage), []).append(line)
    if not alike:
        name = lines[0].row
        rule = f"stage must be one of the stages of {name}: " + ", ".join(_stages(lines[0].runs[0].recipe))
        raise RecipeError(f"row {row}", found=f"stage: {stage}", rule=rule, fix="name one of these")
    found = []
    for same in alike.values():
        first = same[0]
        point = {axis: at for axis, at in first.point.items() if all(line.point.get(axis) == at for line in same)}
        if stage == "base" and len(alike) == 1:
            point = {}
        found.append(replace(first, row=row, point=point, stage=stage))
    return found


def _scores_key(recipe: Recipe, stages: list[str], stage: str) -> str:
    """Return what the scores of a stage depend on."""
    before = stages[: stages.index(stage) + 1]
    if stage == "base":
        return recipe.model_dump_json(include=set(_OF_THE_BASE))
    first = checked_chain(recipe).stages[0]
    trained = any(name.startswith(("tuned", "searched", "merged")) for name in before)
    if trained or recipe.layers:
        return recipe.model_dump_json()
    # An adapter that decomposes the weight changes what is quantized.
    links = first.applied[: len(before) - 1] if first.decomposing is None else [recipe.chain]
    applied = " >> ".join(map(str, links))
    length = str(recipe.train.max_length)
    return applied + length + recipe.model_dump_json(exclude={"chain", "train", "merge", "search", "output"})


def _stages(recipe: Recipe) -> list[str]:
    found = ["base", *row_names(checked_chain(recipe))]
    if recipe.search is not None:
        found.append("searched")
    if recipe.merge != "none":
        found.append("merged")
    return found


def label(row: str, point: Mapping[str, Value]) -> str:
    """Return the name of a line in words: `LoRA (sparsity 0.5)`."""
    where = ", ".join(f"{axis} {value}" for axis, value in point.items())
    return f"{row} ({where})" if where else row


def _lines(study: Study, row: Row, known: dict[str, Run]) -> list[Line]:
    axes = study.axes(row)
    keys = study.keys_of(axes)
    lines = []
    for chosen in itertools.product(*(labelled(study.vary[axis]).items() for axis in axes)):
        point = {axis: value for axis, (value, _) in zip(axes, chosen, strict=True)}
        values = {axis: value for axis, (_, value) in zip(axes, chosen, strict=True)}
        if any(fits(point, pattern) for pattern in study.skip):
            continue
        whole = {**row.changes, "chain": fill(row.chain or "", values), "output": None}
        for axis in keys:
            whole = put(whole, axis, values[axis])
        if not whole["chain"]:  # all its links are none
            lines.append(Line(row.name, point, "", None, ()))
            continue
        runs = []
        for seed in [values["seed"]] if "seed" in keys else study.seeds:
            recipe = parse_row({**whole, "seed": seed}, f"row {label(row.name, point)}", Path())
            slug = "-".join([row.name, *(f"{axis}-{value}" for axis, value in point.items()), f"s{seed}"])
            run = Run(re.sub(r"[^a-z0-9.]+", "-", slug.lower()).strip("-."), recipe)
            runs.append(known.setdefault(recipe.model_dump_json(), run))
        data = runs[0].recipe.data
        lines.append(Line(row.name, point, data.task or data.name or "data", None, tuple(runs)))
    if not lines:
        rule = "skip must leave a point of every row"
        raise RecipeError(f"row {row.name}", found="no point", rule=rule, fix="remove the row, or a line of skip")
    slugs = [run.slug for run in known.values()]
    if len(set(slugs)) < len(slugs):
        twice = next(slug for slug in slugs if slugs.count(slug) > 1)
        found, rule = f"a second run called {twice}", "names of rows and values must differ in their letters and digits"
        raise RecipeError(f"row {row.name}", found=found, rule=rule, fix="rename one of the rows, or label the values")
    return lines


def unique_runs(lines: list[Line]) -> Iterator[Run]:
    """Yield every run once, in the order of the table, all rows with the first seed before the second."""
    seen: set[str] = set()
    for runs in itertools.zip_longest(*(line.runs for line in lines)):
        for run in runs:
            if run is not None and run.slug not in seen:
                seen.add(run.slug)
                yield run
