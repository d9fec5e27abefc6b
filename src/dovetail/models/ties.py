"""Tied weights: several names of one tensor, such as an output head and the input embedding.

A write to one of the names changes the others, so what belongs to a single name needs a tensor of its own first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from dovetail.models.targets import inside


def memory(tensor: Tensor) -> tuple[object, int, int]:
    """Return device, first and last byte of the memory that a tensor lies in; a meta or empty tensor has its own."""
    if tensor.is_meta or not tensor.numel():
        return ("none", id(tensor), id(tensor))
    span = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return (tensor.device, tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size() - 1)


def share_memory(one: Tensor, two: Tensor) -> bool:
    """Return whether a write to one tensor may change the other."""
    (device, first, last), (other, start, end) = memory(one), memory(two)
    return device == other and first <= end and start <= last


def twins(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> another name whose tensor shares memory with it; names that share none are left out."""
    spans = sorted((str(device), first, last, name) for name, t in tensors.items()
                   for device, first, last in [memory(t)])  # fmt: skip
    found: dict[str, str] = {}
    device, end, holder = "", -1, ""  # of the tensor that reaches farthest so far
    for where, first, last, name in spans:
        if where == device and first <= end:
            found[name] = holder
            found.setdefault(holder, name)
        if where != device or last > end:
            device, end, holder = where, last, name
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors of a model's state_dict, with every name of each."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def shared_outside(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """Return name of a tensor in one of these modules -> a name outside that module that shares memory with it."""
    tensors, found = named_tensors(model), {}
    for path in paths:
        own = {name: tensor for name, tensor in tensors.items() if inside(name, [path])}
        for name, tensor in own.items():
            for other, there in tensors.items():
                if other not in own and share_memory(tensor, there):
                    found[name] = other
                    break
    return found


def cannot_untie(model: nn.Module, paths: Iterable[str]) -> str:
    """Return why these modules cannot get tensors of their own; "" if they can.

    A transformers model names all its ties by one field of its configuration, so that it can be saved and loaded only
    with all of them or with none. Encoder-decoders also read this field in their forward pass.
    """
    from transformers import PreTrainedModel

    paths = list(paths)
    shared = shared_outside(model, paths)
    if not shared or not isinstance(model, PreTrainedModel):
        return ""
    name, other = next(iter(shared.items()))
    if model.config.is_encoder_decoder:
        return f"{name} is tied to {other}, and an encoder-decoder reads tie_word_embeddings in its forward pass"
    left = {name: other for name, other in twins(named_tensors(model)).items()
            if not inside(name, paths) and not inside(other, paths)}  # fmt: skip
    for name, other in left.items():
        return f"{name} is tied to {other} too, and a model is saved with all its ties or with none"
    return ""


def untie(model: nn.Module, path: str) -> None:
    """Give a module of the model tensors of its own, under this path alone, in place."""
    from transformers import PreTrainedModel

    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, copy.deepcopy(model.get_submodule(path)))
    if isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = {}
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
