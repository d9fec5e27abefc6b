"""Where an expert's tensors are in a live model.

model                      names of its tensors
under a Dovetail chain     link/LAYER/PLACE/NAME and head/NAME, as in adapter.safetensors
a stock peft model         those of the active adapter as in adapter_model.safetensors
any                        those of its state_dict; without the frozen bases of a chain
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import parameters_of
from dovetail.errors import LoadError
from dovetail.experts.vectors import Origin

CHAIN_PREFIXES, _PEFT = ("link/", "head/"), "base_model.model."


def slots(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: Origin | None = None) -> dict[str, Tensor]:
    """The live tensors that an expert's names mean, by name; what is written to them is in the model.

    shapes   name -> shape, such as `Expert.shapes`
    origin   what the expert is of; what it says of the base isn't looked at here (`check_origin`)
    errors   LoadError, naming the first name that the model lacks, has in another shape or not as a float tensor, and
             for two names of one tensor (tied weights)
    """
    found, live, seen = {}, _live(model, shapes), {}
    for name in sorted(shapes):
        where, tensor = f"expert at {name}"[:300], live.get(name)
        if tensor is None:
            raise LoadError(
                where, found="no such tensor in the model", rule="it has all of them", fix=_home(name, origin)
            )
        if tuple(tensor.shape) != tuple(shapes[name]):
            found_, rule = f"shape {list(shapes[name])}", f"the model's is {list(tensor.shape)}"
            raise LoadError(where, found=found_, rule=rule, fix=_home(name, origin))
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.is_meta:
            found_ = "device meta" if tensor.is_meta else str(tensor.dtype)
            raise LoadError(where, found=found_, rule="values go to stored tensors of 16, 32 or 64 bit floats")
        if tensor.numel() and (twin := seen.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
            fix = "leave one of them out of the task vector"
            raise LoadError(where, found=f"the tensor that {twin} is", rule="each tensor has one name", fix=fix)
        found[name] = tensor
    return found


def check_scales(scales: Mapping[str, float], live: Mapping[str, Tensor]) -> None:
    """LoadError for a scale that its tensor's dtype can't hold."""
    for scale, dtype in {(scale, live[name].dtype) for name, scale in scales.items()}:
        if not bool(torch.isfinite(torch.tensor(scale, dtype=torch.float64).to(dtype))):
            raise LoadError("expert", found=f"scale {scale:g}", rule=f"at most {torch.finfo(dtype).max:g} in {dtype}")


def _home(name: str, origin: Origin | None) -> str:
    if name.startswith(CHAIN_PREFIXES):
        return f"dovetail.apply(model, {(origin and origin.chain) or 'its chain'!r})"
    return (
        "peft.get_peft_model, with the adapter's config" if name.startswith(_PEFT) else "load the model that it is for"
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every name that an expert may use, and its live tensor."""
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    if peft_adapter(model) is not None:
        return state | _peft_tensors(model, state)
    layers = chain_layers(model)
    if layers:  # the chain's fingerprint and its cached norms are of the bases as they are
        bases = tuple(f"{name}.base." for name in layers)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(bases)} | parameters_of(model)
    return state


@dataclass(frozen=True)
class _Known:
    """What a model's names meant, so that small experts needn't wait for a walk through a large model's names.

    ids      of its modules, parameters and buffers; adapter: name of its peft adapter. While both are the same, so is
             what names mean
    tensors  held weakly: a model may let go of its weights
    """

    ids: list[int]
    adapter: str | None
    tensors: dict[str, weakref.ref[Tensor]]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _live(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The live tensors of these names, of those that there are."""
    adapter, ids, known = peft_adapter(model), _ids(model), _KNOWN.get(model)
    if known is not None and known.ids == ids and known.adapter == adapter:
        found = {name: known.tensors[name]() for name in names if name in known.tensors}
        if all(tensor is not None for tensor in found.values()):
            return {name: tensor for name, tensor in found.items() if tensor is not None}
    live = _tensors(model)
    _KNOWN[model] = _Known(ids, adapter, {name: weakref.ref(tensor) for name, tensor in live.items()})
    return {name: live[name] for name in names if name in live}


def _ids(model: nn.Module) -> list[int]:
    found, left = [], [model]
    while left:
        module = left.pop()
        found.append(id(module))
        found += map(id, module._parameters.values())
        found += map(id, module._buffers.values())
        left += [child for child in module._modules.values() if child is not None]
    return found


def peft_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter of a stock peft model; None for any other model. Doesn't import peft."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    active = model.active_adapter
    if not isinstance(active, str):
        fix = "model.set_adapter(name)"
        raise LoadError("peft model", found=f"active adapters {active}"[:300], rule="an expert goes into one", fix=fix)
    return active


def _peft_tensors(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    named = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    own = {id(tensor) for tensor in state.values()}
    return {name: tensor for name, tensor in named.items() if id(tensor) in own}  # not what was made for the file
