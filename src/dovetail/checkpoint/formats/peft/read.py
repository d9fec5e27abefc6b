"""Import from peft: a stock peft adapter directory becomes a chain that computes the same, with its parameters.

The adapted layers are those that the file has tensors for. Files come from outside: nothing is unpickled, shapes and
dtypes are checked against the model before a tensor is read, and an error names every tensor that the model has no
place for or that is missing. Layers with different ranks (`rank_pattern`) become an elastic chain, extracted at these
ranks, so `save_adapter` and `load_adapter` support them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from dovetail.chains.layer.elastic import load_ranks
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Chain, Link, Site
from dovetail.chains.notation import chain
from dovetail.chains.registry import links
from dovetail.checkpoint.formats.peft.write import CONFIG_FILE, PREFIX, TENSORS_FILE, saved_modules
from dovetail.compression.apply import apply
from dovetail.compression.calibration import Batch
from dovetail.errors import ChainError, LoadError, TargetError
from dovetail.files import first_problem, open_tensors, read_json
from dovetail.links.adapt.peft import PeftAdapter, PeftConfig, PeftLink
from dovetail.models.dtypes import STORED_FLOATS, shape_of
from dovetail.models.layouts import layout_of
from dovetail.models.targets import find_targets, inside
from dovetail.models.ties import cannot_untie, shared_outside, untie


@dataclass(frozen=True)
class _Layer:
    """A layer of the model that the file adapts.

    site   the layer as the chain sees it
    keys   our name of a parameter -> the file's
    """

    site: Site
    keys: dict[str, str]


@dataclass(frozen=True)
class _File:
    """The contents of a peft adapter.

    where   the tensors' path, which errors name
    kind    the adapter's class
    config  its configuration, checked
    shapes  of the tensors, by their names
    """

    where: str
    kind: type[PeftAdapter]
    config: PeftConfig
    shapes: Mapping[str, tuple[int, ...]]


def import_peft(
    model: nn.Module,
    directory: str | Path,
    *,
    base: str | Chain | Link | None = None,
    calibration: Iterable[Batch] | None = None,
) -> nn.Module:
    """Put a peft adapter (LoRA, rsLoRA, DoRA, AdaLoRA, IA3, LoHa, VeRA) on its base model, in place, as a chain.

    model        the stock base, without a chain
    directory    with adapter_config.json and adapter_model.safetensors, as peft's save_pretrained writes them
    base         pruners and quantizers to run first, such as "nf4(double=true)", if it was trained over that
    calibration  for `base`, as `apply` takes it
    returns      the same model, ready to be evaluated, trained, saved or merged; its outputs are stock peft's. A head
                 that the file contains (`modules_to_save`) is copied into the model and stays trainable. If it was
                 tied to the embedding, it is untied, also in the model's configuration
    errors       LoadError that names the field, tensor or layer that Dovetail does not support, and the errors of
                 `apply`; the model is unchanged then
    """
    if chain_layers(model):
        found, rule = "a model that carries a chain already", "a model carries at most one chain"
        raise ChainError("import_peft", found=found, rule=rule, fix="load the base model again")
    directory = Path(directory)
    before = () if base is None else tuple(chain(base))
    for link in before:
        if link.differentiable:
            rule = "base must consist of pruners and quantizers"
            raise ChainError("import_peft", found=f"base={str(base)!r}", rule=rule, fix=f"remove {link}")
    kind, config = read_config(directory / CONFIG_FILE)
    path = directory / TENSORS_FILE
    refuse_pickle(directory)
    where = str(path)
    with open_tensors(path, owner="a peft adapter directory") as stored:
        keys = stored.keys()
        shapes = {key: tuple(shape_of(where, stored, key, STORED_FLOATS)[0]) for key in keys}
        file = _File(where, kind, config, shapes)
        try:
            layers, heads = _place(file, model)
            found = kind.from_peft(config, {layer.site: layer.keys.keys() for layer in layers.values()}, where=where)
            _check_shapes(file, layers, found)
        except (ChainError, TargetError) as error:  # what neither a link nor a target can express
            raise LoadError(
                f"{where}: {error.where}", found=error.found, rule=error.rule, fix="load it with peft"
            ) from None
        values = {key: stored.get_tensor(key) for key in keys}
    for key, tensor in values.items():
        if not bool(torch.isfinite(tensor).all()):
            rule = "parameters must be finite numbers"
            raise LoadError(f"{where}, {key}", found="NaN or infinity", rule=rule, fix="train the adapter again")
    _check_constants(file, layers, found, values)
    apply(model, Chain((*before, found.link)), targets=list(layers), calibration=calibration)
    _fill(model, layers, found, values)
    _fill_heads(model, heads, config.modules_to_save or (), values)
    return model


def refuse_pickle(directory: Path) -> None:
    """Raise LoadError where the tensors of a peft adapter are in adapter_model.bin alone."""
    names = (TENSORS_FILE, f"{TENSORS_FILE}.index.json")
    if (directory / "adapter_model.bin").exists() and not any((directory / name).is_file() for name in names):
        raise LoadError(
            str(directory / "adapter_model.bin"),
            found="a pickle",
            rule="nothing is unpickled, because a pickle can run any code",
            fix="load it with peft if you trust it, and save it with safe_serialization=True",
        )


def _unfit(where: str, found: str, rule: str) -> LoadError:
    """Return the error for a file that does not fit the model or its own config."""
    return LoadError(where, found=found, rule=rule, fix="load the adapter's own base model, or save the adapter again")


def read_config(path: Path) -> tuple[type[PeftAdapter], PeftConfig]:
    """Read and check an adapter_config.json; LoadError names a field that Dovetail does not support."""
    where = str(path)
    rule = "a peft adapter directory must contain adapter_config.json, a JSON object"
    raw = read_json(path, dict[str, Any], rule=rule)
    known = [link for link in links().values() if issubclass(link, PeftAdapter)]
    kinds = [kind for kind in known if kind.peft_type == raw.get("peft_type")]
    kinds = [k for k in kinds if k.peft_variant and raw.get(k.peft_variant)] or [k for k in kinds if not k.peft_variant]
    if not kinds:
        rule = f"peft_type must be one of {', '.join(sorted({kind.peft_type for kind in known}))}"
        raise LoadError(where, found=f"peft_type {raw.get('peft_type')!r}"[:200], rule=rule, fix="load it with peft")
    try:
        config = kinds[0].peft_config.model_validate(raw)
    except pydantic.ValidationError as error:
        rule = "adapter_config.json must be in peft's form"
        raise LoadError(where, found=first_problem(error), rule=rule, fix="save it with peft again") from None
    config.check(where)
    return kinds[0], config


def _place(file: _File, model: nn.Module) -> tuple[dict[str, _Layer], dict[str, str]]:
    """Return where each tensor of the file belongs: layers by path, and a head's tensor -> the model's name of it."""
    where, shapes, name, config = file.where, file.shapes, file.kind.name, file.config
    endings = sorted(set(file.kind.peft_tensors.values()))
    ending = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, endings))})")
    modules = saved_modules(model, config.modules_to_save or ())
    heads = {f"{PREFIX}{path}.{key}": f"{path}.{key}" for path, m in modules.items() for key in m.state_dict()}
    constants = set(file.kind.peft_constants.values()) if config.stores_constants else set()
    state = model.state_dict()
    parts: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        if key in heads:
            if tuple(state[heads[key]].shape) != shape:
                rule = f"the shape must be the model's, {tuple(state[heads[key]].shape)}"
                raise _unfit(f"{where}, {key}", f"shape {shape}", rule)
        elif match := ending.fullmatch(key):
            parts.setdefault(match[1], {})[match[2]] = key
        elif key not in constants:
            rule = f"a file of {name} contains {', '.join(endings)} of linear layers"
            rule += f", and the modules {', '.join(config.modules_to_save)}" if config.modules_to_save else ""
            raise LoadError(where, found=f"a tensor {key[:200]!r}", rule=rule, fix="load it with peft")
    for key in sorted(constants - shapes.keys()):
        raise _unfit(where, f"{key} missing from the file", "the config requires it (save_projection)")
    for key in heads.keys() - shapes.keys():
        raise _unfit(where, f"{key} missing from the file", "modules_to_save must be saved whole")
    if tied := cannot_untie(model, modules):
        rule = "a module of modules_to_save must have tensors of its own, because peft trains a copy of it"
        raise LoadError(where, found=tied, rule=rule, fix="load the base with tie_word_embeddings=False")
    if not parts:
        rule = f"a file of {name} must contain parameters of a layer"
        raise LoadError(where, found="no parameter of a layer", rule=rule, fix="save it with peft again")
    sites = _sites(where, model, list(parts))
    layers = {}
    for path, of in parts.items():
        names = file.kind.peft_names(sites[path], {theirs: shapes[key] for theirs, key in of.items()})
        layers[path] = _Layer(sites[path], {ours: of[theirs] for ours, theirs in names.items()})
    _check_targets(where, model, config, layers, modules)
    return layers, heads


def _sites(where: str, model: nn.Module, names: list[str]) -> dict[str, Site]:
    """Return the layers of these paths, as the chain sees them."""
    layouts = {}
    for name in names:
        try:
            layouts[name] = layout_of(name, model.get_submodule(name))
        except AttributeError:
            rule = "the file must name layers of the model, which has no such layer"
            raise _unfit(where, f"tensors of {name!r}"[:200], rule) from None
        if not layouts[name].linear:
            raise _unfit(where, f"tensors of {name}, a convolution", "adapted layers must be linear")
    targets = find_targets(model, names)
    for target in targets:
        if target.name not in layouts:
            found = f"nothing for {target.name}, whose path ends like that of an adapted layer"
            raise _unfit(where, found, "targets match the end of a path, so the file must adapt it too")
    sites = {
        target.name: Site(
            target.name,
            layouts[target.name].out_features,
            layouts[target.name].in_features,
            feedforward=target.feedforward,
        )
        for target in targets
    }
    for name in names:
        if name not in sites:
            rule = "each layer must be named by one path, and this is a second path of a layer"
            raise _unfit(where, f"tensors of {name}", rule)
    return sites


def _check_targets(
    where: str, model: nn.Module, config: PeftConfig, layers: Mapping[str, _Layer], saved: Mapping[str, nn.Module]
) -> None:
    """Raise LoadError unless the config's list of layers and the file agree.

    A regular expression of a file is not run. peft stores tensors for every layer that it matched, and a layer without
    tensors keeps its base.
    """
    for name in layers:
        if inside(name, saved):
            rule = "a layer of modules_to_save must have no adapter, because peft does not adapt it"
            raise _unfit(where, f"tensors of {name}", rule)
    if not isinstance(config.target_modules, list):
        return
    wanted = set(config.target_modules)
    ends = tuple(f".{target}" for target in wanted)
    for name in layers:
        if name not in wanted and not name.endswith(ends):
            rule = "target_modules must name every adapted layer; peft ignores the others"
            raise _unfit(where, f"tensors of {name}", rule)
    if config.layers_to_transform is not None or config.exclude_modules:
        return
    for target in find_targets(model, ["all-linear"]):
        name = target.name
        missing = (name in wanted or name.endswith(ends)) and name not in layers
        if missing and not inside(name, saved):
            rule = "the file must contain tensors of every layer in target_modules"
            raise _unfit(where, f"tensors of {name} missing from the file", rule)


def _check_shapes(file: _File, layers: Mapping[str, _Layer], found: PeftLink) -> None:
    for name, layer in layers.items():
        here = found.link.plain(found.ranks[name]) if found.link.ranks else found.link
        here.check(layer.site)
        wanted = here.parameter_shapes(layer.site)
        for ours in wanted.keys() - layer.keys.keys():
            missing = f"{PREFIX}{name}.{file.kind.peft_tensors[ours]} missing from the file"
            raise _unfit(file.where, missing, f"{here} must have one per layer")
        for ours, key in layer.keys.items():
            lengths = list(wanted[ours])
            if name in found.kept and ours in here.rank_axes:
                lengths[here.rank_axes[ours]] = sum(found.kept[name])
            shape = file.kind.peft_shape(ours, tuple(lengths))
            if file.shapes[key] != shape:
                rule = f"the shape must be {shape} for {here}"
                raise _unfit(f"{file.where}, {key}", f"shape {file.shapes[key]}", rule)


def _check_constants(file: _File, layers: Mapping[str, _Layer], found: PeftLink, tensors: Mapping[str, Tensor]) -> None:
    """Raise LoadError where stored constants are not those that the link draws from its seed."""
    if not tensors.keys() & set(file.kind.peft_constants.values()):
        return
    sites = [layer.site for layer in layers.values()]
    widest = max(site.out_features for site in sites), max(site.in_features for site in sites)
    drawn = found.link.constants(widest, 0, torch.float32)
    for ours, theirs in file.kind.peft_constants.items():
        if theirs in tensors and not torch.equal(tensors[theirs].float(), drawn[ours]):
            raise LoadError(
                f"{file.where}, {theirs}",
                found=f"other values than {found.link} draws from its seed",
                rule="the values must be those of the seed, because Dovetail draws them and stores none (peft draws "
                "the same ones in float32; an elastic adapter exported at a part of its rank has others)",
                fix="load it with peft",
            )


@torch.no_grad()
def _fill(model: nn.Module, layers: Mapping[str, _Layer], found: PeftLink, tensors: Mapping[str, Tensor]) -> None:
    if found.link.ranks:
        load_ranks(model, {f"{name}/0": rank for name, rank in found.ranks.items()}, True)
    for name, layer in chain_layers(model).items():
        (state,) = layer.states
        for ours, parameter in state.named_parameters(recurse=False):
            axis = found.link.rank_axes.get(ours)
            if name in found.kept and axis is not None:
                places = torch.tensor(found.kept[name], device=parameter.device).nonzero().view(-1)
                shape = list(parameter.shape)
                shape[axis] = len(places)
                value = tensors[layers[name].keys[ours]].reshape(shape).to(parameter)
                parameter.zero_().index_copy_(axis, places, value)
            else:
                parameter.copy_(tensors[layers[name].keys[ours]].reshape(parameter.shape))
            parameter *= found.factors.get(name, {}).get(ours, 1.0)


@torch.no_grad()
def _fill_heads(
    model: nn.Module, heads: Mapping[str, str], saved: Collection[str], tensors: Mapping[str, Tensor]
) -> None:
    """Copy the saved modules into the model. One that is tied to another gets tensors of its own first, as in peft."""
    for path in saved_modules(model, saved):
        if shared_outside(model, [path]):
            untie(model, path)
    state = model.state_dict(keep_vars=True)
    for theirs, ours in heads.items():
        state[ours].copy_(tensors[theirs])
        if isinstance(state[ours], nn.Parameter):
            state[ours].requires_grad_(True)
