"""The model that a run left, ready to be used: merged, packed, or the base with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.checkpoint.adapter import load_adapter
from dovetail.checkpoint.config import grid_of
from dovetail.checkpoint.formats.peft import import_peft
from dovetail.checkpoint.load import load
from dovetail.errors import LoadError
from dovetail.files import read_json
from dovetail.runs.folder import ADAPTER, MODEL, RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Report, TaskInfo
from dovetail.tasks.labels import name_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWN, _PEFT = "adapter.json", "adapter_config.json"


def load_result(
    name_or_dir: str | Path, *, adapter: str | Path | None = None, task_kind: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a run, of an adapter, or any model that `dovetail.load` loads, and its tokenizer.

    name_or_dir  a run directory: its merged model, or its base with its adapter where they were kept apart; the adapter
                 folder of a run or of peft: the base that it names, with it; or as for `dovetail.load`
    adapter      a saved adapter, of Dovetail or peft, to attach to the model
    task_kind    as for `dovetail.load`; by default that of the run, and of other models "generation"

    Raises LoadError.
    """
    path = Path(name_or_dir).expanduser()
    if (path / REPORT).is_file():
        return _of_run(path, adapter, task_kind)
    if (path / _OWN).is_file() or ((path / _PEFT).is_file() and not (path / "config.json").is_file()):
        if adapter is not None:
            found, rule = f"{path} and {adapter}", "a model carries at most one adapter"
            raise LoadError("adapter", found=found, rule=rule, fix="name the base model and one adapter")
        return _of_adapter(path, task_kind)
    partial = path.with_name(path.name + ".partial")
    if not path.exists() and (partial / RECIPE).is_file():
        rule, fix = "a run must be finished", f"finish it: dovetail run {partial / RECIPE} --output {path}"
        raise LoadError(str(path), found="an unfinished run", rule=rule, fix=fix)
    model, tokenizer = load(name_or_dir, task_kind=task_kind or "generation")
    if adapter is not None:
        _attach(model, Path(adapter))
    return model, tokenizer


def _of_run(
    path: Path, adapter: str | Path | None, task_kind: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    task = Report.load(path).task
    if (path / MODEL).is_dir():
        model, tokenizer = load(path / MODEL, task_kind=task_kind or task.kind)
        if adapter is not None:
            _attach(model, Path(adapter))
        return model, tokenizer
    return _based(path, path / ADAPTER if adapter is None else Path(adapter), task, task_kind)


def _based(
    path: Path, adapter: Path, task: TaskInfo, task_kind: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base of a run, with the outputs that its task named, and an adapter on it."""
    recipe, kind = Recipe.load(path / RECIPE), task_kind or task.kind
    outputs = recipe.data.num_labels or task.num_labels
    model, tokenizer = load(
        recipe.model, task_kind=kind, num_labels=outputs if kind == task.kind else None, dtype=recipe.dtype,
        grid=grid_of(recipe.chain),
        trust_remote_code=recipe.trust_remote_code, seed=recipe.seed,
    )  # fmt: skip
    name_labels(model.config, task.labels)
    _attach(model, adapter)
    return model, tokenizer


def _of_adapter(path: Path, task_kind: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    run = path.absolute().parent
    if (path / _OWN).is_file() and (run / RECIPE).is_file() and (run / REPORT).is_file():
        return _based(run, path, Report.load(run).task, task_kind)
    rule = "an adapter must be attached to its base model"
    fix = f"name both: BASE --adapter {path}"
    base: Any = None
    if (path / _PEFT).is_file():
        base = read_json(path / _PEFT, dict[str, Any], rule=rule, fix=fix).get("base_model_name_or_path")
    if not base:
        raise LoadError(str(path), found="an adapter without the name of its base", rule=rule, fix=fix)
    model, tokenizer = load(str(base), task_kind=task_kind or "generation")
    _attach(model, path)
    return model, tokenizer


def _attach(model: PreTrainedModel, adapter: Path) -> None:
    if (adapter / _PEFT).is_file() and not (adapter / _OWN).is_file():
        import_peft(model, adapter)
    else:
        load_adapter(model, adapter)
