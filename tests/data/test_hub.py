"""Data sets by name, here of a folder, which `datasets` reads as it reads one of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import datasets.config
import huggingface_hub
import pytest

from dovetail.errors import DataError, RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_data, load_task

RECIPE = {"model": "playground", "chain": "lora(r=4)"}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def folder(tmp_path: Path, **splits: int) -> Path:
    path = tmp_path / "my_alpaca"
    path.mkdir()
    for split, number in splits.items():
        rows = [{"instruction": f"{split} {at}", "input": "", "output": "a"} for at in range(number)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_splits_of_a_data_set(tmp_path: Path) -> None:
    folder(tmp_path, train=10, test=2)
    task = load_task(Recipe.parse(RECIPE | {"data": {"dataset": "my_alpaca"}}, folder=tmp_path).data)
    assert (task.name, task.kind) == ("my_alpaca", "chat")
    assert {split: len(records) for split, records in task.splits.items()} == {"train": 10, "test": 2}
    assert task.split("test")[1]["messages"][0]["content"] == "test 1"
    data = {"dataset": "my_alpaca", "train": "test", "test": "train", "limit": {"test": 3}}
    task = load_task(Recipe.parse(RECIPE | {"data": data}, folder=tmp_path).data)
    assert {split: len(records) for split, records in task.splits.items()} == {"train": 2, "test": 3}
    data = {"dataset": "my_alpaca", "split": 0.2}
    task = load_task(Recipe.parse(RECIPE | {"data": data}, folder=tmp_path).data)
    assert {split: len(records) for split, records in task.splits.items()} == {"train": 8, "validation": 2, "test": 2}


def test_a_data_set_in_python(tmp_path: Path) -> None:
    path = folder(tmp_path, train=3)
    assert len(load_data(dataset=str(path), limit={"train": 2}).split("train")) == 2


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder(tmp_path, train=3)
    data = {"dataset": "my_alpaca", "validation": "dev"}
    with pytest.raises(DataError, match="the splits of this data set are train"):
        load_task(Recipe.parse(RECIPE | {"data": data}, folder=tmp_path).data)
    with pytest.raises(DataError, match="the hub needs a connection") as refused:
        load_task(Recipe.parse(RECIPE | {"data": {"dataset": "nobody/none", "split": 0.1}}).data)
    assert refused.value.where == "data set nobody/none"
    with pytest.raises(RecipeError, match="part of a data set"):
        Recipe.parse(RECIPE | {"data": {"train": "a.jsonl", "subset": "main"}})
