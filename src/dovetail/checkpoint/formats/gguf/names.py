"""Which tensor of a GGUF file is which tensor of a model, by transformers' own map and rearrangements.

transformers rearranges some tensors after it has dequantized them (`TENSOR_PROCESSORS`): the rows of query and key in
Llama are permuted, a matrix of GPT-2 is transposed, 1 is subtracted from a norm of Gemma. `Names.order` applies the
rearrangement of a matrix to numbers of rows: where the result is a permutation of the rows, the rows of blocks can be
permuted in the same way.

A file stacks the matrices of MoE experts: `ffn_gate_exps` (experts, out, in). Their layers are rows of such a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dovetail.checkpoint.formats.gguf.header import Header
from dovetail.checkpoint.published import Part
from dovetail.errors import LoadError
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockWeight
from dovetail.models.experts import expert_layers
from dovetail.models.targets import all_layers, heads, inside, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_NUMBER = {form.number: form for form in BLOCK_FORMATS.values()}
"""ggml type -> format of blocks."""
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""ggml type -> dtype of a tensor without blocks."""
_CHUNK = 1 << 22
"""Weights that are dequantized at a time."""


@dataclass(frozen=True)
class LayerTensor:
    """The tensor of a linear layer in a file.

    name   of the tensor
    rows   row of the layer -> row of the tensor, int64; None where they are the same
    first  row at which the layer begins, over all matrices of a tensor that stacks those of experts
    """

    name: str
    rows: Tensor | None
    first: int = 0


class Names:
    """transformers' names and rearrangements for the tensors of a file.

    names  name in the file -> path in the model
    """

    def __init__(self, header: Header, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
        self.processor: Any = processor(config=model.config.to_dict())
        self.names = self._map(header, model)
        self._parsed: dict[str, Any] = {"tensors": {}}

    @property
    def gathered(self) -> dict[str, Tensor]:
        """The tensors that several tensors of the file are parts of."""
        return self._parsed["tensors"]

    def _map(self, header: Header, model: PreTrainedModel) -> dict[str, str]:
        """Return name in the file -> path in the model, as transformers' `get_gguf_hf_weights_map`.

        A path is looked up whole, then without its first parts: files of some families name the parts of the body. That
        function builds gguf's table again for every module, which takes seconds.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == header.architecture), None)
        if arch is None:
            rule, fix = "the gguf package must know the names of the architecture", "update the package gguf"
            raise LoadError(f"model {header.path}", found=header.architecture[:100], rule=rule, fix=fix)
        table = get_tensor_name_map(arch, model.config.get_text_config(decoder=True).num_hidden_layers)
        found: dict[str, str] = {}
        experts = expert_layers(model)
        stacked = (path.removesuffix(".weight") for path in model.state_dict())
        whole = dict.fromkeys(
            layer.rpartition(".")[0] if layer in experts else path
            for layer, path in zip(stacked, model.state_dict(), strict=True)
        )
        paths = [("", path) for path in whole]
        while paths:
            here: dict[str, str] = {}
            for prefix, path in paths:
                name = self.processor.preprocess_name(path)
                stem, suffix = name, ""
                if name.endswith((".weight", ".bias")):
                    stem, _, suffix = name.rpartition(".")
                    suffix = f".{suffix}"
                if (known := table.get_name(stem)) is None:
                    self.processor.perform_fallback_tensor_mapping(here, suffix, prefix, name)
                else:
                    here[known + suffix] = prefix + name
            found = here | found
            split = [(prefix, *path.partition(".")) for prefix, path in paths]
            paths = [(f"{prefix}{first}.", rest) for prefix, first, _, rest in split if rest]
        return found

    def process(self, weights: np.ndarray, name: str) -> Any:
        """Return transformers' tensor for one of the file, with its `weights` and its `name`, or None for no name."""
        return self.processor.process(
            weights=weights, name=name, tensor_key_mapping=self.names, parsed_parameters=self._parsed
        )

    def order(self, name: str, shape: tuple[int, ...]) -> Tensor | Literal["same", "transposed", "other"]:
        """Return how a matrix is rearranged; where its rows are permuted, row of the layer -> row of the tensor."""
        if len(shape) != 2:
            return "other"
        number = np.arange(shape[0], dtype=np.int32)
        given = np.broadcast_to(number[:, None], shape)
        found = self.processor.process(
            weights=given, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
        )
        moved = found.weights
        if found.name != name or moved is None or moved is given:
            return "same" if moved is given and found.name == name else "other"
        if moved.shape == shape[::-1] and np.array_equal(moved.T, given):
            return "transposed"
        rows = moved[:, 0]
        if moved.shape != shape or (moved != rows[:, None]).any() or not np.array_equal(np.sort(rows), number):
            return "other"
        return torch.from_numpy(rows.astype(np.int64))


def linear_tensors(header: Header, model: PreTrainedModel, names: Names) -> dict[str, LayerTensor]:
    """Return path of a layer -> its tensor, of the linear layers outside the heads whose rows stay whole.

    model  of stock modules; no weight is read
    """
    head_paths = heads(model)
    layers = {
        layer.name
        for layer in all_layers(model)
        if is_linear(layer.module) and layer.experts is None and not inside(layer.name, head_paths)
    }
    found = {}
    for name, shape in header.shapes.items():
        layer, _, leaf = names.names.get(name, "").rpartition(".")
        if leaf == "weight" and layer in layers:
            order = names.order(name, shape)
            if isinstance(order, Tensor) or order != "other":  # a chain sees a transposed matrix as the file stores it
                found[layer] = LayerTensor(name, order if isinstance(order, Tensor) else None)
    return found


def expert_tensors(header: Header, names: Names, parts: Mapping[str, Part]) -> dict[str, LayerTensor]:
    """Return path in the checkpoint -> its tensor, of the layers of MoE experts that are rows of a tensor in order.

    Tensors of numbers of rows are rearranged, as in `Names.order`.
    """
    by_parameter: dict[str, list[tuple[str, int, range]]] = {}
    for path, part in parts.items():
        if part.experts is not None:
            parameter, _, expert = part.layer.rpartition(".")
            by_parameter.setdefault(parameter, []).append((path, int(expert), part.rows))
    found = {}
    for name, shape in header.shapes.items():
        if len(shape) != 3 or not by_parameter:
            continue
        given = np.arange(1, 2 * shape[0] * shape[1] + 1).reshape(shape[0], shape[1], 2)  # 0: of another tensor
        parsed: dict[str, Any] = {"tensors": {}}
        with suppress(KeyError):  # of a tensor that the model does not have
            made = names.processor.process(
                weights=given, name=name, tensor_key_mapping=names.names, parsed_parameters=parsed
            )
            if made.name is not None:
                parsed["tensors"] = {names.names[name]: torch.from_numpy(np.ascontiguousarray(made.weights))}
        for parameter, numbers in parsed["tensors"].items():
            for path, expert, rows in by_parameter.get(parameter, []):
                mine = numbers[expert : expert + 1, rows.start : rows.stop].flatten()
                first = int(mine[0]) if len(mine) == 2 * len(rows) else 0
                if first and torch.equal(mine, torch.arange(first, first + len(mine))):
                    found[path] = LayerTensor(name, None, first // 2)
    return found


def read_bytes(header: Header, name: str, rows: range | None = None) -> np.ndarray:
    """Return the bytes of a tensor, or of some rows of all its matrices, uint8, a copy of its own."""
    start, nbytes = header.places[name]
    if rows is not None:
        size = nbytes // math.prod(header.shapes[name][:-1])
        start, nbytes = start + rows.start * size, len(rows) * size
    found = np.fromfile(header.path, np.uint8, nbytes, offset=start)
    if len(found) != nbytes:
        rule, fix = "the file must not change while it is read", "load it again"
        raise LoadError(f"model {header.path}", found=f"{name}, cut short", rule=rule, fix=fix)
    return found


def read_dense(header: Header, name: str, names: Names, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the model that one of the file is, by their paths, as transformers makes them.

    Tensors that several of the file are parts of are in `names.gathered`, once all were read.
    """
    shape, number = header.shapes[name], header.types[name]
    path = names.names.get(name)
    order = names.order(name, shape)
    if path is not None and isinstance(order, str) and order == "same":
        if number in BY_NUMBER:
            form, made = BY_NUMBER[number], torch.empty(shape, dtype=dtype)
            step = max(1, _CHUNK // shape[1])
            for start in range(0, shape[0], step):  # an embedding is large: its bytes are not held beside its values
                rows = range(start, min(start + step, shape[0]))
                blocks = torch.from_numpy(read_bytes(header, name, rows)).view(-1, form.nbytes)
                size = (len(rows), shape[1])
                one = BlockWeight.from_bytes(f"{header.path}: {name}", blocks, size, form, form.name)
                one.dequantize(made[rows.start : rows.stop])
            return {path: made}
        if number in _PLAIN:
            return {path: torch.from_numpy(read_bytes(header, name)).view(_PLAIN[number]).view(shape).to(dtype)}
    from gguf import GGMLQuantizationType, dequantize

    content = read_bytes(header, name)
    rows = content if number in (0, 1) else content.reshape(*shape[:-1], -1)
    found = names.process(dequantize(rows, GGMLQuantizationType(number)).reshape(shape), name)
    if found.name is None or found.name not in names.names:
        return {}
    return {names.names[found.name]: torch.from_numpy(np.ascontiguousarray(found.weights)).to(dtype)}
