"""A resumed run is the run that was started: another model, chain, tokenizer, record or setting is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from dovetail.compression.apply import apply
from dovetail.errors import RecipeError, TrainError
from dovetail.runs.flow import run
from dovetail.tasks.task import Task
from dovetail.training.train import train
from small_models import END, SUMS, llama, make_tokenizer, training_killed_at
from small_runs import save_model, small_recipe

SETTINGS: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "checkpoint_every": 1, "progress": False}


def _moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    return model


def _records(change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Task:
    return replace(SUMS, splits={**SUMS.splits, "train": change([dict(record) for record in SUMS.splits["train"]])})


def _tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


CHAINS = ("magnitude(0.5) >> lora(r=2) >> remask", "none")
OTHER: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "a record less": ("data", lambda: {"data": _records(lambda rows: rows[:-1])}),
    "another answer": ("data", lambda: {"data": _records(lambda rows: [*rows[:-1], rows[-1] | {"answer": " one"}])}),
    "another order": ("data", lambda: {"data": _records(lambda rows: rows[::-1])}),
    "another field": ("data", lambda: {"data": _records(lambda rows: [row | {"note": "a"} for row in rows])}),
    "another post-processor": ("tokenizer", lambda: {"tokenizer": make_tokenizer(begin=True)}),
    "another template": ("tokenizer", lambda: {"tokenizer": _tokenizer(chat_template="{{ messages }}")}),
    "another padding": ("tokenizer", lambda: {"tokenizer": _tokenizer(pad_token="<unk>")}),
    "another length": ("tokenizer", lambda: {"tokenizer": _tokenizer(model_max_length=9)}),
    "another seed": ("seed", lambda: {"seed": 1}),
    "another rate": ("lr_scale", lambda: {"lr_scale": 0.5}),
    "another model": ("model", lambda: {"model": _moved(llama())}),
}


def _start(text: str, folder: Path, **changes: Any) -> Any:
    model, tokenizer, data = changes.pop("model", None), changes.pop("tokenizer", None), changes.pop("data", SUMS)
    model = model or llama()
    under = model if text == "none" else apply(model, text)
    return train(under, tokenizer or make_tokenizer(), data, output_dir=folder, **(SETTINGS | changes))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("text", CHAINS)
def test_a_training_resumes_as_itself_alone(text: str, finished: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if finished:
        _start(text, folder)
    else:
        with training_killed_at(3):
            _start(text, folder)
    for name, changes in OTHER.values():
        with pytest.raises(TrainError, match=f"(?s)found: .*{name}"):
            _start(text, folder, resume=True, **changes())
    with pytest.raises(TrainError, match="found: chain="):
        _start("lora(r=2, alpha=7)", folder, resume=True)
    _start(text, folder, resume=True)


def _append(path: Path, row: dict[str, Any]) -> None:
    path.write_text(path.read_text() + json.dumps(row) + "\n")


def _other_weights(folder: Path) -> None:
    _moved(llama()).save_pretrained(folder / "base")


def _other_tokenizer(folder: Path) -> None:
    make_tokenizer(end=True).save_pretrained(folder / "base")
    assert END


FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "train": ("data of sums", lambda folder: _append(folder / "train.jsonl", {"question": "one", "answer": " two"})),
    "test": ("data of sums", lambda folder: _append(folder / "test.jsonl", {"question": "one", "answer": " two"})),
    "weights": ("model", _other_weights),
    "tokenizer": ("tokenizer", _other_tokenizer),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FILES)
def test_a_run_resumes_on_the_same_files_alone(what: str, tmp_path: Path) -> None:
    """The recipe names the files; their content may change between two starts."""
    recipe = small_recipe(tmp_path)
    with training_killed_at(2):
        run(recipe, output=tmp_path / "run", progress=False)
    name, change = FILES[what]
    change(tmp_path)
    with pytest.raises(RecipeError, match=f"another {name} than at the start"):
        run(recipe, output=tmp_path / "run", progress=False)
    assert save_model(tmp_path / "other")
