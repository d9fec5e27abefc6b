"""Rows of data files: JSON Lines, a JSON array, CSV, TSV or Parquet, also gzipped, or a folder of such files.

The format follows from the name of the file. A file is read as a stream, so its size does not bound what can be read;
the size of one row is limited by `MAX_LINE`. Every error names the file and the line, record or row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from dovetail.errors import DataError
from dovetail.progress import note

MAX_LINE = 1 << 24
"""Characters that a line, or a record of a JSON array, may have."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of the files that are read from a folder, each also with `.gz`; only there must a name have one."""
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "eval": "validation", "test": "test"}
_CHUNK = 1 << 16
_PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    where     the file and the place in it, for errors
    columns   column -> value
    untyped   all values are texts, because the file (CSV, TSV) has no types
    """

    where: str
    columns: dict[str, Any]
    untyped: bool = False


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, or of all data files of a folder in the order of their names.

    Raises DataError that names the place for what cannot be read.
    """
    if path.is_dir():
        for file in _files_of(path):
            yield from _rows_of(file)
    else:
        yield from _rows_of(path)


def part_of(folder: Path, name: str) -> Path:
    """Return the file or the folder of data of this name in a folder; DataError where that is none, or several."""
    found = [path for path in sorted(folder.glob(f"{name}*")) if path.name.split(".")[0] == name]
    if len(found) != 1:
        said = "several of them: " + ", ".join(path.name for path in found) if found else "none of them"
        rule = f"the directory must contain one file or directory {name}"
        raise DataError(str(folder), found=said, rule=rule, fix=f"put the data at {folder / name}.jsonl")
    return found[0]


def typed(value: Any, kinds: type | tuple[type, ...]) -> Any:
    """Return the text of a CSV file as a number or a list where one of these types is expected; else unchanged."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    for kind, read in ((int, int), (float, float), (list, json.loads)):
        if kind in kinds and isinstance(value, str):
            try:
                return read(value)
            except ValueError:
                continue
    return value


def without_fillers(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of an Arrow row without the nulls of its nested mappings.

    Arrow gives all mappings of a column the keys of all rows, so that a call of a tool has the arguments of all other
    tools, as nulls.
    """

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items() if inner is not None}
        return [filled(inner) for inner in value] if isinstance(value, list) else value

    return {name: filled(value) for name, value in columns.items()}


def _files_of(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = [path for path in files if _suffix(path) in SUFFIXES]
    endings = ", ".join(SUFFIXES)
    if not found:
        rule = f"a directory of data must contain files that end with one of {endings}, or with .gz after it"
        raise DataError(str(folder), found="a directory without data files", rule=rule, fix="name a file")
    splits = {split_of(path): path for path in found}
    splits.pop(None, None)
    if len(splits) > 1:
        raise DataError(
            str(folder),
            found="files of several splits: " + ", ".join(path.name for path in splits.values()),
            rule="a directory of data must contain the files of one split",
            fix="name the files: train: FILE, validation: FILE",
        )
    if others := [path.name for path in files if path not in found]:
        note(f"{folder}: files that are not read, because their names do not end with {endings}: {', '.join(others)}")
    return found


def split_of(path: Path) -> str | None:
    """Return the split whose name the name of a file begins with: train-0.parquet, dev.jsonl; None for others."""
    return _SPLITS.get(re.split(r"[-_.]", path.name.lower())[0])


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _rows_of(path: Path) -> Iterator[Row]:
    match _suffix(path):
        case ".parquet":
            yield from _parquet(path)
        case ".csv" | ".tsv" as suffix:
            with _text(path, newline="") as file:
                yield from _csv(path, file, "\t" if suffix == ".tsv" else ",")
        case ".json":
            with _text(path) as file:
                stream = _Stream(path, file)
                array = stream.next() == "["
                if array:
                    yield from _array(stream)
            if not array:
                with _text(path) as file:
                    yield from _json_lines(path, file)
        case _:
            with _text(path) as file:
                yield from _json_lines(path, file)


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file. Bytes that are not UTF-8 are kept as surrogates, to be named with their line."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as raw:
            # Windows puts a byte-order mark first, which utf-8-sig removes.
            yield io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    except gzip.BadGzipFile as error:
        raise _damaged(str(path), error) from None
    except OSError as error:
        rule = "a data file must exist and be readable; its path is relative to the recipe"
        raise DataError(str(path), found=error.strerror or str(error), rule=rule, fix="check the path") from None


def _read(where: str, file: TextIO, size: int, *, line: bool = False) -> str:
    try:
        return file.readline(size) if line else file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(where, error) from None


def _damaged(where: str, error: Exception) -> DataError:
    rule, fix = "a .gz file must be whole", "copy the file again, or compress it again"
    return DataError(where, found=f"damaged gzip data: {error}"[:200], rule=rule, fix=fix)


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, from 1."""
    number = 1
    while line := _read(f"{path}, line {number}", file, MAX_LINE + 1, line=True):
        if len(line) > MAX_LINE:
            raise _too_long(f"{path}, line {number}", "a line")
        _check_utf8(path, number, line)
        yield number, line
        number += 1


def _too_long(where: str, what: str) -> DataError:
    found, rule = f"more than {MAX_LINE} characters", f"{what} must have at most {MAX_LINE} characters"
    return DataError(where, found=found, rule=rule, fix="split the record, or shorten its texts")


def _check_utf8(path: Path, line: int, text: str) -> None:
    """Raise DataError for a byte that is not UTF-8; `text` begins at the beginning of a line, or in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = text.rfind("\n", 0, error.start) + 1
        character = error.start - start + 1
        found = f"byte 0x{ord(text[error.start]) - 0xDC00:02x} at character {character}, which is not UTF-8"
        where = f"{path}, line {line + text.count(chr(10), 0, error.start)}"
        rule, fix = "a data file must be UTF-8 text", "save the file as UTF-8"
        raise DataError(where, found=found, rule=rule, fix=fix) from None


def _json_lines(path: Path, file: TextIO) -> Iterator[Row]:
    for number, line in _lines(path, file):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(where, str(error)) from None
            yield Row(where, _object(where, value))


def _not_json(where: str, found: str) -> DataError:
    rule = "a line must contain one JSON object; a .json file may also be one array of objects"
    return DataError(where, found=found[:200], rule=rule, fix="write each record as one line of JSON")


def _object(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _not_json(where, f"a JSON {type(value).__name__}")
    return value


class _Stream:
    """The text of a file from a position on. What was decoded is dropped; more is read when it is needed."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self._first_line = 1

    @property
    def line(self) -> int:
        """The number of the line of the position."""
        return self.line_of(self.at)

    def line_of(self, position: int) -> int:
        """Return the number of the line of another position in `text`."""
        return self._first_line + self.text.count("\n", 0, position)

    def more(self) -> bool:
        """Read as much again as is held; return whether there was more."""
        self._first_line = self.line
        self.text, self.at = self.text[self.at :], 0
        end = self.line_of(len(self.text))
        piece = _read(f"{self.path}, line {end}", self.file, max(_CHUNK, len(self.text)))
        _check_utf8(self.path, end, piece)
        self.text += piece
        return bool(piece)

    def next(self) -> str:
        """Move past white space, and return the character there; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self, where: str) -> Any:
        """Decode the value at the position, and move past it."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end - self.at > MAX_LINE:
                    raise _too_long(where, "a record")
                self.at = end
                return value
            except (ValueError, RecursionError) as error:
                # The value may only be cut off.
                if len(self.text) - self.at > MAX_LINE:
                    raise _too_long(where, "a record") from None
                if not self.more():
                    if isinstance(error, json.JSONDecodeError):
                        raise _not_json(where, f"{error.msg} in line {self.line_of(error.pos)}") from None
                    raise _not_json(where, str(error)) from None


def _array(stream: _Stream) -> Iterator[Row]:
    """Yield the objects of a JSON array, whose "[" the stream has reached."""
    stream.at += 1
    number, after = 1, "]" if stream.next() == "]" else ","
    while after == ",":
        found = stream.next()
        where = f"{stream.path}, record {number} (line {stream.line})"
        if found != "{":
            raise _not_json(where, f"{found!r} in place of an object" if found else "the end of the file")
        yield Row(where, stream.value(where))
        number += 1
        after = stream.next()
        if after not in (",", "]"):
            found = f"{after!r} after the record" if after else "the end of the file after the record"
            raise _not_json(where, f"{found}, in place of ',' or ']'")
        stream.at += after == ","
    stream.at += 1
    if stream.next():
        raise _not_json(f"{stream.path}, line {stream.line}", f"{stream.next()!r} after the end of the array")


def _csv(path: Path, file: TextIO, delimiter: str) -> Iterator[Row]:
    rule = "the first line must name the columns, and every row must have as many fields as it names"
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    lines = _lines(path, file)
    first, header = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if delimiter == "," and "," not in header and ";" in header:
        delimiter = ";"  # as spreadsheets write it where a comma separates decimals
    reader = csv.reader(chain([header], (line for _, line in lines)), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + first}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fix = "put quotes around fields that contain quotes or line ends, and write each quote in them twice"
            raise DataError(where, found=str(error), rule="a CSV file must have whole fields", fix=fix) from None
        if fields is None:
            return
        if not fields:
            continue  # an empty line
        if names is None:
            names = [name.strip() for name in fields]
            if double := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(where, found=f"several columns {double[0]!r}", rule=rule, fix="rename the columns")
            continue
        if len(fields) != len(names):
            found = f"{len(fields)} fields; the first line names {len(names)} columns: {', '.join(names)}"
            raise DataError(where, found=found, rule=rule, fix="put quotes around fields that contain a separator")
        yield Row(where, dict(zip(names, fields, strict=True)), untyped=True)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    rule, fix = "a .parquet file must be a whole Parquet file", "check the path, or write the file again"
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", without_fillers(columns))
    except (OSError, pyarrow.ArrowException) as error:
        found = getattr(error, "strerror", None) or str(error)
        where = f"{path}, row {number + 1}" if number else str(path)
        raise DataError(where, found=found[:200], rule=rule, fix=fix) from None
