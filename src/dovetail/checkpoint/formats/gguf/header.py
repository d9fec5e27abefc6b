"""The header of a GGUF file: its metadata and its table of tensors, checked before any other program reads them.

A GGUF file, versions 2 and 3, little-endian (ggml's docs/gguf.md):

    "GGUF", uint32 version, uint64 number of tensors, uint64 number of keys
    each key:     text name, uint32 type, value           a text is a uint64 length and UTF-8 bytes
    each tensor:  text name, uint32 dimensions, uint64 each (the fastest first), uint32 type, uint64 offset
    padding to `general.alignment`, and the tensors' bytes

The gguf package makes several objects of every element of an array, so numbers that a damaged file claims are compared
with its size, and elements have a limit. Nothing of the tensors' bytes is read here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.errors import LoadError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ELEMENTS = 1 << 22
"""The most elements of all arrays: a vocabulary of 262,144 tokens with scores, types and merges has 1.3 million."""
_TEXT_NBYTES = 1 << 24
_ENTRIES = 1 << 17
"""The most keys and the most tensors."""
_LAYERS = 1000
_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}
_FILES = "a GGUF file must be whole, of version 2 or 3, little-endian"


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of its model.

    metadata   key -> number or text; arrays are left out
    entries    key -> its bytes in the file, without the arrays of the tokenizer
    shapes     name of a tensor -> its shape, in torch's order
    types      name of a tensor -> its ggml type
    places     name of a tensor -> where its bytes begin in the file, and their number
    table      where the table of tensors begins in the file
    """

    path: Path
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, int]
    version: int
    entries: Mapping[str, bytes]
    places: Mapping[str, tuple[int, int]]
    table: int

    @property
    def architecture(self) -> str:
        """The name of the architecture, in llama.cpp's spelling."""
        return str(self.metadata["general.architecture"])

    @property
    def weights(self) -> int:
        """The number of weights of all tensors."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def dtype(self) -> str:
        """The dtype that holds all values: the half type of a file without blocks, else float32."""
        matrices = {self.types[name] for name, shape in self.shapes.items() if len(shape) > 1}
        return _FLOATS.get(matrices.pop(), "float32") if len(matrices) == 1 else "float32"

    @property
    def alignment(self) -> int:
        """The number of bytes of which each tensor's offset is a multiple."""
        return self.metadata.get("general.alignment", 32)

    def retyped(self, types: Mapping[str, int]) -> tuple[bytes, dict[str, int]]:
        """Return the bytes up to the tensors of a file with other types, and where each tensor begins in it.

        types  name of a tensor -> its ggml type, of all tensors; the metadata is the same
        """
        with self.path.open("rb") as file:
            parts = [file.read(self.table)]
        offsets: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            offsets[name] = -(-end // self.alignment) * self.alignment
            end = offsets[name] + tensor_nbytes(shape, types[name])
            parts.append(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
            parts.append(struct.pack("<IQ", types[name], offsets[name]))
        head = b"".join(parts)
        start = -(-len(head) // self.alignment) * self.alignment
        return head.ljust(start, b"\0"), {name: start + offset for name, offset in offsets.items()}

    def without_data(self) -> bytes:
        """Return a GGUF file of the same metadata and names of tensors, without vocabulary and weights.

        transformers reads the configuration from it, for which the gguf package would take about 10 seconds and 1 GB in
        a vocabulary of 262,144 tokens. The size of the vocabulary is then the first one of the embedding.
        """
        size = f"{self.architecture}.vocab_size"
        rows = self.shapes.get("token_embd.weight", (1,))[0]
        keys = {size: _text(size) + struct.pack("<II", 4, min(rows, 2**32 - 1))}
        keys |= self.entries
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.shapes), len(keys) + 1), *keys.values()]
        parts += [_text("tokenizer.ggml.tokens"), struct.pack("<IIQ", _ARRAY, _TEXT, 1), _text("t")]
        parts += [_text(name) + struct.pack("<IQIQ", 1, 0, 0, 0) for name in self.shapes]
        return b"".join(parts) + bytes(1 << 12)


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file. Raises LoadError for a file that is damaged or cut short."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(path, content).header()
    except (OSError, ValueError) as error:  # an empty file is a ValueError of mmap; UnicodeDecodeError is one
        raise _refused(path, f"{type(error).__name__}: {error}"[:200]) from None
    except struct.error:
        raise _refused(path, "a header that goes beyond the end of the file") from None


def tensor_nbytes(shape: tuple[int, ...], number: int) -> int:
    """Return the bytes of a tensor of a ggml type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    return math.prod(shape) // block * nbytes


def _refused(path: Path, found: str, rule: str = _FILES) -> LoadError:
    return LoadError(f"model {path}", found=found, rule=rule, fix="download or convert the file again")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class _Reader:
    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at, self.elements = path, content, 0, 0

    def take(self, format: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{format}", self.content, self.at)
        self.at += struct.calcsize(f"<{format}")
        return found

    def skip(self, nbytes: int) -> None:
        if nbytes > len(self.content) - self.at:
            raise struct.error
        self.at += nbytes

    def text(self) -> str:
        (length,) = self.take("Q")
        if length > _TEXT_NBYTES:
            raise _refused(self.path, f"a text of {length:,} bytes", f"a text has at most {_TEXT_NBYTES:,} bytes")
        start = self.at
        self.skip(length)
        return self.content[start : self.at].decode()

    def value(self) -> Any:
        """Return a number or a text; of an array, None."""
        (kind,) = self.take("I")
        if kind == _ARRAY:
            self.array()
            return None
        if kind == _TEXT:
            return self.text()
        if kind not in _SCALARS:
            raise _refused(self.path, f"a value of type {kind}", "the types of GGUF are 0 to 12")
        return self.take(_SCALARS[kind])[0]

    def array(self) -> None:
        kind, length = self.take("IQ")
        self.elements += length
        if self.elements > _ELEMENTS:
            rule = f"the arrays of the metadata have at most {_ELEMENTS:,} elements"
            raise _refused(self.path, f"{self.elements:,} elements", rule)
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        elif kind == _TEXT:
            for _ in range(length):
                self.skip(*self.take("Q"))
        else:
            raise _refused(self.path, f"an array of type {kind}", "an array holds numbers or texts")

    def header(self) -> Header:
        if self.content[:4] != b"GGUF":
            raise _refused(self.path, f"the first bytes {self.content[:4]!r}", 'a GGUF file starts with "GGUF"')
        self.at = 4
        version, tensors, keys = self.take("IQQ")
        if version not in (2, 3):
            raise _refused(self.path, f"version {version}")
        if max(tensors, keys) > _ENTRIES:
            rule = f"a file has at most {_ENTRIES:,} tensors and as many keys"
            raise _refused(self.path, f"{tensors:,} tensors, {keys:,} keys", rule)
        metadata: dict[str, Any] = {}
        entries: dict[str, bytes] = {}
        for _ in range(keys):
            start, key = self.at, self.text()
            value = self.value()
            if key in entries:
                raise _refused(self.path, f"the key {key[:100]!r} twice", "a key must be unique")
            vocabulary = value is None and key.startswith("tokenizer.")
            entries[key] = b"" if vocabulary else self.content[start : self.at]
            if value is not None:
                metadata[key] = value
            if key.endswith("block_count") and not (type(value) is int and value <= _LAYERS):
                raise _refused(self.path, f"{key[:100]}={value}", f"a model has at most {_LAYERS} layers")
        if not isinstance(metadata.get("general.architecture"), str):
            raise _refused(self.path, "no general.architecture", "the file must name its architecture")
        if (count := metadata.get("split.count", 1)) != 1:
            rule, fix = "a model must be one file", "join them: llama-gguf-split --merge FIRST_FILE OUTPUT"
            raise LoadError(f"model {self.path}", found=f"one of {count} files", rule=rule, fix=fix)
        table = self.at
        shapes, types, offsets = self.tensors(tensors)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _refused(self.path, f"general.alignment={alignment}", "the alignment must be a power of two")
        start = -(-self.at // alignment) * alignment
        places: dict[str, tuple[int, int]] = {}
        for name, (offset, nbytes) in offsets.items():
            if start + offset + nbytes > len(self.content):
                found = f"{name[:100]} up to byte {start + offset + nbytes:,} of {len(self.content):,}"
                raise _refused(self.path, found, "the file must hold the tensors that it lists")
            places[name] = start + offset, nbytes
        end = start
        for name, (first, nbytes) in sorted(places.items(), key=lambda place: place[1]):
            if first < end:
                found = f"{name[:100]} at byte {first:,}, where another tensor is"
                raise _refused(self.path, found, "the tensors must not share bytes")
            end = first + nbytes
        kept = {key: entry for key, entry in entries.items() if entry}
        return Header(self.path, metadata, shapes, types, version, kept, places, table)

    def tensors(self, count: int) -> tuple[dict[str, tuple[int, ...]], dict[str, int], dict[str, tuple[int, int]]]:
        """Return shapes, types, and the place of each tensor after the start of the data, with its number of bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        shapes: dict[str, tuple[int, ...]] = {}
        types: dict[str, int] = {}
        offsets: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            name = self.text()
            (dimensions,) = self.take("I")
            if dimensions > 4 or name in shapes:
                found = f"{name[:100]} twice" if name in shapes else f"{name[:100]} of {dimensions} dimensions"
                raise _refused(self.path, found, "a tensor has a name of its own and at most 4 dimensions")
            sizes = self.take(f"{dimensions}Q")
            kind, offset = self.take("IQ")
            if kind not in iter(GGMLQuantizationType):
                raise _refused(self.path, f"{name[:100]} of ggml type {kind}", "gguf must know the type of a tensor")
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if math.prod(sizes) == 0 or (sizes[:1] and sizes[0] % block):
                raise _refused(self.path, f"{name[:100]} of {list(sizes)}", f"a row must have a multiple of {block}")
            shapes[name], types[name] = tuple(reversed(sizes)), kind
            offsets[name] = offset, math.prod(sizes) // block * nbytes
        return shapes, types, offsets
