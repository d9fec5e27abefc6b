"""Every column of the data that nothing reads is named, once; what is read is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.tasks.find import as_task, read_records
from dovetail.tasks.task import FIELDS

RECORDS: dict[str, dict[str, Any]] = {
    "generation": {"prompt": "one plus one is", "answer": " two"},
    "choice": {"prompt": "one plus one is", "choices": [" two", " three"], "label": 0},
    "pairs": {"good": "one is", "bad": "one are"},
    "text": {"text": "one and two"},
    "chat": {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    "classification": {"text": "one", "label": 1},
    "regression": {"text": "one", "label": 0.5},
}
EXTRA: list[dict[str, Any]] = [
    {},
    {"input": "text of Alpaca's second column"},
    {"id": 3, "source": "book"},
    {"meta": {"prompt": "nested"}},
    {"Answer": "another case"},
]


@pytest.mark.parametrize("extra", EXTRA, ids=lambda extra: "+".join(extra) or "none")
@pytest.mark.parametrize("kind", FIELDS)
def test_columns_of_a_file(kind: str, extra: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    rows = [RECORDS[kind], {**RECORDS[kind], **extra}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {name: name for name in (*FIELDS[kind], "pair")}
    for _ in range(3):
        read_records(path, kind, columns)
    said = capfd.readouterr().err
    assert said.count("note:") == (1 if extra else 0)
    assert not extra or said.rstrip().endswith(f"no field reads: {', '.join(extra)}")


@pytest.mark.parametrize("extra", EXTRA[1:], ids="+".join)
@pytest.mark.parametrize("kind", FIELDS)
def test_fields_of_records(kind: str, extra: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    named = {f"{name}_{kind}": value for name, value in extra.items()}  # said once in a process
    as_task([RECORDS[kind], {**RECORDS[kind], **named}])
    assert capfd.readouterr().err.rstrip().endswith(f"nothing reads: {', '.join(named)}")


def test_a_renamed_column_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "one", "answer": "two", "prompt": "not this one"}\n')
    read_records(path, "generation", {"prompt": "question", "answer": "answer", "pair": "pair"})
    assert capfd.readouterr().err.rstrip().endswith("no field reads: prompt")
