"""Footprint: exact bits of everything that a model stores, counted from the tensors themselves.

Counted: dense weights, packed codes, scales, zero points, nested constants, mask bits, adapters, and every other
parameter and persistent buffer, shared ones once. Not counted: tensors that are drawn again from a seed (VeRA's
projections) and tensors that only training needs (the full-precision weights of `regrid(start=weights)`).

These are bytes in memory. A pruned model may take less on disk: `dovetail.packed_size`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dovetail.chains.layer.coverage import coverage
from dovetail.chains.layer.linear import ChainLinear, chain_layers, packed_layers
from dovetail.errors import DovetailError
from dovetail.models.disk import Disk
from dovetail.models.targets import select


@dataclass(frozen=True)
class Footprint:
    """The size of a model.

    bits_per_weight       stored bits of the target layers' weights (codes, scales, zero points and masks, without
                          adapters and biases) over their number of weights
    nbytes                bytes of the whole model
    nonzero_fraction      of the target layers' base weights
    trainable_parameters  numbers that training changes
    target_fraction       weights of the target layers over all parameters of the model without adapters: what share of
                          the model bits_per_weight and nonzero_fraction describe; None in reports of earlier versions
    covered_fraction      parameters of the target layers, biases included, over all parameters of the model without
                          adapters; None in reports of earlier versions
    left_out              kind -> parameters outside the target layers (`dovetail.models.coverage`)
    """

    bits_per_weight: float
    nbytes: int
    nonzero_fraction: float
    trainable_parameters: int
    target_fraction: float | None = None
    covered_fraction: float | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def footprint(model: nn.Module, disk: Disk | None = None) -> Footprint:
    """Count a model, with or without a chain. The target layers are those under the chain, else `all-linear`.

    Raises DovetailError that names a target layer whose weights are NaN or infinite.
    """
    layers = chain_layers(model)
    if layers:
        weights = sum(layer.base.shape[0] * layer.base.shape[1] for layer in layers.values())
        stored = sum(weight_nbytes(layer) for layer in layers.values())
        nonzero = sum(_nonzero(name, layer.base.matrix(), disk) for name, layer in layers.items())
    else:
        parameters = {target.name: target.module.get_parameter("weight") for target in select(model)}
        weights = sum(p.numel() for p in parameters.values())
        stored = sum(p.nbytes for p in parameters.values())
        nonzero = sum(_nonzero(name, p, disk) for name, p in parameters.items())
    covered, left = coverage(model)
    return Footprint(
        bits_per_weight=8 * stored / weights,
        nbytes=stored_nbytes(model),
        nonzero_fraction=nonzero / weights,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        target_fraction=weights / count_weights(model),
        covered_fraction=covered,
        left_out=left,
    )


def _nonzero(name: str, weight: Tensor, disk: Disk | None) -> int:
    if disk is not None:
        disk.drop()
    if not bool(torch.isfinite(weight).all()):
        raise DovetailError(
            f"footprint at {name}",
            found="weights that are NaN or infinite",
            rule="the weights that are counted must be finite",
            fix="check the checkpoint, or the training that made these weights",
        )
    return int(torch.count_nonzero(weight))


def count_weights(model: nn.Module) -> int:
    """Count a model's parameters without adapters, shared ones once, and quantized weights one by one."""
    layers = {**packed_layers(model), **chain_layers(model)}.values()
    inside = {id(p) for layer in layers for part in (layer.base, layer.links) for p in part.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return rest + sum(layer.base.shape[0] * layer.base.shape[1] for layer in layers)


def weight_nbytes(layer: ChainLinear) -> int:
    """Return the bytes of one layer's stored base weight: codes and scales, or dense; and its mask."""
    return stored_nbytes(layer.base)


def stored_nbytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and persistent buffers, shared ones once."""
    tensors = module.state_dict(keep_vars=True).values()
    return sum(nbytes for _, nbytes in {(t.data_ptr() or id(t), t.nbytes) for t in tensors})
