"""The folder of a run: written beside its final place and renamed when complete; a killed run continues there.

OUTPUT.partial/recipe.yaml      the recipe that the run started with
OUTPUT.partial/identity.json    the model, the tokenizer and the data that it started with, as digests
OUTPUT.partial/progress.jsonl   the finished rows
OUTPUT.partial/training/        checkpoints of training (`dovetail.training.checkpoints`)
OUTPUT.partial/...              everything that OUTPUT will hold
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pydantic

from dovetail.errors import DovetailError, OutputError, RecipeError
from dovetail.files import atomic, check_folder, on_full_disk, only_writer, read_json, write_whole, writing
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Row, finite
from dovetail.training.identity import difference
from dovetail.training.train import StageReport

RECIPE, LOG, PAGE = "recipe.yaml", "log.jsonl", "report.html"
MODEL, PACKED, ADAPTER, EXPORT, TENSORBOARD = "model", "packed", "adapter", "export", "tensorboard"
_PROGRESS, _TRAINING, _IDENTITY = "progress.jsonl", "training", "identity.json"


class FinishedRow(pydantic.BaseModel, extra="forbid", frozen=True):
    """A finished row, and the outputs of the model for the first records of the task."""

    row: Row
    outputs: list[str]


class RunFolder:
    """The folder of a run in progress.

    path   the folder to write to
    rows   name -> row, of the rows that an earlier start of this run finished
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, FinishedRow] = {}
        for line in _lines(path / _PROGRESS):
            with suppress(pydantic.ValidationError):  # written by another version
                finished = FinishedRow.model_validate(line)
                self.rows[finished.row.name] = finished
        self._logged = {_step(line) for line in _lines(path / LOG)}

    @property
    def training(self) -> Path:
        """The folder of the checkpoints of training."""
        return self.path / _TRAINING

    def add(self, finished: FinishedRow) -> None:
        """Remember a finished row."""
        self.rows[finished.row.name] = finished
        _append(self.path / _PROGRESS, finished.model_dump_json())
        self.log("row", row=finished.row.model_dump(mode="json"))

    def log(self, event: str, **what: Any) -> None:
        """Append a line to log.jsonl: the time, the event and its details."""
        _append(self.path / LOG, json.dumps({"time": round(time.time(), 3), "event": event, **what}))

    def log_step(self, stage: int, step: int, what: dict[str, Any]) -> None:
        """Log the loss or the validation scores of a step of training, unless an earlier start logged them.

        A resumed run repeats the steps after its last checkpoint, to the same bits.
        """
        (event,) = what
        scores = what if event == "loss" else what["validation"]
        values = {name: finite(score) for name, score in scores.items()}
        if (event, stage, step) not in self._logged:
            self._logged.add((event, stage, step))
            self.log(event, stage=stage, step=step, **values)

    def log_training(self, stages: Sequence[StageReport]) -> None:
        """Log every step that is not in the log yet: those that a crash of the machine took from it."""
        for number, stage in enumerate(stages, 1):
            for step, loss in stage.losses:
                self.log_step(number, step, {"loss": loss})
            for step, scores in stage.evaluations:
                self.log_step(number, step, {"validation": scores})


def _step(line: dict[str, Any]) -> tuple[Any, Any, Any]:
    return line.get("event"), line.get("stage"), line.get("step")


def choose_output(asked: str | Path | None, name: str) -> Path:
    """Return the folder that was asked for; else runs/NAME, or runs/NAME-2, -3, ... if that is not empty."""
    if asked is not None:
        return Path(asked)
    for number in count(1):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
    raise AssertionError


@contextmanager
def run_folder(output: Path, recipe: Recipe, resume: bool, identity: Mapping[str, str]) -> Iterator[RunFolder]:
    """Yield the folder to write to, which becomes `output` when the block succeeds.

    identity   what a resumed run must share with its start beside the recipe (`dovetail.training.identity`)

    Bad input (a DovetailError) leaves nothing behind of a run that was started here; after any other error, such as a
    kill or a full disk, a later start continues. With `resume` False, an unfinished run is discarded.
    """
    check_folder(output)
    made = [path for path in output.parents if not path.exists()]
    try:
        with only_writer(output), _partial(output, recipe, resume, identity) as folder:
            yield folder
    except DovetailError:
        for path in made:
            with suppress(OSError):  # not empty: it holds an unfinished run
                path.rmdir()
        raise


@contextmanager
def _partial(output: Path, recipe: Recipe, resume: bool, identity: Mapping[str, str]) -> Iterator[RunFolder]:
    """Yield the folder beside the output, new or of an unfinished run; rename it when the block succeeds."""
    check_folder(output)  # another process may just have finished it
    partial = output.with_name(output.name + ".partial")
    if partial.is_dir() and (not resume or not any(partial.iterdir())):
        shutil.rmtree(partial)
    resumed = partial.exists()
    if resumed:
        _check_same(partial, recipe, output, identity)
    else:
        with writing(output), atomic(partial) as part:
            part.mkdir(parents=True)
            write_whole(part / _IDENTITY, json.dumps(identity))
            recipe.dump(part / RECIPE)
    try:
        with on_full_disk(output):
            yield RunFolder(partial)
    except OutputError:
        raise  # the run continues once there is room
    except DovetailError:
        if not resumed:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial / _TRAINING, ignore_errors=True)
    for name in (_PROGRESS, _IDENTITY):
        (partial / name).unlink(missing_ok=True)
    partial.replace(output)


def _check_same(partial: Path, recipe: Recipe, output: Path, identity: Mapping[str, str]) -> None:
    where, fix = f"output {output}", "choose another --output, or pass --no-resume to discard the unfinished run"
    if not (partial / RECIPE).is_file():
        rule = "this name is reserved for the unfinished run"
        raise RecipeError(where, found=f"{partial.name} beside it, which is no run of Dovetail", rule=rule, fix=fix)
    differing = Recipe.load(partial / RECIPE).difference(recipe)
    if differing is not None:
        found = f"{partial.name}, an unfinished run with another {differing[0]}: {differing[1]}"[:500]
        rule = "a run must continue with the recipe that it started with"
        raise RecipeError(where, found=found, rule=rule, fix=fix)
    rule = "a run must continue with the model and the data that it started with"
    if found := difference(read_json(partial / _IDENTITY, dict[str, str], rule=rule, fix=fix), identity):
        raise RecipeError(where, found=f"{partial.name}, an unfinished run with {found}", rule=rule, fix=fix)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; a killed run may leave an incomplete line, which is skipped."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def _append(path: Path, line: str) -> None:
    """Append a line to a file, after ending an incomplete line that a killed run left."""
    with path.open("ab+") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode() + b"\n")
