"""Weights of closed chains, kept between the forward and the backward pass and between the batches of a step.

A chain that ends in a constraint makes its weight in the forward pass and again in the backward pass, and saves
neither. Where memory is left for a copy of these weights, each is made once for an optimizer step, with the same bits
as results. Room for them is made once, and a weight is made again in the same place after its parameters have changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dovetail.chains.layer.linear import ChainLinear, chain_layers


def keeping_layers(model: nn.Module) -> list[ChainLinear]:
    """Return the layers whose weights can be kept."""
    return [layer for layer in chain_layers(model).values() if layer.keeps]


def kept_nbytes(model: nn.Module) -> int:
    """Return the bytes that keeping takes."""
    return sum(math.prod(layer.base.shape) * layer.base.dtype.itemsize for layer in keeping_layers(model))


@contextmanager
def keeping(model: nn.Module, asked: bool = True) -> Iterator[None]:
    """Keep the weights of closed chains while entered.

    A weight is made again when a parameter of its chain has another version, which every operation of torch in place
    changes; after changes that torch does not see (`parameter.data`, kernels of bitsandbytes), call `forget`.
    """
    layers = keeping_layers(model) if asked else []
    try:
        for layer in layers:
            layer.base.keep(True)
        yield
    finally:
        for layer in layers:
            layer.base.keep(False)


def forget(model: nn.Module) -> None:
    """Let all kept weights be made again where they are used next."""
    for layer in chain_layers(model).values():
        layer.base.forget()
