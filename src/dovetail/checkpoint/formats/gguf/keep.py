"""A GGUF file as a model whose layers keep the file's own grid (`dovetail.load(..., grid="keep")`).

A linear layer whose tensor is in blocks (`dovetail.links.quantize.ggml`) becomes a packed layer: the file's codes and
scales, byte for byte, without a copy in floats. Everything else is read as transformers reads it: other formats, the
embedding, heads, norms and biases are dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.attach import replace_modules
from dovetail.chains.layer.base import Base, Scratch
from dovetail.chains.layer.held import guard_saving
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Site, identity_of
from dovetail.checkpoint.formats.gguf.header import Header
from dovetail.checkpoint.formats.gguf.names import (
    BY_NUMBER,
    LayerTensor,
    Names,
    linear_tensors,
    read_bytes,
    read_dense,
)
from dovetail.errors import LoadError
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockWeight
from dovetail.links.quantize.keep import Keep
from dovetail.models.layouts import layout_of
from dovetail.models.targets import all_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def kept_tensors(header: Header, model: PreTrainedModel) -> dict[str, LayerTensor]:
    """Return path of a layer -> its tensor, of all linear layers outside the heads whose tensors are in blocks.

    model  without storage (device "meta")
    """
    return _in_blocks(header, linear_tensors(header, model, Names(header, model)))


def _in_blocks(header: Header, tensors: Mapping[str, LayerTensor]) -> dict[str, LayerTensor]:
    return {layer: each for layer, each in tensors.items() if header.types[each.name] in BY_NUMBER}


def keep_note(header: Header, kept: Mapping[str, LayerTensor], model: PreTrainedModel) -> dict[str, Any]:
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
    identities = {name: identity_of(Keep(BY_NUMBER[header.types[each.name]].name)) for name, each in kept.items()}
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
    names = Names(header, model)
    kept = _in_blocks(header, linear_tensors(header, model, names))
    model.config.dovetail = keep_note(header, kept, model)
    by_tensor = {each.name: layer for layer, each in kept.items()}
    grids: dict[str, BlockWeight] = {}
    for name in header.shapes:
        if (layer := by_tensor.get(name)) is not None:
            grids[layer] = read_grid(header, kept[layer])
        else:
            for path, tensor in read_dense(header, name, names, dtype).items():
                _put(header, model, path, tensor)
    for path, tensor in names.gathered.items():
        _put(header, model, path, tensor.to(dtype))
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


def read_grid(header: Header, tensor: LayerTensor) -> BlockWeight:
    """Return the codes and scales of a layer, in the order of the layer's rows. Raises LoadError."""
    (o, i), form = header.shapes[tensor.name], BY_NUMBER[header.types[tensor.name]]
    blocks = torch.from_numpy(read_bytes(header, tensor.name)).view(o, -1)
    if tensor.rows is not None:
        blocks = blocks[tensor.rows]
    where = f"{header.path}: {tensor.name}"
    return BlockWeight.from_bytes(where, blocks.view(-1, form.nbytes), (o, i), form, identity_of(Keep(form.name)))


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
