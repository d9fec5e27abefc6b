"""The share of a model's parameters that is under a chain, and what is left out."""

from __future__ import annotations

import math

from torch import nn

from dovetail.chains.layer.linear import chain_layers, packed_layers
from dovetail.models.coverage import left_out
from dovetail.models.targets import select


def coverage(model: nn.Module) -> tuple[float, dict[str, int]]:
    """Return the share of a model's parameters under its chain, and what is left out: kind -> parameters.

    The layers of a model without a chain are those that `all-linear` would put under one. Adapters are not counted;
    the biases of a layer under the chain are under it.
    """
    under = chain_layers(model)
    layers = list(under.values())
    targets = [] if layers else select(model)
    modules = layers or [target.module for target in targets]
    inside = {id(p) for module in modules for p in module.parameters()}
    for target in targets:
        if target.experts is not None:  # a view of a three-dimensional parameter
            path, parameter, _ = target.name.rsplit(".", 2)
            inside.add(id(model.get_submodule(path).get_parameter(parameter)))
    left = left_out(model, inside)
    if rest := sum(math.prod(layer.base.shape) for name, layer in packed_layers(model).items() if name not in under):
        left["quantized layers"] = rest
    covered = sum(layer.base.shape[0] * layer.base.shape[1] for layer in layers)
    covered += sum(layer.bias.numel() for layer in layers if layer.bias is not None)
    if not layers:
        covered = sum(p.numel() for module in modules for p in module.parameters())
    return covered / (covered + sum(left.values())), left
