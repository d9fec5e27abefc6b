"""Where an expert's tensors are in a live model, what their values are added to, and whether the model is its base.

model                      names of its tensors
under a Dovetail chain     link/LAYER/PLACE/NAME and head/NAME, as in adapter.safetensors
a stock peft model         those of the active adapter as in adapter_model.safetensors
any                        those of its state_dict; without the frozen bases of a chain
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from dovetail.adapt.elastic import check_saved, specs
from dovetail.adapter import parameters_of
from dovetail.adapter_file import AdapterFile
from dovetail.apply import initial_values
from dovetail.chain.linear import chain_layers
from dovetail.chain.link import Adapter
from dovetail.errors import LoadError
from dovetail.experts.peft_initial import peft_initial
from dovetail.experts.task_vector import Origin
from dovetail.fingerprint import base_fingerprint, tensors_fingerprint
from dovetail.record import applied
from dovetail.targets import new_heads

_MEANING = ("peft_type", "lora_alpha", "alpha", "use_rslora", "use_dora", "alpha_pattern", "projection_prng_key")
"""What of a peft config decides what an adapter's tensors do."""
_CHAIN, _PEFT = ("link/", "head/"), "base_model.model."


def slots(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: Origin | None = None) -> dict[str, Tensor]:
    """The live tensors that an expert's names mean, by name; what is written to them is in the model.

    shapes   name -> shape, such as `Expert.shapes`
    origin   what the expert is of; what it says of the base isn't looked at here (`check_origin`)
    errors   LoadError, naming the first name that the model lacks, has in another shape or not as a float tensor, and
             for two names of one tensor (tied weights)
    """
    found, live, seen = {}, _tensors(model), {}
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


def _home(name: str, origin: Origin | None) -> str:
    if name.startswith(_CHAIN):
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        fix = "model.unmerge_adapter()"
        raise LoadError("peft model", found="a merged adapter", rule="only an unmerged one can be swapped", fix=fix)
    named = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    own = {id(tensor) for tensor in state.values()}
    return {name: tensor for name, tensor in named.items() if id(tensor) in own}  # not what was made for the file


def starts(model: nn.Module, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an expert's values are added to, by name, in the dtypes and on the devices of the live tensors; where a name
    isn't there, the values stand for themselves. New tensors; none with `initial="base"`, which adds to what the model
    holds.

    errors  LoadError for names that the origin can't speak of
    """
    if origin.initial == "chain":
        for name in tensors:
            if not name.startswith(_CHAIN):
                rule = "a chain's initial values are those of link/… and head/… tensors"
                raise LoadError(f"expert at {name}"[:300], found="another name", rule=rule)
        file = adapter_file(origin)
        values = initial_values(model, None if file is None else file.seed)
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
    """The adapter.json in an origin, checked; LoadError where it isn't one."""
    if origin.adapter is None:
        return None
    try:
        return AdapterFile.model_validate_json(json.dumps(origin.adapter))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        rule = "its adapter is an adapter.json"
        raise LoadError("expert's origin", found=f"{place}: {first['msg']}"[:300], rule=rule) from None


def check_origin(model: nn.Module, origin: Origin, names: Iterable[str]) -> str | None:
    """LoadError unless the model is of the chain, or has the peft config, that the origin speaks of.

    returns  the fingerprint that `live_fingerprint` must give; None: nothing tells
    """
    if chain_layers(model):
        record = applied(model)
        if origin.base is not None and "unknown" not in (origin.base, record.base_fingerprint):
            _same_base(record.base_fingerprint, origin.base)
        if any(name.startswith(_CHAIN) for name in names):
            file = _check_chain(model, origin)
            return None if file is None else file.chain_fingerprint
        return None
    if (adapter := peft_adapter(model)) is not None:
        wrapped: Any = model
        _check_config(wrapped.peft_config[adapter].to_dict(), origin.peft or {})
        return origin.base
    return origin.base if origin.initial == "base" else None  # an adapter's own tensors are in the model's fingerprint


def _check_chain(model: nn.Module, origin: Origin) -> AdapterFile | None:
    record, file = applied(model), adapter_file(origin)
    chain = origin.chain if file is None else file.chain
    stage = record.stage if file is None else file.stage
    if chain is not None and (chain, stage) != (str(record.chain), record.stage):
        raise LoadError(
            "expert",
            found=f"a model that carries {record.chain}, stage {record.stage + 1}",
            rule=f"this expert belongs to {chain}, stage {stage + 1}",
        )
    if file is None:
        return None
    check_saved(model, file.ranks, file.extracted, "expert")
    if file.extracted and any(state.rank is not None for _, state in specs(model).values()):
        rule = "an expert of an extracted adapter goes into one"
        raise LoadError("expert", found="elastic adapters", rule=rule, fix="set_ranks as the expert has them; extract")
    for layer in chain_layers(model).values():
        for state in layer.states:
            if isinstance(state.link, Adapter) and not _same_constants(state.link, record.seed, file.seed):
                found, rule = (
                    f"a model of seed {record.seed}",
                    f"{state.link.name}'s projections are those of {file.seed}",
                )
                raise LoadError("expert", found=found, rule=rule, fix=f"apply(…, seed={file.seed})")
        break
    return file


def _same_constants(link: Adapter, seed: int, other: int) -> bool:
    """Whether what all layers share is the same with both seeds; drawn for the smallest layer there is."""
    if seed == other:
        return True
    one, two = (link.constants((1, 1), each, torch.float32) for each in (seed, other))
    return all(torch.equal(one[name], two[name]) for name in one)


def _check_config(live: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    for key in _MEANING:
        if key in live and key in said:
            here, there = live[key], said[key]
            if (here or None) != (there or None) and not (
                isinstance(here, list) and sorted(here) == sorted(there or [])
            ):
                fix = "peft.get_peft_model, with the expert's own config"
                raise LoadError("expert", found=f"a peft adapter with {key}={here}"[:300],
                                rule=f"this expert's has {key}={there}"[:300], fix=fix)  # fmt: skip


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What `live_fingerprint` is of: a chain's bases, the model under a peft adapter, or the whole model."""
    if layers := chain_layers(model):
        parts = {name: layer.base.state_dict(keep_vars=True) for name, layer in layers.items()}
        return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}
    if peft_adapter(model) is None:
        return {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    return _under_peft(model)


def live_fingerprint(model: nn.Module) -> str:
    """Fingerprint of what the expert must have been made for. Reads every byte of it."""
    if layers := chain_layers(model):
        return base_fingerprint(layers)
    wrapped: Any = model
    inner: nn.Module = model if peft_adapter(model) is None else wrapped.get_base_model()
    tensors = base_tensors(model)
    if any(tensor.is_meta for tensor in tensors.values()):
        return "unknown"
    return tensors_fingerprint(tensors, leave_out=new_heads(inner))


def _under_peft(model: Any) -> dict[str, Tensor]:
    """The state of the model that peft wrapped, as it was: without adapters and copies, under the old names."""
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
    """LoadError unless they are the same, or one couldn't be taken."""
    if "unknown" not in (found, expected):
        _same_base(found, expected)


def _same_base(found: str, expected: str) -> None:
    if found != expected:
        raise LoadError(
            "expert",
            found=f"a base with fingerprint {found}",
            rule=f"this expert is for the base {expected}",
            fix="load the very checkpoint and dtype that it was trained on",
        )
