"""Import from peft: a stock adapter directory becomes the chain that computes the same, with its parameters.

The layers are those that the file has tensors for. Files come from outside: nothing is unpickled, shapes and dtypes are
checked against the model before a tensor is read, and every tensor is named that the model has no place for, or that is
missing. Layers with ranks of their own (`rank_pattern`) are an elastic chain, extracted at these ranks, so that
`save_adapter` and `load_adapter` know them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dovetail.chains.layer.elastic import load_ranks
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Adapter, Chain, Link, Site
from dovetail.chains.notation import chain
from dovetail.checkpoint.formats.peft.config import (
    AnyConfig,
    IA3File,
    LoraFile,
    Ranked,
    VeraFile,
    ia3,
    ranked,
    read_config,
    vera,
)
from dovetail.checkpoint.formats.peft.write import (
    CONFIG_FILE,
    PREFIX,
    PROJECTIONS,
    TENSORS,
    TENSORS_FILE,
    saved_modules,
)
from dovetail.compression.apply import apply
from dovetail.compression.calibration import Batch
from dovetail.errors import ChainError, LoadError
from dovetail.links.adapt import IA3, DoRA, LoHa, LoRA, VeRA
from dovetail.models.layouts import layout_of
from dovetail.models.targets import find_targets

DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class _Layer:
    """A layer of the model that the file adapts.

    site   as the chain will see it
    keys   our name of a parameter -> the file's
    """

    site: Site
    keys: dict[str, str]


def import_peft(
    model: nn.Module,
    directory: str | Path,
    *,
    base: str | Chain | Link | None = None,
    calibration: Iterable[Batch] | None = None,
) -> nn.Module:
    """Puts a peft adapter (LoRA, rsLoRA, DoRA, IA3, LoHa, VeRA) on its base model, in place, as a chain.

    model        the stock base, without a chain
    directory    with adapter_config.json and adapter_model.safetensors, as peft's save_pretrained writes them
    base         pruners and quantizers to run first, such as "nf4(double=true)", if it was trained over that
    calibration  for `base`, as `apply` takes it
    returns      the same model, ready to be evaluated, trained on, saved or merged; outputs as stock peft's. A head
                 that the file brings (`modules_to_save`) is copied into the model, and trained on
    errors       LoadError naming the field, tensor or layer that Dovetail can't follow, and what `apply` refuses; the
                 model is as it was
    """
    if chain_layers(model):
        raise ChainError("import_peft", found="a model that carries a chain already", rule="a model carries one chain")
    directory = Path(directory)
    before = () if base is None else tuple(chain(base))
    for link in before:
        if link.differentiable:
            rule = "base is what is done to the model before the adapter: pruners and quantizers"
            raise ChainError("import_peft", found=f"base={str(base)!r}", rule=rule)
    config = read_config(directory / CONFIG_FILE)
    path = directory / TENSORS_FILE
    if not path.is_file() and (directory / "adapter_model.bin").exists():
        raise LoadError(
            str(directory / "adapter_model.bin"),
            found="a pickle",
            rule="nothing is unpickled: it could run any code",
            fix="load it with peft where you trust it, and save it with safe_serialization=True",
        )
    where = str(path)
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: _shape(where, key, file) for key in file.keys()}  # noqa: SIM118 (not a dict)
            layers, heads = _placed(where, model, config, shapes)
            link, per_layer = _link(where, config, layers)
            _check_shapes(where, layers, per_layer, link, shapes)
            tensors = {key: file.get_tensor(key) for key in shapes}
    except (OSError, SafetensorError) as error:
        rule = f"a peft adapter directory holds a whole {TENSORS_FILE}"
        raise LoadError(where, found=str(error)[:300], rule=rule, fix="copy the directory again") from None
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise LoadError(f"{where}, {key}", found="NaN or infinity", rule="parameters are finite numbers")
    if isinstance(link, VeRA):
        _check_projections(where, link, layers, tensors)
    the_chain = Chain((*before, link))
    apply(model, the_chain, targets=list(layers), calibration=calibration)
    _fill(model, layers, per_layer, link, tensors)
    _fill_heads(model, heads, tensors)
    return model


def _shape(where: str, key: str, file: Any) -> tuple[int, ...]:
    """A tensor's shape, from the file's header."""
    part = file.get_slice(key)
    if part.get_dtype() not in DTYPES:
        raise LoadError(f"{where}, {key[:200]}", found=part.get_dtype(), rule=f"parameters are {', '.join(DTYPES)}")
    return tuple(part.get_shape())


def _kind(config: AnyConfig) -> type[Link]:
    if isinstance(config, LoraFile):
        return DoRA if config.use_dora else LoRA
    return VeRA if isinstance(config, VeraFile) else IA3 if isinstance(config, IA3File) else LoHa


def _placed(
    where: str, model: nn.Module, config: AnyConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Layer], dict[str, str]]:
    """Where each tensor of the file belongs: layers by path, and the file's key of a head's tensor -> the model's."""
    parameters = {theirs: ours for ours, theirs in TENSORS[_kind(config)].items()}
    ending = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, parameters))})")
    modules = saved_modules(model, config.modules_to_save or ())
    heads = {
        f"{PREFIX}{path}.{key}": f"{path}.{key}" for path, module in modules.items() for key in module.state_dict()
    }
    state = model.state_dict()
    keys: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        if key in heads:
            if tuple(state[heads[key]].shape) != shape:
                rule = f"the model needs {tuple(state[heads[key]].shape)}"
                raise LoadError(f"{where}, {key}", found=f"shape {shape}", rule=rule)
        elif match := ending.fullmatch(key):
            keys.setdefault(match[1], {})[parameters[match[2]]] = key
        elif not (isinstance(config, VeraFile) and config.save_projection and key in PROJECTIONS.values()):
            rule = f"a file of {_kind(config).name} holds {', '.join(parameters)} of linear layers"
            rule += f", and the modules {', '.join(config.modules_to_save)}" if config.modules_to_save else ""
            raise LoadError(where, found=f"a tensor {key[:200]!r}", rule=rule, fix="load it with peft")
    if isinstance(config, VeraFile) and config.save_projection:
        for key in set(PROJECTIONS.values()) - shapes.keys():
            raise LoadError(where, found=f"{key} missing from the file", rule="save_projection says that it's there")
    for key in heads.keys() - shapes.keys():
        raise LoadError(where, found=f"{key} missing from the file", rule="modules_to_save are saved whole")
    if not keys:
        raise LoadError(where, found="no parameter of a layer", rule=f"a file of {_kind(config).name} has some")
    sites = _sites(where, model, list(keys))
    layers = {name: _Layer(sites[name], of) for name, of in keys.items()}
    if isinstance(config, IA3File):
        for layer in layers.values():
            (key,) = layer.keys.values()
            inputs = shapes[key] == (1, layer.site.in_features) and shapes[key] != (layer.site.out_features, 1)
            layer.keys.clear()
            layer.keys["in_scale" if inputs else "out_scale"] = key
    _check_targets(where, model, config, layers, modules)
    return layers, heads


def _sites(where: str, model: nn.Module, names: list[str]) -> dict[str, Site]:
    """The layers of these paths, as the chain will see them."""
    layouts = {}
    for name in names:
        try:
            layouts[name] = layout_of(name, model.get_submodule(name))
        except AttributeError:
            raise LoadError(where, found=f"tensors of {name!r}"[:200], rule="the model has no such layer") from None
        if not layouts[name].linear:
            raise LoadError(where, found=f"tensors of {name}, a convolution", rule="adapters of linear layers are read")
    targets = find_targets(model, names)
    for target in targets:
        if target.name not in layouts:
            found = f"nothing for {target.name}, which ends like the path of a layer that it adapts"
            raise LoadError(where, found=found, rule="targets fit the ends of paths, so that it would be adapted too")
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
            raise LoadError(where, found=f"tensors of {name}", rule="that is another path of a layer named before")
    return sites


def _check_targets(
    where: str, model: nn.Module, config: AnyConfig, layers: Mapping[str, _Layer], saved: Mapping[str, nn.Module]
) -> None:
    """The config's list of layers and the file agree. A regular expression from outside isn't run: peft has tensors for
    every layer that it fitted, and one without keeps its base."""
    for name in layers:
        if any(f"{name}.".startswith(f"{path}.") for path in saved):
            raise LoadError(
                where, found=f"tensors of {name}", rule="it is in modules_to_save, which peft doesn't adapt"
            )
    if not isinstance(config.target_modules, list):
        return
    wanted = set(config.target_modules)
    ends = tuple(f".{target}" for target in wanted)
    for name in layers:
        if name not in wanted and not name.endswith(ends):
            raise LoadError(where, found=f"tensors of {name}", rule="target_modules doesn't name it: peft ignores them")
    if config.layers_to_transform is not None or config.exclude_modules:
        return
    for target in find_targets(model, ["all-linear"]):
        name = target.name
        missing = (name in wanted or name.endswith(ends)) and name not in layers
        if missing and not any(name.startswith(f"{path}.") for path in saved):
            raise LoadError(where, found=f"tensors of {name} missing from the file", rule="target_modules names it")


def _link(where: str, config: AnyConfig, layers: Mapping[str, _Layer]) -> tuple[Adapter, Ranked | None]:
    if isinstance(config, VeraFile):
        return vera(config), None
    if isinstance(config, IA3File):
        sites = {name: layer.site for name, layer in layers.items()}
        return ia3(sites, {name: "in_scale" in layer.keys for name, layer in layers.items()}), None
    found = ranked(config, list(layers), where)
    return found.link, found


def _check_shapes(
    where: str,
    layers: Mapping[str, _Layer],
    per_layer: Ranked | None,
    link: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for name, layer in layers.items():
        here = link if per_layer is None or not link.ranks else link.plain(per_layer.ranks[name])
        wanted = here.parameter_shapes(layer.site)
        for ours in wanted.keys() - layer.keys.keys():
            theirs = TENSORS[type(link)][ours]
            raise LoadError(
                where, found=f"{PREFIX}{name}.{theirs} missing from the file", rule=f"{here} has one a layer"
            )
        for ours, key in layer.keys.items():
            shape = wanted[ours]
            if ours in ("out_scale", "in_scale"):
                shape = (shape[0], 1) if ours == "out_scale" else (1, shape[0])
            if shapes[key] != shape:
                raise LoadError(f"{where}, {key}", found=f"shape {shapes[key]}", rule=f"{here} needs {shape}")


def _check_projections(where: str, link: VeRA, layers: Mapping[str, _Layer], tensors: Mapping[str, Tensor]) -> None:
    """VeRA's projections aren't kept but drawn again, from the same seed and in the same order as peft's."""
    sites = [layer.site for layer in layers.values()]
    widest = max(site.out_features for site in sites), max(site.in_features for site in sites)
    drawn = link.constants(widest, 0, torch.float32)
    for ours, theirs in PROJECTIONS.items():
        if theirs in tensors and not torch.equal(tensors[theirs].float(), drawn[ours]):
            raise LoadError(
                f"{where}, {theirs}",
                found="other values than its projection_prng_key draws",
                rule="Dovetail draws projections from that key and keeps none (peft draws the same ones in float32; "
                "an elastic vera that was exported at a part of its rank has others)",
                fix="load it with peft",
            )


@torch.no_grad()
def _fill(
    model: nn.Module,
    layers: Mapping[str, _Layer],
    per_layer: Ranked | None,
    link: Adapter,
    tensors: Mapping[str, Tensor],
) -> None:
    if per_layer is not None and link.ranks:
        load_ranks(model, {f"{name}/0": rank for name, rank in per_layer.ranks.items()}, True)
    for name, layer in chain_layers(model).items():
        (state,) = layer.states
        for ours, parameter in state.named_parameters(recurse=False):
            parameter.copy_(tensors[layers[name].keys[ours]].reshape(parameter.shape))
            if per_layer is not None and ours in ("B", "B1"):
                parameter *= per_layer.factors[name]


@torch.no_grad()
def _fill_heads(model: nn.Module, heads: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict(keep_vars=True)
    for theirs, ours in heads.items():
        state[ours].copy_(tensors[theirs])
        if isinstance(state[ours], nn.Parameter):
            state[ours].requires_grad_(True)
