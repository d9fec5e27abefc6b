"""Where an expert's tensors are in a live model, what their values are added to, and whether the model fits.

model                      names of its tensors
with a Dovetail chain      link/LAYER/PLACE/NAME and head/NAME, as in adapter.safetensors
a stock peft model         those of the active adapter, as in adapter_model.safetensors
any                        those of its state_dict, without the frozen bases of a chain

A model with an adapter (the first two) carries an expert and nothing else: what the expert lacks of the adapter gets
values without effect (`rest`).
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import check_saved, specs
from dovetail.chains.layer.fingerprint import base_fingerprint
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import AdapterFile, check_constants, parameters_of, same_chain
from dovetail.compression.apply import initial_values as chain_initial_values
from dovetail.errors import LoadError
from dovetail.experts import peft_adapters
from dovetail.experts.expert import check_same_base
from dovetail.experts.vectors import Origin
from dovetail.files import parse_json
from dovetail.links.adapt import VeRA
from dovetail.models.fingerprint import tensors_fingerprint
from dovetail.models.layouts import layout_of
from dovetail.models.targets import new_heads
from dovetail.models.ties import named_tensors

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
            if peft_adapter(model) is not None:
                wrong, rule = (
                    "no such tensor in the active adapter",
                    "the adapter must contain every tensor of the expert",
                )
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
    state = named_tensors(model)
    if peft_adapter(model) is not None:
        return _peft_tensors(model, state)
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


def _live(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    """Return the live tensors of those names that exist; None: of every name."""
    adapter, ids, known = peft_adapter(model), _ids(model), _KNOWN.get(model)
    if known is not None and known.ids == ids and known.adapter == adapter:
        asked = known.tensors if names is None else [name for name in names if name in known.tensors]
        found = {name: known.tensors[name]() for name in asked}
        if all(tensor is not None for tensor in found.values()):
            return {name: tensor for name, tensor in found.items() if tensor is not None}
    live = _tensors(model)
    _KNOWN[model] = _Known(ids, adapter, {name: weakref.ref(tensor) for name, tensor in live.items()})
    return live if names is None else {name: live[name] for name in names if name in live}


def rest(model: nn.Module, names: Collection[str], origin: Origin) -> dict[str, Tensor]:
    """Return the tensors of the model's adapter that are not among these names; {} for a model without an adapter.

    errors  LoadError for one whose value without effect is not known, and for weights of the base under a chain
    """
    if peft_adapter(model) is not None:
        every = _live(model, None)
        return {name: every[name] for name in peft_adapters.learned(every) if name not in names}
    if not chain_layers(model):
        return {}
    if origin.initial == "base":
        rule, fix = "an expert of the base's weights needs a model without adapters", "load the base model again"
        raise LoadError("expert", found="a model with a chain", rule=rule, fix=fix)
    every = _live(model, None)
    found = {name: t for name, t in every.items() if name.startswith(CHAIN_PREFIXES) and name not in names}
    for name in found:
        if name.startswith("head/"):
            rule = "the expert must hold every tensor that was trained beside the chain, whose first value is not known"
            raise LoadError(f"expert at {name}"[:300], found="no such tensor in the expert", rule=rule,
                            fix="apply its chain to the base model")  # fmt: skip
    return found


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
    frozen = {id(tensor) for tensor in base_tensors(model).values()}  # such as biases that peft trains in place
    own = {id(tensor) for tensor in state.values()} - frozen
    return {name: tensor for name, tensor in named.items() if id(tensor) in own}  # without copies made for the file


def initial_values(
    model: nn.Module, origin: Origin, tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return new tensors of initial values by name, with dtypes and devices of the live tensors.

    Names without an entry have initial values of zero. With `initial="base"` there are no entries, since values are
    added to the tensors of the model.

    tensors  of the expert
    others   those that it lacks (`rest`): their values have no effect
    errors   LoadError for names that do not belong to the origin
    """
    found: dict[str, Tensor] = {}
    if peft_adapter(model) is not None:
        wrapped: Any = model
        live = peft_adapters.plain(wrapped.peft_config[wrapped.active_adapter].to_dict())
        found = peft_adapters.neutral(live, {name: tuple(t.shape) for name, t in others.items()}, inner(model))
    elif others or origin.initial == "chain":
        file = adapter_file(origin)
        values = chain_initial_values(model, None if file is None else file.seed)
        names = tensors.keys() | others.keys() if origin.initial == "chain" else others.keys()
        found = {name: value for key, value in values.items() if (name := f"link/{key}") in names}
    if origin.initial == "chain":
        for name in tensors:
            if not name.startswith(CHAIN_PREFIXES):
                rule = "the tensors of a chain must be named link/… or head/…"
                raise LoadError(
                    f"expert at {name}"[:300], found="another name", rule=rule, fix="pack the adapter again"
                )
    elif origin.initial == "peft":
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        found |= peft_adapters.peft_initial(origin.peft or {}, shapes, inner(model))
        _check_vera(model, origin, shapes)
    every = {**tensors, **others}
    return {name: value.to(every[name].device, every[name].dtype) for name, value in found.items()}


def _check_vera(model: Any, origin: Origin, names: Iterable[str]) -> None:
    """Raise LoadError unless a live VeRA has the projections that peft draws for the expert's layers.

    peft draws them as wide as the widest layer, so other layers may have others from the same key.
    """
    if (origin.peft or {}).get("peft_type") != "VERA":
        return
    paths = [
        name.removeprefix(_PEFT).removesuffix(".vera_lambda_b") for name in names if name.endswith("vera_lambda_b")
    ]
    weights = [inner(model).get_submodule(path).get_base_layer() for path in paths]  # type: ignore[operator]
    layouts = [layout_of(path, layer) for path, layer in zip(paths, weights, strict=True)]
    a, b = (each[model.active_adapter] for each in (model.base_model.vera_A, model.base_model.vera_B))
    widest = max(each.out_features for each in layouts), max(each.in_features for each in layouts)
    if (b.shape[0], a.shape[1]) != widest:
        rule = f"VeRA's projections must be drawn for the expert's layers, up to {widest[0]} x {widest[1]}"
        raise LoadError("peft model", found=f"projections for {b.shape[0]} x {a.shape[1]}", rule=rule,
                        fix="call peft.get_peft_model with the expert's config")  # fmt: skip
    stored = dict(zip(VeRA.peft_constants.values(), (a.detach().cpu(), b.detach().cpu()), strict=True))
    peft_adapters.check_projections(origin.peft or {}, stored)


def adapter_file(origin: Origin) -> AdapterFile | None:
    """Return the adapter.json of an origin. LoadError if it is invalid."""
    if origin.adapter is None:
        return None
    rule, fix = "the adapter of the origin must be a valid adapter.json", "pack the adapter again"
    return parse_json("expert's origin", json.dumps(origin.adapter), AdapterFile, rule=rule, fix=fix)


def check_origin(model: nn.Module, origin: Origin, names: Collection[str]) -> str | None:
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
        _check_peft(model, adapter, origin, names)
        return origin.base
    return origin.base if origin.initial == "base" else None  # the fingerprint includes an adapter's own tensors


def _check_chain(model: nn.Module, origin: Origin) -> AdapterFile | None:
    record, file = applied(model), adapter_file(origin)
    if file is None and origin.chain in (None, str(record.chain)):
        return None
    if file is None or not same_chain(model, file):
        found = f"a model with {record.assignment}, stage {record.number + 1}"
        rule = f"{origin.chain}" if file is None else f"{file.chain_of_layers}, stage {file.stage + 1}"
        fix = "apply that chain to the base model"
        raise LoadError("expert", found=found, rule=f"the model must carry the expert's chain, {rule}", fix=fix)
    check_saved(model, file.ranks, file.extracted, "expert")
    if file.extracted and any(state.rank is not None for _, state in specs(model).values()):
        rule, fix = "the adapters must be extracted, as the expert's", "call set_ranks with its ranks, then extract"
        raise LoadError("expert", found="elastic adapters", rule=rule, fix=fix)
    check_constants(model, file.seed, "expert")
    return file


def _check_peft(model: Any, adapter: str, origin: Origin, names: Collection[str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) and module.merged for module in _modules(model)):
        rule, fix = "the adapter must be unmerged", "call model.unmerge_adapter()"
        raise LoadError("peft model", found="a merged adapter", rule=rule, fix=fix)
    said = origin.peft
    if origin.initial == "peft":
        peft_adapters.check_config(said or {})
    live = peft_adapters.plain(model.peft_config[adapter].to_dict())
    shown = {"modules_to_save"} | (set() if peft_adapters.has_tokens(names) else {"trainable_token_indices"})
    if said and (wrong := peft_adapters.difference(live, said, shown)) is not None:
        key, here, there = wrong
        raise LoadError("expert", found=f"a peft adapter with {key}={here!r}"[:300],
                        rule=f"the expert needs {key}={there!r}"[:300],
                        fix="call peft.get_peft_model with the expert's config")  # fmt: skip
    if origin.initial == "peft" and (inside := peft_adapters.in_place(said or {}, names)):
        rule = "an expert in a peft model may change the adapter alone, and peft loads this tensor into the base"
        raise LoadError(f"expert at {inside[0]}"[:300], found="a tensor of the base", rule=rule,
                        fix="unpack the expert, and load it with peft on a new base")  # fmt: skip
    if live.get("bias", "none") != "none" and (origin.base or "unknown") == "unknown":
        rule = "the biases of the base must be known, because peft trains them in place"
        fix = "pack the expert with its base (--base MODEL)"
        raise LoadError("expert", found="an unknown base", rule=rule, fix=fix)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `live_fingerprint`: a chain's bases, the model under a peft adapter, or the model."""
    if layers := chain_layers(model):
        parts = {name: layer.base.state_dict(keep_vars=True) for name, layer in layers.items()}
        return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}
    return named_tensors(model) if peft_adapter(model) is None else peft_adapters.base_tensors(inner(model))


def live_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of the base that an expert must be made for. Read all its bytes."""
    if layers := chain_layers(model):
        return base_fingerprint(layers)
    tensors = base_tensors(model)
    if any(tensor.is_meta for tensor in tensors.values()):
        return "unknown"
    return tensors_fingerprint(tensors, leave_out=new_heads(inner(model)))


def inner(model: nn.Module) -> nn.Module:
    """Return the model inside a model of peft's; another model itself."""
    wrapped: Any = model
    return model if peft_adapter(model) is None else wrapped.get_base_model()


def check_fingerprint(found: str, expected: str) -> None:
    """Raise LoadError unless the fingerprints are equal, or one is unknown."""
    if "unknown" not in (found, expected):
        check_same_base(found, expected)
