"""Tensors of an exported model: its quantized layers, which the format's own decoder reads back, and all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.held import grids
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.checkpoint.exportable import check_modules, kind_in, no_grid
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.packed import stored
from dovetail.checkpoint.published import (
    Part,
    published,
    published_parts,
    published_paths,
    quantized_experts,
    quantized_paths,
    router_paths,
)
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
    experts = quantized_experts(model)
    for name, grid in grids(model).items():
        path, owned = name, model
        if (owner := name.rsplit(".", 2)[0]) in experts:
            path, owned = name.removeprefix(f"{owner}."), experts[owner]
        module = owned.get_submodule(path)
        layout = layout_of(name, module)
        found[name] = (grid.encode(name, layout.matrix(module.get_parameter("weight").detach())), layout)
    if not found:
        raise no_grid(where)
    layers, anew = {}, {}
    parts = published_parts(model)
    for name, part in parts.items():
        quantized, layout = found[part.layer]
        quantized = _cut(form, name, quantized, part)
        try:
            kind_in(form, name, quantized, layout)
            if part.experts is not None:
                form.check_experts(name, [quantized])
            if link is not None:
                form.encode(quantized, served)  # raises where the values do not fit
            layers[name] = quantized
        except ExportError:
            if link is None:
                raise
            anew[name] = requantized(f"export to {form.name}: {name}", quantized, link)
            layers[name] = anew[name].quantized
            kind_in(form, name, layers[name], layout)
    check_modules(form, parts, layers)
    linear = (nn.Linear, ChainLinear)
    outside = [name for name, m in model.named_modules() if isinstance(m, linear) and name not in found]
    if experts:
        outside = list(dict.fromkeys([*outside, *router_paths(model)]))
        # Engines look for the names of the checkpoint, and transformers for its own.
        outside = list(dict.fromkeys([*outside, *published_paths(model, outside)]))
    return layers, outside, anew


def _cut(form: Format, name: str, quantized: QuantizedWeight, part: Part) -> QuantizedWeight:
    """Return the rows of a layer that one of the checkpoint has. Raises ExportError for a grid without such rows."""
    o, i = quantized.shape
    start, stop = part.rows.start, part.rows.stop
    if (start, stop) == (0, o):
        return quantized
    try:
        if start * i % quantized.block == 0 and (stop * i % quantized.block == 0 or stop == o):
            return quantized.rows(start, stop)
    except NotImplementedError:
        pass
    rule = f"rows {start} to {stop} of the layer must be whole blocks of its grid"
    raise form.refused(name, quantized, rule, "use a group that divides the inputs of the layer")


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


def other_tensors(model: PreTrainedModel, served: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors that are not quantized, by name, in the served dtype or as they are; tied ones once."""
    layers = quantized_paths(model)
    fused = {name.rpartition(".")[0] for name in layers}

    def found() -> Iterator[tuple[str, Tensor]]:
        for names, tensor in stored(model):
            owner, _, leaf = names[0].rpartition(".")
            layer, _, part = names[0].partition(".base.")
            if (layer in layers and part) or (owner in layers and leaf == "weight") or names[0] in fused:
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


def folder_tensors(model: PreTrainedModel, served: torch.dtype | None) -> dict[str, Tensor]:
    """Return `other_tensors` as a folder has them: beside quantized MoE experts, by the names of the checkpoint."""
    found = other_tensors(model, served)
    return published(model, found) if quantized_experts(model) else found


def _check_finite(to: str, name: str, values: Tensor, served: torch.dtype) -> None:
    """Raise ExportError for values that are too large for the served dtype."""
    if over := values.numel() - int(values.isfinite().sum()):
        shown = str(served).removeprefix("torch.")
        rule, fix = f"values must be finite in {shown}", "pass another dtype, such as bfloat16 or float32"
        raise ExportError(f"{to}: {name}", found=f"{over:,} of {values.numel():,} values", rule=rule, fix=fix)
