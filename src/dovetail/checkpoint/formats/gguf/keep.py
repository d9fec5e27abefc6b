"""A GGUF file as a model whose layers keep the file's own grid (`dovetail.load(..., grid="keep")`).

A linear layer whose tensor is in blocks (`dovetail.links.quantize.ggml`) becomes a packed layer: the file's codes and
scales, byte for byte, without a copy in floats. Everything else is read as transformers reads it: other formats, the
embedding, heads, norms and biases are dense.

Names are those of transformers' own map. Its rearrangements of a tensor (`TENSOR_PROCESSORS`: the rows of query and key
in Llama, a transposed matrix in GPT-2) are applied to numbers of rows first. Where the result is a permutation of the
rows, the rows of blocks are permuted in the same way. A tensor that is changed otherwise is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dovetail.chains.layer.attach import replace_modules
from dovetail.chains.layer.base import Base, Scratch
from dovetail.chains.layer.held import guard_saving
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Site, identity_of
from dovetail.checkpoint.formats.gguf.header import Header
from dovetail.errors import LoadError
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockFormat, BlockWeight
from dovetail.links.quantize.keep import Keep
from dovetail.models.layouts import layout_of
from dovetail.models.targets import all_layers, heads, inside, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_BY_NUMBER = {form.number: form for form in BLOCK_FORMATS.values()}
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""ggml type -> dtype of a tensor without blocks."""


@dataclass(frozen=True)
class KeptTensor:
    """Where the grid of a layer lies in a file.

    name  of the tensor
    form  of its blocks
    rows  row of the layer -> row of the tensor, int64; None where they are the same
    """

    name: str
    form: BlockFormat
    rows: Tensor | None

    def shape(self, header: Header) -> tuple[int, int]:
        """Return (out, in) of its weight."""
        o, i = header.shapes[self.name]
        return o, i


class _Names:
    """transformers' names and rearrangements for the tensors of a file."""

    def __init__(self, header: Header, model: PreTrainedModel) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
        self.processor: Any = processor(config=model.config.to_dict())
        self.names = self._map(header, model)

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
        paths = [("", path) for path in model.state_dict()]
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

    def order(self, name: str, shape: tuple[int, ...]) -> Tensor | Literal["same", "transposed", "other"]:
        """Return how a matrix is rearranged; where its rows are permuted, row of the layer -> row of the tensor."""
        if len(shape) != 2:
            return "other"
        number = np.arange(shape[0], dtype=np.int32)
        given = np.broadcast_to(number[:, None], shape)
        parsed: dict[str, Any] = {"tensors": {}}
        found = self.processor.process(
            weights=given, name=name, tensor_key_mapping=self.names, parsed_parameters=parsed
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


def kept_tensors(header: Header, model: PreTrainedModel) -> dict[str, KeptTensor]:
    """Return path of a layer -> its tensor, of all linear layers outside the heads whose tensors are in blocks.

    model  without storage (device "meta")
    """
    return _kept(header, model, _Names(header, model))


def _kept(header: Header, model: PreTrainedModel, names: _Names) -> dict[str, KeptTensor]:
    head_paths = heads(model)
    layers = {
        layer.name
        for layer in all_layers(model)
        if is_linear(layer.module) and layer.experts is None and not inside(layer.name, head_paths)
    }
    found = {}
    for name, number in header.types.items():
        layer, _, leaf = names.names.get(name, "").rpartition(".")
        if number in _BY_NUMBER and leaf == "weight" and layer in layers:
            order = names.order(name, header.shapes[name])
            if not (
                isinstance(order, str) and order == "other"
            ):  # a chain sees a transposed matrix as the file stores it
                rows = order if isinstance(order, Tensor) else None
                found[layer] = KeptTensor(name, _BY_NUMBER[number], rows)
    return found


def keep_note(header: Header, kept: Mapping[str, KeptTensor], model: PreTrainedModel) -> dict[str, Any]:
    """Return what config.json's "dovetail" says of a model on the grids of a file (`dovetail.chains.layer.held`).

    Raises LoadError for a file in which no layer is in blocks.
    """
    if not kept:
        kinds = sorted({str(_name_of(number)) for number in header.types.values()})
        raise LoadError(
            f"model {header.path}",
            found=f"tensors of {', '.join(kinds)}, and no linear layer in blocks",
            rule=f"grid=keep keeps the grid of linear layers in {', '.join(BLOCK_FORMATS)}",
            fix="leave grid out: the model is dense",
        )
    identities = {name: identity_of(Keep(each.form.name)) for name, each in kept.items()}
    dense = [layer.name for layer in all_layers(model) if layer.name not in kept]
    return {
        "chain": "keep",
        "quantizer": "keep",
        "base_fingerprint": "unknown",
        "source": str(header.path),
        "layers": {name: {"quantizer": identity} for name, identity in identities.items()}
        | {name: {"quantizer": None} for name in dense},
    }


def _name_of(number: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(number).name


@torch.no_grad()
def load_kept(header: Header, config: PreTrainedConfig, auto: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Load a GGUF file as a packed model on its own grids, on the CPU, in eval mode, for `dovetail.load`.

    config  of the file; the returned model's config says what the layers keep
    auto    the auto class that makes the model
    dtype   of the dense tensors, and to which codes are dequantized when a layer runs
    errors  LoadError for scales that are not finite, tensors of another shape, and weights that the file does not hold
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    names = _Names(header, model)
    kept = _kept(header, model, names)
    model.config.dovetail = keep_note(header, kept, model)
    by_tensor = {each.name: layer for layer, each in kept.items()}
    grids: dict[str, BlockWeight] = {}
    for name in header.shapes:
        if (layer := by_tensor.get(name)) is not None:
            grids[layer] = read_grid(header, kept[layer])
        elif name in names.names or len(header.shapes[name]) > 2:
            for path, tensor in _dense(header, name, names, dtype).items():
                _put(header, model, path, tensor)
    model.tie_weights()
    scratch, layers = Scratch(), []
    for path, quantized in grids.items():
        module = model.get_submodule(path)
        layout = layout_of(path, module)
        if quantized.shape != (layout.out_features, layout.in_features):
            raise _other_shape(header, path, quantized.shape, (layout.out_features, layout.in_features))
        base = Base(layout, torch.empty(0, dtype=dtype), scratch)
        base.set_quantized(quantized)
        bias = getattr(module, "bias", None)
        site = Site(path, layout.out_features, layout.in_features, bias is not None)
        layers.append((module, ChainLinear(site, base, None if bias is None else bias.detach())))
    replace_modules(model, layers)
    if missing := sorted(name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta):
        raise LoadError(
            f"model {header.path}",
            found=f"{len(missing)} weights of {type(model).__name__} not stored, first {missing[0]}",
            rule="the file must contain every weight",
            fix="load a complete file of this architecture; a new head is made for a model without grid",
        )
    guard_saving(model)
    return model.requires_grad_(False).eval()


def read_bytes(header: Header, name: str) -> np.ndarray:
    """Return the bytes of a tensor, uint8, a copy of its own."""
    start, nbytes = header.places[name]
    found = np.fromfile(header.path, np.uint8, nbytes, offset=start)
    if len(found) != nbytes:
        rule, fix = "the file must not change while it is read", "load it again"
        raise LoadError(f"model {header.path}", found=f"{name}, cut short", rule=rule, fix=fix)
    return found


def read_grid(header: Header, tensor: KeptTensor) -> BlockWeight:
    """Return the codes and scales of a layer, in the order of the layer's rows. Raises LoadError."""
    (o, i), form = tensor.shape(header), tensor.form
    blocks = torch.from_numpy(read_bytes(header, tensor.name)).view(o, -1)
    if tensor.rows is not None:
        blocks = blocks[tensor.rows]
    where = f"{header.path}: {tensor.name}"
    return BlockWeight.from_bytes(where, blocks.view(-1, form.nbytes), (o, i), form, identity_of(Keep(form.name)))


def _dense(header: Header, name: str, names: _Names, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of the model that one of the file becomes, by their paths."""
    shape, number = header.shapes[name], header.types[name]
    path = names.names.get(name)
    order = names.order(name, shape)
    if path is not None and isinstance(order, str) and order == "same":
        content = read_bytes(header, name)
        if number in _BY_NUMBER:
            form = _BY_NUMBER[number]
            blocks = torch.from_numpy(content).view(-1, form.nbytes)
            one = BlockWeight.from_bytes(f"{header.path}: {name}", blocks, (shape[0], shape[1]), form, form.name)
            return {path: one.dequantize(torch.empty(shape, dtype=dtype))}
        if number in _PLAIN:
            return {path: torch.from_numpy(content).view(_PLAIN[number]).view(shape).to(dtype)}
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(number)
    content = read_bytes(header, name)
    rows = content.reshape(*shape[:-1], -1) if number not in (0, 1) else content
    weights = dequantize(rows, kind).reshape(shape)
    parsed: dict[str, Any] = {"tensors": {}}
    found = names.processor.process(
        weights=weights, name=name, tensor_key_mapping=names.names, parsed_parameters=parsed
    )
    if found.name is not None and found.name in names.names:
        parsed["tensors"][names.names[found.name]] = torch.from_numpy(np.ascontiguousarray(found.weights))
    return {path: tensor.to(dtype) for path, tensor in parsed["tensors"].items()}


def _put(header: Header, model: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor in its place of the model. Raises LoadError for another shape."""
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        wanted = module._parameters[leaf]
        assert wanted is not None
        if wanted.shape != tensor.shape:
            raise _other_shape(header, path, tuple(tensor.shape), tuple(wanted.shape))
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor


def _other_shape(header: Header, path: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> LoadError:
    found = f"{path} stored as {list(stored)}, the model has {list(wanted)}"
    rule = "the tensors must have the shapes that the file's own metadata asks for"
    return LoadError(f"model {header.path}", found=found, rule=rule, fix="download or convert the file again")
