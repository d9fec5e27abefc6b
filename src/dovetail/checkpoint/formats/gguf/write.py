"""A merged model written as a GGUF file like another one: its metadata, and its tensors except the quantized layers.

Where every layer keeps the format of its tensor, the file is copied and the bytes of these tensors are replaced: for a
kept model, codes alone change, and without training not a byte. Otherwise the table of tensors is written anew, with
the same names, shapes and order. Tensors of the file that no layer replaces must be those of the model.
"""

from __future__ import annotations

import math
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.attach import stock_in_place
from dovetail.checkpoint.formats.gguf.blocks import GGUFBlocks
from dovetail.checkpoint.formats.gguf.families import FAMILIES
from dovetail.checkpoint.formats.gguf.header import Header, tensor_nbytes
from dovetail.checkpoint.formats.gguf.names import (
    LayerTensor,
    Names,
    expert_tensors,
    linear_tensors,
    read_bytes,
    read_dense,
)
from dovetail.checkpoint.packed import stored
from dovetail.checkpoint.published import published_parts
from dovetail.links.quantize.ggml import BlockFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "MXFP4": 38}
"""llama.cpp's number of a file whose matrices have this format, under "general.file_type"."""
_PIECE = 1 << 24
_UINT32 = struct.pack("<I", 4)
"""The type of a value."""


@dataclass(frozen=True)
class Written:
    """The difference of a file to the one that it is like.

    changed     tensors whose bytes differ
    codes_only  whether these bytes are codes alone
    """

    changed: int
    codes_only: bool


@dataclass(frozen=True)
class Places:
    """The tensors of a file.

    layers  path of a quantized layer -> its tensor
    first   path of a tensor of the model -> the first of the paths that tied tensors have, under which it is stored
    model   class of the model
    """

    header: Header
    names: Names
    layers: Mapping[str, LayerTensor]
    first: Mapping[str, str]
    model: str

    def check_others(self, form: GGUFBlocks, others: Mapping[str, Tensor]) -> None:
        """Raise ExportError where a tensor that is copied is not the model's, or the file lacks one of the model.

        others  path -> tensor of the model, without the quantized layers
        """
        mine, compared = {each.name for each in self.layers.values()}, set[str]()
        for name in self.header.shapes:
            if name not in mine:
                path = self._path(self.names.names.get(name, ""))
                dtype = others[path].dtype if path in others else torch.float32
                for found, tensor in read_dense(self.header, name, self.names, dtype).items():
                    self._same(form, found, tensor, others)
                    compared.add(self._path(found))
        for found, tensor in self.names.gathered.items():
            self._same(form, found, tensor, others)
            compared.add(self._path(found))
        for path in sorted(others.keys() - compared):
            # A bias that is absent is zero to llama.cpp.
            if others[path].is_floating_point() and not (path.endswith(".bias") and not bool(others[path].any())):
                rule = "the file must have all tensors of the model that are not quantized"
                fix = "name a file of this model; one without output.weight is of a model with a tied head"
                raise form.no_tensor(path, f"no such tensor in {self.header.path}", rule, fix)

    def _path(self, path: str) -> str:
        """Return the name under which the model's tensors are stored."""
        return self.first.get(path, path)

    def _same(self, form: GGUFBlocks, path: str, tensor: Tensor, others: Mapping[str, Tensor]) -> None:
        path = self._path(path)
        if path not in others:
            return
        mine = others[path]
        if tensor.shape != mine.shape:
            found = f"{list(tensor.shape)} in {self.header.path}, {list(mine.shape)} in the model"
            raise form.no_tensor(
                path, found, "the tensor must have the shape of the model's", "name a file of this model"
            )
        same = tensor.to(mine.dtype) == mine
        if path.endswith("norm.weight") and (family := FAMILIES.get(self.model)) is not None and family.shifted:
            same |= tensor.float() + 1 == mine.float() + 1  # what is stored, and what the model multiplies by
        if differing := int((~same).sum()):
            raise form.no_tensor(
                path,
                f"{differing:,} of {tensor.numel():,} weights that are not those of {self.header.path}",
                "tensors that are not quantized are copied from the file, and must be the model's",
                "name the file that the model was loaded from, or a file of it in F32, F16 or BF16",
            )

    def write(
        self,
        part: Path,
        layers: Mapping[str, QuantizedWeight],
        form: GGUFBlocks,
        encode: Callable[[str, QuantizedWeight], Tensor],
    ) -> Written:
        """Write the file. `encode` returns the bytes of a layer, uint8 (rows, bytes of a row), and proves them."""
        header = self.header
        formats = {path: form.form(path, quantized) for path, quantized in layers.items()}
        types = {**header.types, **{self.layers[path].name: each.number for path, each in formats.items()}}
        if types == dict(header.types):
            shutil.copyfile(header.path, part)
            starts = {name: start for name, (start, _) in header.places.items()}
        else:
            starts = _lay_out(part, header, types, {each.name for each in formats.values()})
        changed, codes_only = set[str](), True
        with part.open("r+b") as file:
            for path, quantized in layers.items():
                place = self.layers[path]
                content, rows = in_order(encode(path, quantized), place.rows), quantized.shape[0]
                if types[place.name] == header.types[place.name]:
                    differs = content != read_bytes(header, place.name, range(place.first, place.first + rows))
                    differs = differs.reshape(-1, formats[path].nbytes).any(axis=0)
                    if not differs.any():
                        continue
                    codes_only &= not any(differs[a:b].any() for a, b in formats[path].scale_places)
                else:
                    codes_only = False
                changed.add(place.name)
                file.seek(starts[place.name] + place.first * (content.nbytes // rows))
                file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
        return Written(len(changed), codes_only)


def placed(form: GGUFBlocks, header: Header, model: PreTrainedModel, layers: Mapping[str, QuantizedWeight]) -> Places:
    """Return where each quantized layer belongs in a file like this one, and the names of its other tensors.

    layers  by their paths in the checkpoint (`dovetail.checkpoint.published`)
    errors  ExportError for a layer that the file lacks, or has in another shape, and where the layers of experts in one
            tensor are not all of its rows, in one format
    """
    parts = published_parts(model)
    with stock_in_place(model):
        names = Names(header, model)
        tensors = linear_tensors(header, model, names)
    experts, found, rows = expert_tensors(header, names, parts), dict[str, LayerTensor](), Counter[str]()
    kinds: dict[str, BlockFormat] = {}
    for path, quantized in layers.items():
        fix = "name a GGUF file of this very model"
        part = parts[path]
        tensor = tensors.get(part.layer) if part.experts is None else experts.get(path)
        if tensor is None:
            rule = "the file must have a tensor for each quantized layer, with whole rows"
            raise form.no_tensor(path, f"no such tensor in {header.path}", rule, fix)
        shape, kind = header.shapes[tensor.name], form.form(path, quantized)
        if shape != quantized.shape if part.experts is None else shape[-1] != quantized.shape[1]:
            shown = f"{tensor.name} of {list(shape)} in {header.path}, a layer of {list(quantized.shape)}"
            raise form.no_tensor(path, shown, "the tensor must have the shape of the layer", fix)
        if kinds.setdefault(tensor.name, kind) != kind:
            shown, rule = f"{kind.name} and {kinds[tensor.name].name}", "the experts in a tensor must have one format"
            raise form.no_tensor(path, shown, rule, "use one quantizer for all experts of the module")
        found[path] = tensor
        rows[tensor.name] += quantized.shape[0]
    for name, count in rows.items():
        if count != math.prod(header.shapes[name][:-1]):
            shown, rule = f"{name} of {list(header.shapes[name])}", f"the tensor must have {count:,} rows"
            raise form.no_tensor(name, shown, rule, "name a GGUF file of this very model")
    first = {path: paths[0] for paths, _ in stored(model) for path in paths}
    return Places(header, names, found, first, type(model).__name__)


def in_order(rows: Tensor, order: Tensor | None) -> np.ndarray:
    """Return the bytes of a layer in the order of the tensor's rows."""
    if order is not None:
        moved = torch.empty_like(rows)
        moved[order] = rows
        rows = moved
    return rows.contiguous().view(-1).numpy()


def _lay_out(part: Path, header: Header, types: Mapping[str, int], formats: set[str]) -> dict[str, int]:
    """Write a file with tensors of other types, empty, and copies of the others; return where each tensor begins.

    formats  of the other types
    """
    head, starts = header.retyped(types)
    end = 0
    with header.path.open("rb") as source, part.open("wb") as file:
        file.write(_with_file_type(header, head, formats))
        for name, (start, nbytes) in header.places.items():
            end = max(end, starts[name] + tensor_nbytes(header.shapes[name], types[name]))
            if types[name] == header.types[name]:
                source.seek(start)
                file.seek(starts[name])
                for at in range(0, nbytes, _PIECE):
                    file.write(source.read(min(_PIECE, nbytes - at)))
        file.truncate(-(-end // header.alignment) * header.alignment)
    return starts


def _with_file_type(header: Header, head: bytes, formats: set[str]) -> bytes:
    """Return the head with the "general.file_type" of the layers, where they have one format and the file says one."""
    entry = header.entries.get("general.file_type")
    if entry is None or entry[-8:-4] != _UINT32 or len(formats) != 1:
        return head
    if (number := FILE_TYPES.get(next(iter(formats)))) is None:
        return head
    return head.replace(entry, entry[:-4] + struct.pack("<I", number), 1)
