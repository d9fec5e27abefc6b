"""Every kind of file gives the same rows, and what cannot be read is named by file and place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dovetail.errors import DataError
from dovetail.tasks.files import MAX_LINE, read_rows

ROWS: list[dict[str, Any]] = [
    {"text": "one", "note": "a"},
    {"text": 'two, "quoted"\nand more', "note": "ü 🙂"},
    {"text": "three\u2028four", "note": ""},
]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


FILES = {
    "a.jsonl": _lines(ROWS),
    "lines.json": _lines(ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "a.csv": _table(ROWS),
    "semicolons.csv": _table(ROWS, ";"),
    "a.tsv": _table(ROWS, "\t"),
    "a.data": _lines(ROWS),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file(name: str, start: bytes, packed: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packed)
    content = start + FILES[name]
    path.write_bytes(gzip.compress(content) if packed else content)
    rows = list(read_rows(path))
    assert [row.columns for row in rows] == ROWS
    assert all(row.where.startswith(f"{path}, ") for row in rows)
    assert len({row.where for row in rows}) == len(ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "indented.json", "a.csv"])
def test_windows_lines_and_empty_lines(name: str, tmp_path: Path) -> None:
    rows = [{"text": "one", "note": "a"}, {"text": "two", "note": "b"}]
    content = {"a.jsonl": _lines(rows), "indented.json": json.dumps(rows, indent=1).encode(), "a.csv": _table(rows)}
    path = tmp_path / name
    path.write_bytes(b"\r\n" + content[name].replace(b"\n", b"\r\n\r\n") + b"\r\n")
    assert [row.columns for row in read_rows(path)] == rows


def test_parquet_with_nested_columns(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages, "more": {"n": 1, "tags": ["x"]}}, {"messages": [], "more": None}] * 2000
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=500)
    found = list(read_rows(tmp_path / "a.parquet"))
    assert [row.columns for row in found] == rows
    assert found[3999].where == f"{tmp_path / 'a.parquet'}, row 4000"


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "part-2.csv").write_bytes(_table(ROWS[2:]))
    (tmp_path / "part-1.jsonl.gz").write_bytes(gzip.compress(_lines(ROWS[:1])))
    (tmp_path / "part-1b.json").write_bytes(json.dumps(ROWS[1:2]).encode())
    (tmp_path / "README.md").write_text("about")
    assert [row.columns for row in read_rows(tmp_path)] == ROWS
    assert "README.md" in capfd.readouterr().err
    (tmp_path / "test-0.jsonl").write_bytes(_lines(ROWS))
    assert len(list(read_rows(tmp_path))) == 6
    (tmp_path / "train-0.jsonl").write_bytes(_lines(ROWS))
    with pytest.raises(DataError, match="several splits"):
        list(read_rows(tmp_path))


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    with pytest.raises(DataError, match="directory without data"):
        list(read_rows(tmp_path))


BAD: dict[str, tuple[str, bytes, str, str]] = {
    # name of the file, content, place, what is found
    "latin-1 in CSV": ("a.csv", b"text,note\na,b\ncaf\xe9,c\n", "line 3", "0xe9 at character 4"),
    "latin-1 in an array": ("a.json", b'[{"a": "b"},\n {"a": "caf\xe9"}]', "line 2", "0xe9 at character 12"),
    "UTF-16": ("a.jsonl", '{"a": "b"}\n'.encode("utf-16"), "line 1", "not UTF-8"),
    "an open string": ("a.json", b'[{"a": "b"},\n{"a": "c}]', "record 2 (line 2)", "Unterminated string"),
    "an open array": ("a.json", b'[{"a": "b"},\n{"a": "c"}', "record 2 (line 2)", "end of the file"),
    "a comma too many": ("a.json", b'[{"a": "b"},\n]', "record 2 (line 2)", "']' in place of an object"),
    "no comma": ("a.json", b'[{"a": "b"}\n{"a": "c"}]', "record 1 (line 1)", "'{' after the record"),
    "numbers in an array": ("a.json", b"[1, 2]", "record 1 (line 1)", "'1' in place of an object"),
    "text after an array": ("a.json", b'[{"a": "b"}]\n\nx', "line 3", "after the end"),
    "one object over lines": ("a.json", b'{\n"a": "b"}\n', "line 1", "Expecting"),
    "too many fields": ("a.csv", b'a,b\n1,2\n"x\ny",2\n1,2,3\n', "line 5", "3 fields; the first line names 2"),
    "too few fields": ("a.tsv", b"a\tb\n1\n", "line 2", "1 fields"),
    "an open quote": ("a.csv", b'a,b\n1,2\n"x,y\n', "line 3", "unexpected end of data"),
    "a quote in a field": ("a.csv", b'a,b\n"x"y,2\n', "line 2", "expected after"),
    "a column twice": ("a.csv", b"\na,b,a\n1,2,3\n", "line 2", "several columns 'a'"),
    "a long line": ("a.jsonl", b'{"a": "b"}\n{"a": "' + b"x" * MAX_LINE + b'"}\n', "line 2", "more than"),
    "a long record": ("a.json", b'[{"a": "' + b"x" * MAX_LINE + b'"}]', "record 1 (line 1)", "more than"),
    "no gzip": ("a.jsonl.gz", b'{"a": "b"}\n', "line 1", "Not a gzipped file"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(_lines(ROWS * 5), mtime=0)[:-20], "line ", "damaged gzip"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_named(what: str, tmp_path: Path) -> None:
    name, content, place, found = BAD[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        list(read_rows(tmp_path / name))
    assert refused.value.where.startswith(f"{tmp_path / name}, {place}")
    assert found in refused.value.found
    assert refused.value.rule
    assert refused.value.fix


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(DataError, match="whole Parquet file"):
        list(read_rows(path))
    with pytest.raises(DataError, match="No such file"):
        list(read_rows(tmp_path / "none.parquet"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    row = {"text": "x" * 1000}
    path = tmp_path / name
    content = {
        "a.json": lambda: json.dumps([row] * 8000).encode(),
        "a.jsonl": lambda: _lines([row] * 8000),
        "a.csv": lambda: _table([row] * 8000),
    }[name]()
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 8000
        assert tracemalloc.get_traced_memory()[1] < len(content) / 8
    finally:
        tracemalloc.stop()
