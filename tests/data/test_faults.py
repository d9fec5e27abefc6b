"""Every format x good and bad files: what is written is read, or one message names the file and the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dovetail.errors import DataError
from dovetail.tasks.find import load_data

Row = dict[str, Any]

ROWS: dict[str, Row] = {
    "alpaca": {"instruction": "a", "input": "b", "output": "ü"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ü"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "ü"}]},
    "prompt_completion": {"prompt": "a", "completion": "ü"},
    "preference": {"prompt": "a", "chosen": "ü", "rejected": "c"},
    "segments": {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "ü"}]},
    "generation": {"prompt": "a", "answer": " ü"},
    "choice": {"question": "a", "choices": ["ü", "c"], "label": 1},
    "pairs": {"good": "ü", "bad": "b"},
    "text": {"text": "ü"},
    "labels": {"text": "ü", "label": 1},
}
each_format = pytest.mark.parametrize("name", ROWS)


def line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


GOOD: dict[str, Callable[[Row], bytes]] = {
    "BOM": lambda row: b"\xef\xbb\xbf" + line(row) * 3,
    "CRLF": lambda row: (line(row) * 3).replace(b"\n", b"\r\n"),
    "empty lines": lambda row: b"\n" + line(row) + b"\n\n" + line(row) * 2 + b"  \n",
    "no last line end": lambda row: (line(row) * 3).rstrip(b"\n"),
    "escapes": lambda row: json.dumps(row).encode() + b"\n" + line(row) * 2,
}


@each_format
def test_good_files_give_the_same_records(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_bytes(line(ROWS[name]) * 3)
    wanted = load_data(tmp_path / "plain.jsonl", name)
    for what, content in GOOD.items():
        (tmp_path / "good.jsonl").write_bytes(content(ROWS[name]))
        assert load_data(tmp_path / "good.jsonl").splits == wanted.splits, what
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(line(ROWS[name]) * 3))
    (tmp_path / "array.json").write_text(json.dumps([ROWS[name]] * 3, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[name]] * 3), tmp_path / "nested.parquet")
    for file in ("packed.jsonl.gz", "array.json", "nested.parquet"):
        assert load_data(tmp_path / file).splits == wanted.splits, file


def without(row: Row) -> Row:
    """Without its last field that a record needs."""
    key = [key for key in row if key not in ("rejected", "input")][-1]
    return {name: value for name, value in row.items() if name != key}


def null(row: Row) -> Row:
    return {**row, [key for key in row if key not in ("rejected", "input")][-1]: None}


def number(row: Row) -> Row:
    """With a number where a text, a list or an index must be."""
    return {**row, [key for key in row if key not in ("rejected", "input")][-1]: [7]}


BAD: dict[str, tuple[Callable[[Row], bytes], int]] = {
    # What follows two good lines, and the line that must be named.
    "a missing field": (lambda row: line(without(row)), 3),
    "null": (lambda row: line(null(row)), 3),
    "another type": (lambda row: line(number(row)), 3),
    "no object": (lambda row: b'["a", "b"]\n', 3),
    "half a line": (lambda row: line(row)[:-4] + b"\n", 3),
    "another encoding": (lambda row: line(row) + line(row).decode().encode("latin-1"), 4),
}


@each_format
@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_named_with_their_line(what: str, name: str, tmp_path: Path) -> None:
    content, number = BAD[what]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line(ROWS[name]) * 2 + content(ROWS[name]))
    with pytest.raises(DataError) as refused:
        load_data(path)
    assert refused.value.where.startswith(f"{path}, line {number}"), refused.value
    assert refused.value.rule
    assert refused.value.fix


@each_format
def test_the_10000th_record_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(line(ROWS[name]) * 9999 + line(without(ROWS[name])) + line(ROWS[name]))
    with pytest.raises(DataError) as refused:
        load_data(path)
    assert refused.value.where.startswith(f"{path}, line 10000")


def test_one_huge_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    path.write_bytes(line(ROWS["text"]) * 2 + b'{"text": "' + b"a" * (1 << 27))
    with pytest.raises(DataError) as refused:
        load_data(path)
    assert refused.value.where.startswith(f"{path}, line 3")
