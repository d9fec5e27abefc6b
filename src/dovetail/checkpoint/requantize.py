"""Layers whose grid a format does not hold, quantized anew on request: the error is measured and reported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.chains.notation import chain
from dovetail.errors import ExportError


@dataclass(frozen=True)
class Requantized:
    """A layer on another grid, and how far its values moved, in float64.

    squared_error  sum over the weights of (new - old)²
    squared_norm   sum of old²
    """

    quantized: QuantizedWeight
    squared_error: float
    squared_norm: float


def requantizer(text: str) -> Quantizer:
    """Return the quantizer of a text such as "int(bits=8, group=32, symmetric=signed)".

    Raises ChainError for a text that is no chain, ExportError for one that is not a quantizer which needs no data.
    """
    links = list(chain(text))
    if len(links) == 1 and isinstance(link := links[0], Quantizer) and link.remade_without_data and not link.continues:
        return link
    rule = "requantize must be one quantizer that needs no calibration data"
    raise ExportError("export", found=f"requantize={text[:100]}", rule=rule, fix="use int, for example")


def requantized(where: str, quantized: QuantizedWeight, link: Quantizer) -> Requantized:
    """Return a layer's values on the grid of a quantizer.

    Raises ExportError where the layer has zeros that the grid would lose, and ChainError where it does not fit.
    """
    old = quantized.dequantize(torch.empty(quantized.shape, dtype=torch.float32))
    if not link.has_zero and bool((old == 0).any()):
        rule, fix = "zeros must stay zero", "use a quantizer that represents zero, such as int"
        raise ExportError(where, found=f"requantize={link}, and weights that are zero", rule=rule, fix=fix)
    made = link.quantize(old)
    new = made.dequantize(torch.empty_like(old))
    return Requantized(made, float((new.double() - old.double()).square().sum()), float(old.double().square().sum()))


def relative_error(layers: Iterable[Requantized]) -> float:
    """Return ‖new - old‖ / ‖old‖ (Frobenius) of layers together; 0 where all old values are 0."""
    found = list(layers)
    norm = sum(each.squared_norm for each in found)
    return math.sqrt(sum(each.squared_error for each in found) / norm) if norm else 0.0
