"""Replacement of a model's target layers by layers that carry an empty chain, after every check that needs no run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from dovetail.chains.assignment import Assignment
from dovetail.chains.layer.applied import AppliedChain, applied, carries_chain
from dovetail.chains.layer.base import Base, Scratch
from dovetail.chains.layer.bits import pack_bits
from dovetail.chains.layer.held import Grid, grid_of, grids, guard_saving, held, put_grids
from dovetail.chains.layer.linear import ChainLinear, packed_layers
from dovetail.chains.link import Adapter, Site, arguments
from dovetail.chains.stages import CheckedChain
from dovetail.errors import ChainError, HistoryWarning
from dovetail.models.disk import Disk
from dovetail.models.experts import Experts
from dovetail.models.fingerprint import model_fingerprint
from dovetail.models.layouts import layout_of
from dovetail.models.targets import Target, find_targets
from dovetail.models.weight_reads import changes_weights


def attach(
    model: nn.Module, assignment: Assignment, targets: str | Sequence[str], seed: int, disk: Disk | None = None
) -> tuple[AppliedChain, list[Target]]:
    """Replace the target layers, after every check that needs no run, by layers that carry an empty chain.

    Return what the model remembers of the chain, and the replaced layers.

    disk  of the weights that stay on disk
    """
    if carries_chain(model):
        found = f"a model with the chain {applied(model).chain}"
        fix = "write both as one chain, or merge the first one"
        raise ChainError("apply", found=found, rule="a model has at most one chain", fix=fix)
    if change := changes_weights(model):
        raise ChainError(
            f"apply to {type(model).__name__}",
            found=change,
            rule="a forward pass must leave the weights as they are, because they are trained, merged and saved",
            fix="turn it off in config.json before the model is loaded (RWKV: rescale_every=0)",
        )
    before = model_fingerprint(model, disk)
    packed = packed_layers(model)
    if packed and (lost := assignment.chain.given_up):
        raise ChainError(
            f"{assignment.chain} on a packed model",
            found=f"a chain that gives up the {' and the '.join(lost)} of the base",
            rule="a chain on a packed model must continue on its zeros and its grid",
            fix=f"{assignment.chain.keeping}, or call dovetail.to_stock(model) first",
        )
    with stock_in_place(model):
        layers = find_targets(model, targets)
        assignment = assignment.on(layers, lambda name: held(model, name))
        sites = {target.name: _checked_site(target, assignment.at(target.name)) for target in layers}
        record = AppliedChain(assignment, targets if isinstance(targets, str) else tuple(targets), seed, before)
        scratch = Scratch()
        modules = {target.name: target.module for target in layers}
        for target in layers:
            module = target.module
            bias = getattr(module, "bias", None)
            if target.name in packed:
                base = packed[target.name].base.sharing(scratch)
            else:
                base = Base(layout_of(target.name, module), module.get_parameter("weight").detach(), scratch)
            layer = ChainLinear(sites[target.name], base, None if bias is None else bias.detach(), record)
            record.layers[target.name] = layer.train(module.training)
        _continue(record, modules, grids(model))  # the last check: nothing is replaced before it
    layers = [replace(target, module=packed.get(target.name, target.module)) for target in layers]
    open_experts(model, layers)
    replace_modules(model, [(target.module, record.layers[target.name]) for target in layers])
    guard_saving(model)
    return record, layers


@contextmanager
def stock_in_place(model: nn.Module) -> Iterator[None]:
    """While entered, put stock modules without storage in the place of packed layers: they are found, and never run."""
    pairs = [(layer, _stand_in(layer)) for layer in packed_layers(model).values()]
    replace_modules(model, pairs)
    try:
        yield
    finally:
        replace_modules(model, [(module, layer) for layer, module in pairs])


def _stand_in(layer: ChainLinear) -> nn.Module:
    weight = layer.layout.empty(layer.base.dtype, torch.device("meta"))
    return layer.layout.build(weight, None if layer.bias is None else layer.bias.detach()).train(layer.training)


def open_experts(model: nn.Module, layers: Iterable[Target]) -> None:
    """Put the opened modules of these layers in the place of the stock ones that keep all experts in one parameter."""
    paths = {layer.experts: layer.name.rsplit(".", 2)[0] for layer in layers if layer.experts is not None}
    replace_modules(model, [(model.get_submodule(path), experts) for experts, path in paths.items()])


def close_experts(model: nn.Module) -> None:
    """Put stock modules in the place of opened experts whose layers are all stock ones, with their grids."""

    def closed() -> Iterator[tuple[nn.Module, nn.Module]]:
        for experts in [module for module in model.modules() if isinstance(module, Experts)]:
            layers = dict(experts.matrices())
            if not any(isinstance(layer, ChainLinear) for layer in layers.values()):
                stock = experts.close()
                put_grids(stock, {name: grid for name, layer in layers.items() if (grid := grid_of(layer)) is not None})
                yield experts, stock

    replace_modules(model, closed())


def _continue(record: AppliedChain, modules: Mapping[str, nn.Module], found_grids: Mapping[str, Grid]) -> None:
    """Start from the zeros and the grid that the layers have from an earlier round, or say what the chain gives up.

    modules      the stock layers, by the names of the record's layers
    found_grids  the grids of the model (`dovetail.chains.layer.held`)
    """
    links = record.chain
    bases = {name: layer.base for name, layer in record.layers.items()}
    if any(base.device.type == "meta" for base in bases.values()):
        return  # `apply_on_meta` allocates them, without values
    for name, base in bases.items():
        own = record.assignment.at(name)
        if any(link.kind == "pruner" for link in own.kept) and own.stages[0].keep_mask:
            base.mask_bits = pack_bits(base.matrix() != 0)
        grid = next((link for link in own.kept if link.kind == "quantizer"), None)
        if grid is not None:
            if base.quantized is not None:
                continue
            found = found_grids.get(name)
            if found is None:
                raise ChainError(
                    f"{name} under {links}",
                    found=f"a layer of a model that was merged on the grid of {grid}, without that grid",
                    rule="a chain continues on the grid that was saved with the weights, in dovetail/grid.safetensors",
                    fix="load the packed model of that run, or a folder saved with this version",
                )
            base.set_quantized(found.encode(name, base.matrix()))
    lost: list[tuple[str, str]] = []
    if "zeros" in links.given_up:
        weights = sum(base.shape[0] * base.shape[1] for base in bases.values())
        zeros = weights - sum(int(torch.count_nonzero(base.matrix())) for base in bases.values())
        lost += [("zeros", f"the zeros of the base ({zeros / weights:.1%} of the weights under it)")] if zeros else []
    if "grid" in links.given_up and (on := next(filter(None, map(found_grids.get, modules)), None)):
        lost += [("grid", f"its quantization grid, {on.identity}")]
    record.given_up = tuple(what for what, _ in lost)
    if lost:
        told = " and ".join(text for _, text in lost)
        warnings.warn(f"{links} on a merged model gives up {told}; {links.keeping}", HistoryWarning, stacklevel=4)


def _checked_site(target: Target, the_chain: CheckedChain) -> Site:
    """Return the place of the links on that layer; raise ChainError for a link that cannot be used there."""
    layout = layout_of(target.name, target.module)
    has_bias = getattr(target.module, "bias", None) is not None
    site = Site(target.name, layout.out_features, layout.in_features, has_bias, target.feedforward)
    quantizer = the_chain.quantizer
    if quantizer is not None and any(isinstance(link, Adapter) and link.moves is not None for link in the_chain):
        quantizer.check(site)
        with torch.device("meta"):
            site = replace(site, block=quantizer.empty((site.out_features, site.in_features)).block)
    for link in the_chain:
        link.check(site)
        # The W' of a convolution is computed by its definition, which does not depend on the input.
        if arguments(link).get("dropout") and not layout.linear:
            raise ChainError(
                f"{link.name} at {target.name}",
                found=f"dropout={arguments(link)['dropout']} on a {type(target.module).__name__}",
                rule="dropout on the input of a low rank is supported for linear layers only",
                fix=f"set dropout=0 in {link.name}, or leave this layer out of the targets",
            )
    return site


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second module of each pair wherever the first is registered, under every name that it has.

    pairs  read one at a time, after the one before it is in place
    """
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    for old, new in pairs:
        for parent, name in places.pop(old, []):
            parent._modules[name] = new
