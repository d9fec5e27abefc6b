"""Data that are too many for memory: the same records and rows from disk, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.checkpoint.config import load_tokenizer
from dovetail.errors import DataError
from dovetail.tasks import stored
from dovetail.tasks.find import load_data
from dovetail.tasks.packing import PackedRows
from dovetail.tasks.stored import RECORD, ROW, Stored, gathered, select
from dovetail.tasks.tokens import RowMaker
from dovetail.training.identity import records_identity
from small_models import SUMS, llama, parameters, quiet, same

torch.set_num_threads(1)
RECORDS: list[Any] = [
    {"text": "naïve ☕ \u2028 \n", "label": 3},
    {"messages": [{"role": "user", "content": "", "train": False}], "n": None},
    {"value": 1.5, "nested": {"a": [1, "2", None, True]}},
]  # fmt: skip
ROWS: list[Any] = [
    {"input_ids": [1, 2, 300000], "labels": [-100, 2, 300000]}, {"input_ids": [], "labels": 1.25},
    {"input_ids": [7], "token_type_ids": [0], "labels": 4},
]  # fmt: skip


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", 10)


@pytest.mark.parametrize(("values", "code"), [(RECORDS, RECORD), (ROWS, ROW)])
def test_values_come_back_as_they_were(values: list[Any], code: Any, on_disk: None) -> None:
    found = gathered(iter(values), code)
    assert isinstance(found, Stored)
    assert list(found) == values
    assert found[-1] == values[-1]
    assert list(found[1:]) == values[1:]
    assert list(select(found[1:], [1, 0])) == [values[2], values[1]]
    assert [type(row.get("labels")) for row in found] == [type(row.get("labels")) for row in values]
    with pytest.raises(IndexError):
        found[3]


def test_small_data_are_a_list() -> None:
    assert gathered(iter(RECORDS), RECORD) == RECORDS
    assert select(RECORDS, [2, 0]) == [RECORDS[2], RECORDS[0]]


def test_values_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(DataError, match="not JSON serializable"):
        gathered(iter([{"tools": [b"bytes"]}]), RECORD)


def test_a_task_and_its_rows_are_the_same_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    lines = [{"instruction": f"Say {at}.", "output": "word " * (at % 9 + 1)} for at in range(1100)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = load_tokenizer("playground")
    found = []
    for limit in (1 << 26, 10_000):
        monkeypatch.setattr(stored, "IN_MEMORY", limit)
        task = load_data(path, split=0.1)
        make = RowMaker(tokenizer, encoder_decoder=False, max_length=100)
        rows = make.rows(task.kind, task.split("train"))
        packed = PackedRows(rows, [len(row["input_ids"]) for row in rows], 256)
        assert isinstance(rows, list) == (limit > 10_000)
        found.append((records_identity(task.splits), list(rows), make.cut, packed[:5]))
    assert found[0] == found[1]


def test_an_error_names_the_record_behind_the_first_ones() -> None:
    records = [{"prompt": "a", "answer": "b"}] * 2000 + [{"prompt": "a", "answer": "b " * 90}]
    make = RowMaker(load_tokenizer("playground"), encoder_decoder=False, max_length=50)
    with pytest.raises(DataError, match="record 2000"):
        make.rows("generation", records)
    labelled = [{"text": "a", "label": 0}] * 2000 + [{"text": "a", "pair": "b", "label": 0}]
    with pytest.raises(DataError, match="all records must have a pair"):
        make.rows("classification", labelled)


def test_training_from_disk_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for limit in (1 << 26, 10):
        monkeypatch.setattr(stored, "IN_MEMORY", limit)
        model = llama()
        quiet(model, SUMS, max_steps=3, batch_size=4)
        models.append(parameters(model))
    assert same(*models)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "IN_MEMORY", 30_000)
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        for at in range(4000):
            file.write(json.dumps({"text": f"{at} " + "words " * 60}) + "\n")
    size = path.stat().st_size
    tracemalloc.start()
    task = load_data(path)
    rows = gathered(
        ({"input_ids": list(range(1000, 1100)), "labels": list(range(1000, 1100))} for _ in range(2000)), ROW
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task.split("train")) == 4000
    assert len(rows) == 2000
    assert peak < size / 2
    assert array("i").itemsize == 4
