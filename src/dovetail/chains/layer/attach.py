"""Replacement of a model's target layers by layers that carry an empty chain, after every check that needs no run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dovetail.chains.layer.applied import AppliedChain, applied
from dovetail.chains.layer.base import Base, Scratch
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.link import Quantizer, Site, arguments
from dovetail.chains.notation import chain
from dovetail.chains.stages import CheckedChain
from dovetail.errors import ChainError
from dovetail.models.fingerprint import model_fingerprint
from dovetail.models.layouts import layout_of
from dovetail.models.targets import Target, find_targets


def attach(
    model: nn.Module, the_chain: CheckedChain, targets: str | Sequence[str], seed: int
) -> tuple[AppliedChain, list[Target]]:
    """Replace the target layers, after every check that needs no run, by layers that carry an empty chain.

    Return what the model remembers of the chain, and the replaced layers.
    """
    if chain_layers(model):
        found = f"a model with the chain {applied(model).chain}"
        fix = "write both as one chain, or merge the first one"
        raise ChainError("apply", found=found, rule="a model has at most one chain", fix=fix)
    _refuse_second_quantizer(model, the_chain)
    layers = find_targets(model, targets)
    sites = {target.name: _checked_site(target, the_chain) for target in layers}
    record = AppliedChain(
        the_chain, targets if isinstance(targets, str) else tuple(targets), seed, model_fingerprint(model)
    )
    scratch = Scratch()
    for target in layers:
        module = target.module
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        base = Base(layout_of(target.name, module), weight.detach(), scratch)
        layer = ChainLinear(sites[target.name], base, None if bias is None else bias.detach(), record)
        layer.train(module.training)
        replace_module(model, module, layer)
        record.layers[target.name] = layer
    return record, layers


def _refuse_second_quantizer(model: nn.Module, the_chain: CheckedChain) -> None:
    """Refuse a quantizer on a merged model whose config names a grid (`dovetail.merge`)."""
    again = the_chain.quantizer
    said = getattr(getattr(model, "config", None), "dovetail", None)
    text = said.get("chain") if isinstance(said, dict) else None
    if again is None or not isinstance(text, str):  # a config comes from outside
        return
    before = next((link for link in chain(text) if isinstance(link, Quantizer)), None)
    if before is not None:
        raise ChainError(
            f"{again.name} in {the_chain}",
            found=f"a model that was merged on the grid of {before}",
            rule="a model is quantized at most once: a second grid would round rounded weights",
            fix=f"start from the base model, or remove {again.name}",
        )


def _checked_site(target: Target, the_chain: CheckedChain) -> Site:
    """Return the place of the links on that layer; raise ChainError for a link that cannot be used there."""
    layout = layout_of(target.name, target.module)
    has_bias = getattr(target.module, "bias", None) is not None
    site = Site(target.name, layout.out_features, layout.in_features, has_bias, target.feedforward)
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


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered, under every name that it has."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
