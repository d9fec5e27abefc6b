"""The file of an expert: a safetensors container of two byte tensors, directory and blocks, and a header as JSON.

docs/format.md defines the format. All sizes in the header are checked against the size of the file before a tensor is
allocated. One CRC-32C covers header and directory, and the directory holds the CRC-32C of each block, so a changed bit
is detected in everything that is read. A tensor is read without the blocks of the others.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic

from dovetail.errors import DataError, LoadError
from dovetail.experts.codec.codec import ENTRY, Coded, block_count, counts_of
from dovetail.experts.codec.native import crc32c
from dovetail.experts.vectors import Initial
from dovetail.files import atomic, first_problem

HEADER_NBYTES = 1 << 24
"""Largest header of the container."""
MAX_NUMEL = 1 << 48

_Size = Annotated[int, pydantic.Field(ge=0, le=MAX_NUMEL, strict=True)]
_Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
_Text = Annotated[str, pydantic.Field(max_length=500)]


class _Part(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """A byte tensor of the container."""

    dtype: Literal["U8"]
    shape: tuple[_Size]
    data_offsets: tuple[_Size, _Size]


class _Metadata(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    dovetail: str
    crc32c: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{8}$")]


class _Container(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    metadata: Annotated[_Metadata, pydantic.Field(alias="__metadata__")]
    directory: _Part
    blocks: _Part


class TensorEntry(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """A tensor: its name, shape, original dtype, and whether a matrix is stored by rows or by columns."""

    name: _Text
    shape: Annotated[tuple[_Size, ...], pydantic.Field(max_length=64)]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    order: Literal["rows", "columns"]

    @pydantic.model_validator(mode="after")
    def _small_enough(self) -> TensorEntry:
        if math.prod(max(size, 1) for size in self.shape) > MAX_NUMEL:
            raise ValueError(f"at most 2^48 values in {self.name[:80]}")
        if self.order == "columns" and len(self.shape) != 2:
            raise ValueError(f"only a matrix has columns, and {self.name[:80]} is not one")
        return self


class Header(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """The header of an expert's file.

    tensors     in the sorted order of their names
    scale       "vector": `scales` has one number for all; "tensor": one for each
    density     as requested
    alpha       of the scales
    initial, base, chain, adapter, peft   origin (`vectors.Origin`)
    provenance  further facts
    """

    format: Literal["dovetail-expert"] = "dovetail-expert"
    version: Literal[1] = 1
    tensors: tuple[TensorEntry, ...]
    scale: Literal["vector", "tensor"]
    scales: tuple[_Finite, ...]
    density: Annotated[float, pydantic.Field(ge=0, le=1)]
    alpha: Annotated[_Finite, pydantic.Field(gt=0)]
    initial: Initial = "zero"
    base: _Text | None = None
    chain: str | None = None
    adapter: dict[str, pydantic.JsonValue] | None = None
    peft: dict[str, pydantic.JsonValue] | None = None
    provenance: dict[str, pydantic.JsonValue] = {}

    @pydantic.model_validator(mode="after")
    def _goes_together(self) -> Header:
        names = [entry.name for entry in self.tensors]
        if any(first >= second for first, second in pairwise(names)):
            raise ValueError("names of tensors must rise, without repetition")
        if len(self.scales) != (1 if self.scale == "vector" else len(names)):
            raise ValueError(f"{len(self.scales)} scales for {len(names)} tensors, with one per {self.scale}")
        return self


def header_bytes(header: Header, directory: bytes, blocks_nbytes: int) -> bytes:
    """Return the bytes before the directory and the blocks."""
    text = header.model_dump_json()
    end = len(directory) + blocks_nbytes
    container = {
        "__metadata__": {"dovetail": text, "crc32c": f"{crc32c(text.encode() + directory):08x}"},
        "directory": {"dtype": "U8", "shape": [len(directory)], "data_offsets": [0, len(directory)]},
        "blocks": {"dtype": "U8", "shape": [blocks_nbytes], "data_offsets": [len(directory), end]},
    }
    data = json.dumps(container, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def write(path: Path, header: Header, coded: Sequence[Coded]) -> None:
    """Write to a temporary file, sync it and rename it. DataError for a header that is too large to be read."""
    directory = b"".join(each.directory.tobytes() for each in coded)
    head = header_bytes(header, directory, sum(len(each.blocks) for each in coded))
    if len(head) - 8 > HEADER_NBYTES:
        rule = f"a header may have at most {HEADER_NBYTES} bytes"
        raise DataError(str(path), found=f"a header of {len(head) - 8} bytes", rule=rule, fix="store less provenance")
    with atomic(path, shared=True) as part, part.open("wb") as file:
        file.write(head)
        file.write(directory)
        for each in coded:
            file.write(each.blocks.data)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, names: Sequence[str] | None = None) -> tuple[Header, dict[str, Coded]]:
    """Return header and coded tensors of a file; only those in `names`, if given, without the blocks of the others.

    errors  LoadError for an incomplete file, a file that is no expert, or a missing name
    """
    with _opened(path) as file:
        header, entries, first = _head(str(path), file)
        there = {entry.name for entry in header.tensors}
        wanted = there if names is None else set(names)
        if missing := wanted - there:
            rule, fix = "the file must hold the requested tensors", "see `dovetail inspect` for their names"
            raise LoadError(str(path), found=f"no tensor {min(missing)}", rule=rule, fix=fix)
        starts, coded, kept = _starts(header, entries), {}, []
        for place, entry in enumerate(header.tensors):
            if entry.name not in wanted:
                continue
            (block, offset), (block_end, offset_end) = starts[place], starts[place + 1]
            blocks = np.empty(offset_end - offset, np.uint8)
            file.seek(first + offset)
            if file.readinto(blocks.data) != len(blocks):
                raise LoadError(str(path), found="file truncated while reading", rule="the file must be complete")
            coded[entry.name] = Coded(entry.shape, entry.order == "columns", entries[block:block_end], blocks)
            kept.append(place)
    if len(kept) < len(header.tensors):
        scales = header.scales if header.scale == "vector" else tuple(header.scales[place] for place in kept)
        entries = tuple(header.tensors[place] for place in kept)
        header = header.model_copy(update={"tensors": entries, "scales": scales})
    return header, coded


def read_header(path: Path) -> tuple[Header, list[int]]:
    """Return the header of a file and the number of kept values of each tensor, without reading a block."""
    with _opened(path) as file:
        header, entries, _ = _head(str(path), file)
    counts = counts_of(entries)
    starts = [block for block, _ in _starts(header, entries)]
    return header, [int(counts[first:last].sum()) for first, last in pairwise(starts)]


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Open the file. Report every fault of the file or in it as LoadError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise LoadError(str(path), found="not a regular file", rule="an expert must be a file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise LoadError(str(path), found=error.strerror or str(error), rule="an expert must be a file") from None
    except pydantic.ValidationError as error:
        found, rule = f"not an expert; {first_problem(error)}", "an expert must be as docs/format.md defines"
        raise LoadError(str(path), found=found, rule=rule, fix="make one with `dovetail pack`") from None


def _head(where: str, file: BufferedReader) -> tuple[Header, np.ndarray, int]:
    """Return header, directory entries and start of the blocks, checked against each other and the file's size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, HEADER_NBYTES):
        found = f"not an expert: {size} bytes, and a header of {length}"
        rule = f"an expert must have a safetensors header within the file, of at most {HEADER_NBYTES} bytes"
        raise LoadError(where, found=found, rule=rule, fix="make one with `dovetail pack`")
    container = _Container.model_validate_json(file.read(length))
    _check_parts(where, container, size - 8 - length)
    file.seek(8 + length + container.directory.data_offsets[0])
    directory = file.read(container.directory.shape[0])
    text = container.metadata.dovetail
    if f"{crc32c(text.encode() + directory):08x}" != container.metadata.crc32c:
        rule = "header and directory must have the CRC-32C in the metadata"
        raise LoadError(where, found="another CRC-32C", rule=rule, fix="copy the file again")
    header = Header.model_validate_json(text)
    entries = np.frombuffer(directory, dtype=ENTRY)
    _check_entries(where, header, entries, container.blocks.shape[0])
    return header, entries, 8 + length + container.blocks.data_offsets[0]


def _check_parts(where: str, container: _Container, size: int) -> None:
    """Check that the two tensors have their declared lengths and fill the rest of the file without gaps."""
    ends = sorted((part.data_offsets for part in (container.directory, container.blocks)), key=lambda ends: ends)
    right = all(p.data_offsets[1] - p.data_offsets[0] == p.shape[0] for p in (container.directory, container.blocks))
    if not right or ends[0][0] != 0 or ends[0][1] != ends[1][0] or ends[1][1] != size:
        found = f"parts at {list(ends[0])} and {list(ends[1])} of {size} bytes"
        raise LoadError(where, found=found, rule="the parts must fill the file", fix="copy the file again")


def _check_entries(where: str, header: Header, entries: np.ndarray, nbytes: int) -> None:
    """Check that every block of the shapes has an entry, and that the lengths add up."""
    wanted, total = sum(block_count(math.prod(e.shape)) for e in header.tensors), int(entries["length"].sum(dtype="i8"))
    if wanted != len(entries) or total != nbytes:
        found = f"{len(entries)} blocks of {total} bytes; the shapes need {wanted}, and there are {nbytes} bytes"
        raise LoadError(where, found=found, rule="each 65,536 values must have an entry, and lengths must add up")


def _starts(header: Header, entries: np.ndarray) -> list[tuple[int, int]]:
    """Return number and offset of the first block of each tensor, and those after the last."""
    ends = np.concatenate([[0], np.cumsum(entries["length"].astype(np.int64))])
    numbers = accumulate((block_count(math.prod(entry.shape)) for entry in header.tensors), initial=0)
    return [(number, int(ends[number])) for number in numbers]
