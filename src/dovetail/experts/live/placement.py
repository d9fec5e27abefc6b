"""Where an expert's tensors are in a live model, what their values are added to, and whether the model fits.

model                      names of its tensors
with a Dovetail chain      link/LAYER/PLACE/NAME and head/NAME, as in adapter.safetensors
a stock peft model         those of the active adapter, as in adapter_model.safetensors
any                        those of its state_dict, without the frozen bases of a chain
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import check_saved, specs
from dovetail.chains.layer.fingerprint import base_fingerprint
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import AdapterFile, check_constants, parameters_of
from dovetail.compression.apply import initial_values as chain_initial_values
from dovetail.errors import LoadError
from dovetail.experts.expert import check_same_base
from dovetail.experts.sources import peft_initial
from dovetail.experts.vectors import Origin
from dovetail.files import parse_json
from dovetail.models.fingerprint import tensors_fingerprint
from dovetail.models.targets import new_heads

CHAIN_PREFIXES, _PEFT = ("link/", "head/"), "base_model.model."


def slots(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: Origin | None = None) -> dict[str, Tensor]:
    """Return the live tensors of an expert's names. A write to them changes the model.

    shapes   name -> shape, such as `Expert.shapes`
    origin   of the expert, for messages; its base is not checked here (`check_origin`)
    errors   LoadError for the first name that the model lacks or has with another shape or dtype, and for two names of
             one tensor (tied weights)
    """
    found, live, seen = {}, _live(model, shapes), {}
    for name in sorted(shapes):
        where, tensor = f"expert at {name}"[:300], live.get(name)
        if tensor is None:
            wrong, rule = "no such tensor in the model", "the model must contain every tensor of the expert"
            raise LoadError(where, found=wrong, rule=rule, fix=_home(name, origin))
        if tuple(tensor.shape) != tuple(shapes[name]):
            wrong, rule = f"shape {list(shapes[name])}", f"the shape must be the model's, {list(tensor.shape)}"
            raise LoadError(where, found=wrong, rule=rule, fix=_home(name, origin))
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.is_meta:
            wrong = "device meta" if tensor.is_meta else str(tensor.dtype)
            rule = "a tensor must be stored and have a float dtype of at least 16 bits"
            raise LoadError(where, found=wrong, rule=rule, fix="load the model's weights in float32 or bfloat16")
        if tensor.numel() and (twin := seen.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
            fix = "remove one of them from the task vector"
            raise LoadError(where, found=f"the tensor of {twin}", rule="each tensor must have one name", fix=fix)
        found[name] = tensor
    return found


def check_scales(scales: Mapping[str, float], live: Mapping[str, Tensor]) -> None:
    """Raise LoadError for a scale that the dtype of its tensor cannot hold."""
    for scale, dtype in {(scale, live[name].dtype) for name, scale in scales.items()}:
        if not bool(torch.isfinite(torch.tensor(scale, dtype=torch.float64).to(dtype))):
            rule = f"a scale may be at most {torch.finfo(dtype).max:g} in {dtype}"
            raise LoadError("expert", found=f"scale {scale:g}", rule=rule, fix="load the model in bfloat16 or float32")


def _home(name: str, origin: Origin | None) -> str:
    if name.startswith(CHAIN_PREFIXES):
        return f"call dovetail.apply(model, {(origin and origin.chain) or 'its chain'!r})"
    if name.startswith(_PEFT):
        return "call peft.get_peft_model with the adapter's config"
    return "load the model of the expert"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every name that an expert may use, with its live tensor."""
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    if peft_adapter(model) is not None:
        return state | _peft_tensors(model, state)
    layers = chain_layers(model)
    if layers:  # the chain's fingerprint and cached norms belong to the unchanged bases
        bases = tuple(f"{name}.base." for name in layers)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(bases)} | parameters_of(model)
    return state


@dataclass(frozen=True)
class _Known:
    """The tensors of a model's names, so that a small expert in a large model needs no search for names.

    ids      of modules, parameters and buffers
    adapter  name of the peft adapter; the names are valid while `ids` and `adapter` stay the same
    tensors  weak references, so that a model can release its weights
    """

    ids: list[int]
    adapter: str | None
    tensors: dict[str, weakref.ref[Tensor]]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _live(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the live tensors of those names that exist."""
    adapter, ids, known = peft_adapter(model), _ids(model), _KNOWN.get(model)
    if known is not None and known.ids == ids and known.adapter == adapter:
        found = {name: known.tensors[name]() for name in names if name in known.tensors}
        if all(tensor is not None for tensor in found.values()):
            return {name: tensor for name, tensor in found.items() if tensor is not None}
    live = _tensors(model)
    _KNOWN[model] = _Known(ids, adapter, {name: weakref.ref(tensor) for name, tensor in live.items()})
    return {name: live[name] for name in names if name in live}


def _ids(model: nn.Module) -> list[int]:
    found = []
    for module in _modules(model):
        found.append(id(module))
        found += map(id, module._parameters.values())
        found += map(id, module._buffers.values())
    return found


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules without their names, at a fraction of the time of `nn.Module.modules`."""
    left = [model]
    while left:
        module = left.pop()
        yield module
        left += [child for child in module._modules.values() if child is not None]


def peft_adapter(model: nn.Module) -> str | None:
    """Return the name of a stock peft model's active adapter; None for any other model. Do not import peft."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    active = model.active_adapter
    if not isinstance(active, str):
        rule, fix = "one adapter must be active", "call model.set_adapter(name)"
        raise LoadError("peft model", found=f"active adapters {active}"[:300], rule=rule, fix=fix)
    return active


def _peft_tensors(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    named = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    own = {id(tensor) for tensor in state.values()}
    return {name: tensor for name, tensor in named.items() if id(tensor) in own}  # without copies made for the file


_MEANING = ("peft_type", "lora_alpha", "alpha", "use_rslora", "use_dora", "alpha_pattern", "projection_prng_key")
"""Keys of a peft config that determine the effect of an adapter's tensors."""


def initial_values(model: nn.Module, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new tensors of initial values by name, with dtypes and devices of the live tensors.

    Names without an entry have initial values of zero. With `initial="base"` there are no entries, since values are
    added to the tensors of the model.

    errors  LoadError for names that do not belong to the origin
    """
    if origin.initial == "chain":
        for name in tensors:
            if not name.startswith(CHAIN_PREFIXES):
                rule = "the tensors of a chain must be named link/… or head/…"
                raise LoadError(
                    f"expert at {name}"[:300], found="another name", rule=rule, fix="pack the adapter again"
                )
        file = adapter_file(origin)
        values = chain_initial_values(model, None if file is None else file.seed)
        found = {f"link/{key}": value for key, value in values.items()}
    elif origin.initial == "peft":
        base: Any = model
        if peft_adapter(model) is not None:
            base = base.get_base_model()
        found = peft_initial(origin.peft or {}, {name: tuple(t.shape) for name, t in tensors.items()}, base)
    else:
        found = {}
    return {
        name: value.to(tensors[name].device, tensors[name].dtype) for name, value in found.items() if name in tensors
    }


def adapter_file(origin: Origin) -> AdapterFile | None:
    """Return the adapter.json of an origin. LoadError if it is invalid."""
    if origin.adapter is None:
        return None
    rule, fix = "the adapter of the origin must be a valid adapter.json", "pack the adapter again"
    return parse_json("expert's origin", json.dumps(origin.adapter), AdapterFile, rule=rule, fix=fix)


def check_origin(model: nn.Module, origin: Origin, names: Iterable[str]) -> str | None:
    """Raise LoadError unless the model has the chain or the peft config of the origin.

    returns  the fingerprint that `live_fingerprint` must return; None: unknown
    """
    if chain_layers(model):
        record = applied(model)
        if origin.base is not None and "unknown" not in (origin.base, record.base_fingerprint):
            check_same_base(record.base_fingerprint, origin.base)
        if any(name.startswith(CHAIN_PREFIXES) for name in names):
            file = _check_chain(model, origin)
            return None if file is None else file.chain_fingerprint
        return None
    if (adapter := peft_adapter(model)) is not None:
        _check_peft(model, adapter, origin.peft or {})
        return origin.base
    return origin.base if origin.initial == "base" else None  # the fingerprint includes an adapter's own tensors


def _check_chain(model: nn.Module, origin: Origin) -> AdapterFile | None:
    record, file = applied(model), adapter_file(origin)
    chain = origin.chain if file is None else file.chain
    stage = record.number if file is None else file.stage
    if chain is not None and (chain, stage) != (str(record.chain), record.number):
        found, rule = f"a model with {record.chain}, stage {record.number + 1}", f"{chain}, stage {stage + 1}"
        fix = "apply that chain to the base model"
        raise LoadError("expert", found=found, rule=f"the model must carry the expert's chain, {rule}", fix=fix)
    if file is None:
        return None
    check_saved(model, file.ranks, file.extracted, "expert")
    if file.extracted and any(state.rank is not None for _, state in specs(model).values()):
        rule, fix = "the adapters must be extracted, as the expert's", "call set_ranks with its ranks, then extract"
        raise LoadError("expert", found="elastic adapters", rule=rule, fix=fix)
    check_constants(model, file.seed, "expert")
    return file


def _check_peft(model: Any, adapter: str, said: Mapping[str, Any]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) and module.merged for module in _modules(model)):
        rule, fix = "the adapter must be unmerged", "call model.unmerge_adapter()"
        raise LoadError("peft model", found="a merged adapter", rule=rule, fix=fix)
    live = model.peft_config[adapter].to_dict()
    for key in _MEANING:
        if key in live and key in said:
            here, there = live[key], said[key]
            if (here or None) != (there or None) and not (
                isinstance(here, list) and sorted(here) == sorted(there or [])
            ):
                fix = "call peft.get_peft_model with the expert's config"
                raise LoadError("expert", found=f"a peft adapter with {key}={here}"[:300],
                                rule=f"the expert needs {key}={there}"[:300], fix=fix)  # fmt: skip


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `live_fingerprint`: a chain's bases, the model under a peft adapter, or the model."""
    if layers := chain_layers(model):
        parts = {name: layer.base.state_dict(keep_vars=True) for name, layer in layers.items()}
        return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}
    if peft_adapter(model) is None:
        return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    return _under_peft(model)


def live_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the base that an expert must be made for. Read all its bytes."""
    if layers := chain_layers(model):
        return base_fingerprint(layers)
    wrapped: Any = model
    inner: nn.Module = model if peft_adapter(model) is None else wrapped.get_base_model()
    tensors = base_tensors(model)
    if any(tensor.is_meta for tensor in tensors.values()):
        return "unknown"
    return tensors_fingerprint(tensors, leave_out=new_heads(inner))


def _under_peft(model: Any) -> dict[str, Tensor]:
    """Return the original state of the model that peft wraps: without adapters and copies, with the old names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = model.get_base_model()
    inside = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside[f"{path}."] = "base_layer."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside[f"{path}."] = "original_module."
    found = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        for path in (name[: at + 1] for at, letter in enumerate(name) if letter == "."):
            if path in inside:
                kept = name.startswith(path + inside[path])
                name = path + name.removeprefix(path + inside[path]) if kept else ""
                break
        if name and isinstance(tensor, Tensor):
            found[name] = tensor
    return found


def check_fingerprint(found: str, expected: str) -> None:
    """Raise LoadError unless the fingerprints are equal, or one is unknown."""
    if "unknown" not in (found, expected):
        check_same_base(found, expected)
