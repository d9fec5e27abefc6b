"""Records and rows that are too many for memory: in a temporary file, decoded when they are read.

A list of token ids takes about 40 bytes per token, so a million rows of 200 tokens would take 8 GB. What is small stays
a list. The file is in the folder of temporary files (the environment variable TMPDIR names another one), without a
name, so that it is gone when the process ends. It is read, not mapped: what was read does not count as memory of the
process.
"""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from dovetail.errors import DataError
from dovetail.files import on_full_disk
from dovetail.progress import note_once

T = TypeVar("T")

IN_MEMORY = 1 << 26
"""Encoded bytes up to which values stay a list; as Python objects they take several times as much."""


@dataclass(frozen=True)
class Code(Generic[T]):
    """How a value becomes bytes, and back."""

    encode: Callable[[T], bytes]
    decode: Callable[[bytes], T]


def _json_of(record: Any) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except TypeError as error:
        rule, fix = "the values of a record must be texts, numbers, lists and mappings", "convert the column"
        raise DataError("a record", found=f"{record!r}: {error}"[:200], rule=rule, fix=fix) from None


def _bytes_of(row: dict[str, Any]) -> bytes:
    """Return a line of JSON, with the lengths of lists in place of these, and the numbers of all lists as int32."""
    numbers = array("i")
    head: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            numbers.extend(value)
            head[name] = [len(value)]
        else:
            head[name] = value
    return json.dumps(head).encode() + b"\n" + numbers.tobytes()


def _row_of(encoded: bytes) -> dict[str, Any]:
    head, _, rest = encoded.partition(b"\n")
    numbers = array("i")
    numbers.frombytes(rest)
    row: dict[str, Any] = json.loads(head)
    at = 0
    for name, value in row.items():
        if isinstance(value, list):
            row[name] = numbers[at : at + value[0]].tolist()
            at += value[0]
    return row


RECORD: Code[Any] = Code(_json_of, json.loads)
ROW: Code[Any] = Code(_bytes_of, _row_of)
"""The codes of a record, JSON, and of a row of tokens, whose numbers as JSON would take as long as the tokenizer."""


class Stored(Sequence[T]):
    """Values in a file. A slice is a view of the same file.

    places   numbers of the values that the sequence has
    """

    def __init__(self, file: _File[T], places: Sequence[int]) -> None:
        self._file, self._places = file, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Stored[T]: ...
    def __getitem__(self, at: int | slice) -> T | Stored[T]:
        if isinstance(at, slice):
            return Stored(self._file, self._places[at])
        return self._file.read(self._places[at])

    def select(self, places: Iterable[int]) -> Stored[T]:
        """Return a view of the values at these places."""
        return Stored(self._file, array("Q", (self._places[at] for at in places)))


class _File(Generic[T]):
    """A temporary file of values, and where each begins."""

    def __init__(self, values: Iterable[T], code: Code[T]) -> None:
        folder = Path(tempfile.gettempdir())
        note_once(f"data of more than {IN_MEMORY >> 20} MB are in a temporary file in {folder} (or where TMPDIR says)")
        self._code, self._lock = code, threading.Lock()
        self._starts = array("Q", [0])
        with on_full_disk(folder):
            self._file = tempfile.TemporaryFile(prefix="dovetail-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            for value in values:
                self._starts.append(self._starts[-1] + self._file.write(code.encode(value)))
            self._file.flush()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, number: int) -> T:
        start, stop = self._starts[number], self._starts[number + 1]
        with self._lock:
            self._file.seek(start)
            encoded = self._file.read(stop - start)
        return self._code.decode(encoded)


def gathered(values: Iterable[T], code: Code[T]) -> Sequence[T]:
    """Return the values as a list, or as a sequence on disk where they have more than IN_MEMORY bytes.

    Raises DataError for a value that JSON cannot hold, and OutputError where the disk is full.
    """
    kept: list[T] = []
    size, values = 0, iter(values)
    for value in values:
        kept.append(value)
        size += len(code.encode(value))
        if size > IN_MEMORY:
            file = _File(chain(kept, values), code)
            return Stored(file, range(len(file)))
    return kept


def select(values: Sequence[T], places: Iterable[int]) -> Sequence[T]:
    """Return the values at these places, as a list or, of values on disk, as a view."""
    return values.select(places) if isinstance(values, Stored) else [values[at] for at in places]
