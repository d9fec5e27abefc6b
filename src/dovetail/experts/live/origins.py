"""What an expert's values are added to in a live model, and whether that model is the one they were made for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic
from torch import Tensor, nn

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import check_saved, specs
from dovetail.chains.layer.fingerprint import base_fingerprint
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import AdapterFile, check_constants
from dovetail.compression.apply import initial_values
from dovetail.errors import LoadError
from dovetail.experts.live.names import CHAIN_PREFIXES, peft_adapter
from dovetail.experts.live.names import slots as slots
from dovetail.experts.peft_initial import peft_initial
from dovetail.experts.vectors import Origin
from dovetail.models.fingerprint import tensors_fingerprint
from dovetail.models.targets import new_heads

_MEANING = ("peft_type", "lora_alpha", "alpha", "use_rslora", "use_dora", "alpha_pattern", "projection_prng_key")
"""What of a peft config decides what an adapter's tensors do."""


def starts(model: nn.Module, origin: Origin, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an expert's values are added to, by name, in the dtypes and on the devices of the live tensors; where a name
    isn't there, the values stand for themselves. New tensors; none with `initial="base"`, which adds to what the model
    holds.

    errors  LoadError for names that the origin can't speak of
    """
    if origin.initial == "chain":
        for name in tensors:
            if not name.startswith(CHAIN_PREFIXES):
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
        if any(name.startswith(CHAIN_PREFIXES) for name in names):
            file = _check_chain(model, origin)
            return None if file is None else file.chain_fingerprint
        return None
    if (adapter := peft_adapter(model)) is not None:
        _check_peft(model, adapter, origin.peft or {})
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
    check_constants(model, file.seed, "expert")
    return file


def _check_peft(model: Any, adapter: str, said: Mapping[str, Any]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    left: list[nn.Module] = [model]
    while left:
        module = left.pop()
        if isinstance(module, BaseTunerLayer) and module.merged:
            fix = "model.unmerge_adapter()"
            raise LoadError("peft model", found="a merged adapter", rule="only an unmerged one can be swapped", fix=fix)
        left += [child for child in module._modules.values() if child is not None]
    live = model.peft_config[adapter].to_dict()
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
