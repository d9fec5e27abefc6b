"""Weights that stay on disk: tensors that are views of safetensors files, read where they are used.

The pages of a file that were read count as memory of the process until `Disk.drop` gives them back. The tensors must
not be written to: a change in place is lost when its page is given back.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.files import atomic, open_tensors, writing
from dovetail.models.dtypes import STORED

_NAMES = {dtype: name for name, dtype in STORED.items()}
_ALIGNED = 64
"""Tensors start at a multiple of so many bytes, as those that torch allocates."""
_CHUNK = 1 << 26
"""Bytes that are written at a time."""


class Disk:
    """Files of tensors that a model reads its weights from: those of a checkpoint, and its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[Path, mmap.mmap] = {}
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def map(self, path: Path, *, owner: str = "a checkpoint") -> dict[str, Tensor]:
        """Return the tensors of a safetensors file as views of the file. Raises LoadError where it cannot be read."""
        with open_tensors(path, owner=owner):  # checks the header: its shapes, and its places in the file
            pass
        with path.open("rb") as file:
            nbytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(nbytes))
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps[path] = memory
        return {
            name: _view(memory, 8 + nbytes, entry) for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] in STORED
        }  # fmt: skip

    def drop(self) -> None:
        """Give back the memory of all pages that were read; they are read again where they are used.

        On Linux; other systems take such pages themselves where memory is short.
        """
        if sys.platform == "linux":
            for memory in self._maps.values():
                memory.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def dropping(self, model: nn.Module) -> Iterator[None]:
        """While entered, give the pages back after the forward pass of each of the model's blocks."""
        inside: list[str] = []
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and not name.startswith(tuple(inside)):
                inside.append(f"{name}.")
                handles += [block.register_forward_hook(lambda *_: self.drop()) for block in module]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.drop()

    def path(self, name: str) -> Path:
        """Return the path of one of its own files."""
        return self.folder / f"{name}.safetensors"

    def store(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> dict[str, Tensor]:
        """Write tensors to one of its own files, atomically, and return them as views of the file."""
        self.write(self.path(name), tensors, metadata)
        return self.map(self.path(name))

    def remove(self, name: str) -> None:
        """Remove one of its own files; tensors of it that are in use stay valid."""
        self._maps.pop(self.path(name), None)
        self.path(name).unlink(missing_ok=True)

    def write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file, atomically, tensor by tensor; pages that were read for it are given back."""
        order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        for name in order:
            tensor = tensors[name]
            end = at + tensor.nbytes
            header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNED)
        with writing(path), atomic(path) as part, part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                for chunk in flat.split(_CHUNK):
                    file.write(chunk.numpy().data)
                self.drop()


def _view(memory: mmap.mmap, start: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = STORED[entry["dtype"]], entry["shape"]
    first, last = (start + offset for offset in entry["data_offsets"])
    if first == last:
        return torch.empty(shape, dtype=dtype)
    if first % dtype.itemsize:  # of a writer that aligns nothing
        return torch.frombuffer(bytearray(memory[first:last]), dtype=dtype).view(shape)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=first).view(shape)
