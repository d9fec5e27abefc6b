"""A merged model written as a GGUF file of its own: metadata, tokenizer and tensors as llama.cpp's converter has them.

Quantized layers are in blocks (`dovetail.checkpoint.formats.gguf.blocks`), other matrices in the dtype of the model,
and vectors in float32. The written file is read back by the names and rearrangements of transformers, which are another
program's than those that it was written with: every tensor must be the model's, and the rows of every layer in place.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.checkpoint.formats.gguf.blocks import GGUFBlocks
from dovetail.checkpoint.formats.gguf.families import (
    LIKE,
    Family,
    family_of,
    hyperparameter_notes,
    rope_factors,
    write_hyperparameters,
)
from dovetail.checkpoint.formats.gguf.header import tensor_nbytes
from dovetail.checkpoint.formats.gguf.names import read_bytes
from dovetail.checkpoint.formats.gguf.read import checked_header
from dovetail.checkpoint.formats.gguf.vocabulary import Vocabulary, vocabulary_of
from dovetail.checkpoint.formats.gguf.write import FILE_TYPES, in_order, placed
from dovetail.checkpoint.published import Part, published_parts
from dovetail.errors import ExportError
from dovetail.links.quantize.ggml import BLOCK_FORMATS

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""dtype of a matrix that is not quantized -> ggml type."""
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class NewFile:
    """A model that llama.cpp reads without a file to be like."""

    model: PreTrainedModel
    family: Family
    vocabulary: Vocabulary

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> NewFile:
        """Check the family and the tokenizer of a model, whose values are not read. Raises ExportError."""
        return cls(model, family_of(model), vocabulary_of(tokenizer, model.config.vocab_size))

    def notes(self) -> list[str]:
        """Return what a reader of the report must know."""
        return hyperparameter_notes(self.model.config, self.family) + self.vocabulary.notes

    def write(
        self,
        part: Path,
        layers: Mapping[str, QuantizedWeight],
        others: Mapping[str, Tensor],
        form: GGUFBlocks,
        encode: Callable[[str, QuantizedWeight], Tensor],
    ) -> int:
        """Write the file, read it back, and return its number of tensors.

        others  path -> tensor of the model that is not quantized
        encode  returns the bytes of a layer, uint8 (rows, bytes of a row), and proves them
        """
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(part, self.family.architecture)
        formats = {path: form.form(path, quantized).name for path, quantized in layers.items()}
        writer.add_type("model")
        writer.add_name(Path(self.model.name_or_path or "").stem or "model")
        write_hyperparameters(writer, self.model.config, self.family)
        self.vocabulary.write(writer)
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        (most, _) = Counter(formats.values()).most_common(1)[0]
        if most in FILE_TYPES:
            writer.add_file_type(FILE_TYPES[most])
        parts = published_parts(self.model)
        names = self._names([*layers, *others], parts)
        plain = {path: self._stored(names[path], tensor) for path, tensor in others.items()}
        tensors: dict[str, list[str]] = {}
        for path in sorted(names, key=lambda path: _block_of(names[path])):
            tensors.setdefault(names[path], []).append(path)
        for name, paths in tensors.items():
            path = paths[0]
            if len(kinds := {formats.get(each, "") for each in paths}) > 1:
                rule, fix = "the experts in a tensor must have one format", "use one quantizer for all experts"
                raise form.no_tensor(path, f"{name} of {' and '.join(sorted(kinds))}", rule, fix)
            if path in layers:
                number, shape = BLOCK_FORMATS[formats[path]].number, layers[path].shape
                shape = shape if _stacked(path, parts[path]) == path else (len(paths), *shape)
            else:
                number, shape = _PLAIN[plain[path].dtype], tuple(plain[path].shape)
            _announce(writer, name, shape, number)
        if (factors := rope_factors(self.model.config)) is not None:
            _announce(writer, _FACTORS, tuple(factors.shape), GGMLQuantizationType.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, paths in tensors.items():
            if paths[0] in layers:
                rows = self.family.rows(name, self.model.config)
                content = torch.cat([encode(path, layers[path]) for path in paths])
                writer.write_tensor_data((content if rows is None else content[rows]).contiguous().view(-1).numpy())
            else:
                writer.write_tensor_data(_bytes(plain[paths[0]]))
        if factors is not None:
            writer.write_tensor_data(_bytes(factors))
        writer.close()
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        self._read_back(part, layers, others, form)
        return len(tensors) + (factors is not None)

    def _names(self, paths: list[str], parts: Mapping[str, Part]) -> dict[str, str]:
        """Return path -> name in the file, as the gguf package names them; the experts of a tensor share its name.

        parts  of the quantized layers (`published_parts`)
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.family.architecture)
        table = get_tensor_name_map(arch, self.model.config.get_text_config().num_hidden_layers)
        found = {}
        for path in paths:
            stem, dot, suffix = path.rpartition(".") if path.endswith((".weight", ".bias")) else (path, ".", "weight")
            if (name := table.get_name(_stacked(stem, parts.get(path)))) is None:
                where = f"export to gguf: {path}"
                rule = f"llama.cpp must have a tensor of this name in {self.family.architecture}"
                raise ExportError(where, found=f"no name in {self.family.architecture}", rule=rule, fix=LIKE)
            found[path] = name + dot + suffix
        return found

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor as llama.cpp has it: vectors and routers in float32, plus 1, in another order of rows."""
        if tensor.dim() < 2 or self.family.is_shifted(name) or ".ffn_gate_inp." in name:
            tensor = tensor.float()
        if tensor.dtype not in _PLAIN:
            rule, fix = "tensors that are not quantized must be float32, float16 or bfloat16", "load it in one of them"
            raise ExportError(f"export to gguf: {name}", found=str(tensor.dtype), rule=rule, fix=fix)
        if self.family.is_shifted(name):
            tensor = tensor + 1
        rows = self.family.rows(name, self.model.config)
        return tensor if rows is None else tensor[rows]

    def _read_back(
        self, part: Path, layers: Mapping[str, QuantizedWeight], others: Mapping[str, Tensor], form: GGUFBlocks
    ) -> None:
        """Raise ExportError where transformers' names and rearrangements do not give the model."""
        header = checked_header(part)
        places = placed(form, header, self.model, layers)
        places.check_others(form, others)
        for path, place in places.layers.items():
            content = in_order(form.encode(layers[path], torch.float32)["weight"], place.rows)
            rows = range(place.first, place.first + layers[path].shape[0])
            if not np.array_equal(content, read_bytes(header, place.name, rows)):
                rule, fix = "transformers must find the rows of a layer in their order", "report it"
                raise form.no_tensor(path, f"{place.name} with other bytes than transformers expects", rule, fix)


_FACTORS = "rope_freqs.weight"


def _block_of(name: str) -> int:
    """Return the number of a tensor's block; -1 for a tensor outside the blocks."""
    part = name.split(".")
    return int(part[1]) if part[0] == "blk" else -1


def _stacked(path: str, part: Part | None) -> str:
    """Return the path without the number of an MoE expert, under which the gguf package knows all of them."""
    if part is None or part.experts is None:
        return path
    parent, _, leaf = path.rsplit(".", 2)
    return f"{parent}.{leaf}"


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], number: int) -> None:
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType(number)
    writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor_nbytes(shape, number), raw_dtype=kind)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
