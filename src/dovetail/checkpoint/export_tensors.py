"""Tensors of an exported model: its quantized layers, which the format's own decoder reads back, and all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.held import grids
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.checkpoint.exportable import kind_in, no_grid
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.packed import stored
from dovetail.checkpoint.requantize import Requantized, requantized, requantizer
from dovetail.errors import ExportError
from dovetail.models.layouts import layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantized_layers(form: Format, model: PreTrainedModel) -> tuple[dict[str, QuantizedWeight], list[str]]:
    """Return the quantized layers of a merged model by path, and the paths of its other linear layers.

    Raises ExportError for a model that is not merged or has no grid, and for layers that the format does not hold.
    """
    layers, outside, _ = layers_for(form, model, torch.float32, None)
    return layers, outside


def layers_for(
    form: Format, model: PreTrainedModel, served: torch.dtype, requantize: str | None
) -> tuple[dict[str, QuantizedWeight], list[str], dict[str, Requantized]]:
    """Return the same as `quantized_layers`, and the layers that were quantized anew because they did not fit.

    requantize  as for `export`
    """
    link = None if requantize is None else requantizer(requantize)
    where = f"export to {form.name}"
    found, packed = {}, chain_layers(model)
    if any(layer.record is not None for layer in packed.values()):
        rule, fix = "the chain must be merged first", "call dovetail.merge(model, packed=True)"
        raise ExportError(where, found="a chain that is not merged", rule=rule, fix=fix)
    for name, layer in packed.items():
        if layer.base.quantized is not None:
            found[name] = (layer.base.quantized, layer.layout)
    for name, grid in grids(model).items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            rule, fix = "experts that share one tensor have no layer of their own there", "exclude them from targets"
            raise ExportError(f"{where}: {name}", found="a layer in a fused module", rule=rule, fix=fix) from None
        layout = layout_of(name, module)
        found[name] = (grid.encode(name, layout.matrix(module.get_parameter("weight").detach())), layout)
    if not found:
        raise no_grid(where)
    layers, anew = {}, {}
    for name, (quantized, layout) in found.items():
        try:
            kind_in(form, name, quantized, layout)
            if link is not None:
                form.encode(quantized, served)  # raises where the values do not fit
            layers[name] = quantized
        except ExportError:
            if link is None:
                raise
            anew[name] = requantized(f"export to {form.name}: {name}", quantized, link)
            layers[name] = anew[name].quantized
            kind_in(form, name, layers[name], layout)
    linear = (nn.Linear, ChainLinear)
    outside = [name for name, m in model.named_modules() if isinstance(m, linear) and name not in layers]
    return layers, outside, anew


def proved(form: Format, name: str, quantized: QuantizedWeight, served: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a layer, decoded by the owner as ours, and the number of values that differ when served."""
    encoded = form.encode(quantized, served)
    wide = form.decode(encoded, quantized, torch.float32)
    wrong = wide.numel() - int((wide == quantized.dequantize(torch.empty_like(wide))).sum())
    if wrong:
        raise ExportError(
            f"export to {form.name}: {name}",
            found=f"{wrong:,} of {wide.numel():,} weights that {form.decoder} decodes to other values",
            rule="the format's own decoder must give the same values",
            fix="report it, with the versions of dovetail and of the format's package",
        )
    values = form.decode(encoded, quantized, served)
    _check_finite(f"export to {form.name}", name, values, served)
    differing = values.numel() - int((values == quantized.dequantize(torch.empty_like(values))).sum())
    return encoded, differing


def other_tensors(
    model: PreTrainedModel, layers: Mapping[str, QuantizedWeight], served: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the tensors that are not quantized, by name, in the served dtype or as they are; tied ones once."""

    def found() -> Iterator[tuple[str, Tensor]]:
        for names, tensor in stored(model):
            owner, _, leaf = names[0].rpartition(".")
            layer, _, part = names[0].partition(".base.")
            if (layer in layers and part) or (owner in layers and leaf == "weight"):
                continue
            name = f"{layer}.weight" if part == "dense" else names[0]
            detached = tensor.detach().cpu()
            if served is not None and detached.is_floating_point() and detached.dtype != served:
                narrow = detached.to(served)
                if bool(detached.isfinite().all()):
                    _check_finite("export", name, narrow, served)
                detached = narrow
            yield name, detached

    return dict(found())


def _check_finite(to: str, name: str, values: Tensor, served: torch.dtype) -> None:
    """Raise ExportError for values that are too large for the served dtype."""
    if over := values.numel() - int(values.isfinite().sum()):
        shown = str(served).removeprefix("torch.")
        rule, fix = f"values must be finite in {shown}", "pass another dtype, such as bfloat16 or float32"
        raise ExportError(f"{to}: {name}", found=f"{over:,} of {values.numel():,} values", rule=rule, fix=fix)
