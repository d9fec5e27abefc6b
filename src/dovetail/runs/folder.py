"""A run's folder: written beside its final place and renamed when whole; what is left of a killed run goes on there.

OUTPUT.partial/recipe.yaml      what the run was begun with
OUTPUT.partial/progress.jsonl   the rows that are finished
OUTPUT.partial/training/        checkpoints of training (`dovetail.checkpoints`)
OUTPUT.partial/...              everything that OUTPUT will hold
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pydantic

from dovetail.errors import DovetailError, RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Row

RECIPE, LOG, PAGE = "recipe.yaml", "log.jsonl", "report.html"
MODEL, PACKED, ADAPTER = "model", "packed", "adapter"
_PROGRESS, _TRAINING = "progress.jsonl", "training"


class RunFolder:
    """The folder while the run goes on.

    path      where to write now
    rows      name -> row, of those that an earlier start of this run finished
    resumed   whether there was an earlier start
    """

    def __init__(self, path: Path, rows: dict[str, Row], resumed: bool) -> None:
        self.path, self.rows, self.resumed = path, rows, resumed

    @property
    def training(self) -> Path:
        """Where training keeps its checkpoints."""
        return self.path / _TRAINING

    def add(self, row: Row) -> None:
        """Remembers a finished row."""
        self.rows[row.name] = row
        _append(self.path / _PROGRESS, row.model_dump_json())
        self.log("row", row=row.model_dump(mode="json"))

    def log(self, event: str, **what: Any) -> None:
        """A line of log.jsonl: when, what happened, and its details."""
        _append(self.path / LOG, json.dumps({"time": round(time.time(), 3), "event": event, **what}))


def check_free(output: Path) -> None:
    """RecipeError where the output folder holds something already."""
    fix = "another --output, or remove it first"
    rule = "a run is written to a folder of its own, new or empty"
    if output.is_dir():
        names = sorted(path.name for path in output.iterdir())
        if names:
            found = "a finished run" if REPORT in names else f"{len(names)} files or folders, {names[0]} among them"
            raise RecipeError(f"output {output}", found=found, rule=rule, fix=fix)
    elif output.exists():
        raise RecipeError(f"output {output}", found="a file", rule=rule, fix=fix)


def choose_output(asked: str | Path | None, name: str) -> Path:
    """The folder that was asked for; else runs/NAME, or runs/NAME-2, -3, ... where that holds something already."""
    if asked is not None:
        return Path(asked)
    for number in count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
    raise AssertionError


@contextmanager
def run_folder(output: Path, recipe: Recipe, resume: bool) -> Iterator[RunFolder]:
    """The folder to write to; becomes `output` when the block ends well.

    Bad input (a DovetailError) leaves nothing behind of a run that was begun here; anything else, a kill or a full
    disk, leaves what a later start goes on with. With `resume` False an unfinished run is thrown away.
    """
    check_free(output)
    partial = output.with_name(output.name + ".partial")
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    if partial.is_dir() and (not resume or not any(partial.iterdir())):
        shutil.rmtree(partial)
    resumed = partial.exists()
    if resumed:
        _check_same(partial, recipe, output)
    try:
        if not resumed:
            _make(partial, output)
            recipe.dump(partial / RECIPE)  # the first file there: a folder without it is not ours
        yield RunFolder(partial, _read_rows(partial / _PROGRESS), resumed)
    except DovetailError:
        if not resumed:
            shutil.rmtree(partial, ignore_errors=True)
            for path in made[1:]:
                if path.exists():
                    path.rmdir()
        raise
    shutil.rmtree(partial / _TRAINING, ignore_errors=True)
    (partial / _PROGRESS).unlink(missing_ok=True)
    partial.replace(output)


def _make(partial: Path, output: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        rule, fix = "a run writes to a folder beside its output first", "another --output"
        raise RecipeError(f"output {output}", found=str(error), rule=rule, fix=fix) from None


def _check_same(partial: Path, recipe: Recipe, output: Path) -> None:
    where, fix = f"output {output}", "another --output, or --no-resume to throw the unfinished run away"
    if not (partial / RECIPE).is_file():
        rule = "that name is for the unfinished run"
        raise RecipeError(where, found=f"{partial.name} beside it, which is no run", rule=rule, fix=fix)
    begun = Recipe.load(partial / RECIPE).model_copy(update={"output": None})
    if begun != recipe.model_copy(update={"output": None}):
        mine, theirs = recipe.model_dump(mode="json"), begun.model_dump(mode="json")
        key = next(key for key in mine if mine[key] != theirs[key] and key != "output")
        mine, theirs = mine[key], theirs[key]
        while isinstance(mine, dict) and isinstance(theirs, dict):
            inner = next(name for name in mine if mine[name] != theirs[name])
            key, mine, theirs = f"{key}.{inner}", mine[inner], theirs[inner]
        found = f"{partial.name}, an unfinished run with another {key}: {theirs}"
        raise RecipeError(where, found=found[:500], rule="a run goes on with the recipe that it began with", fix=fix)


def _read_rows(path: Path) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(pydantic.ValidationError):  # a killed run may leave half a line
                row = Row.model_validate_json(line)
                rows[row.name] = row
    return rows


def _append(path: Path, line: str) -> None:
    """Adds a line to a file; a half line that a killed run left is ended first."""
    with path.open("ab+") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
