"""Formats of export, and what is refused before anything is written: formats, engines, dtypes and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.checkpoint.formats.awq import AWQ
from dovetail.checkpoint.formats.bitsandbytes import BitsAndBytes
from dovetail.checkpoint.formats.compressed_tensors import CompressedTensors
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.formats.engines import check_engine
from dovetail.checkpoint.formats.gguf.blocks import GGUFBlocks
from dovetail.checkpoint.formats.gguf.new import NewFile
from dovetail.checkpoint.formats.gptq import GPTQFormat
from dovetail.checkpoint.formats.mlx import MLX
from dovetail.checkpoint.formats.peft.plain_lora import check_plain_lora
from dovetail.checkpoint.formats.peft.write import kind_of
from dovetail.checkpoint.published import Part, published_parts
from dovetail.errors import ChainError, DovetailError, ExportError
from dovetail.links.quantize.ggml import BlockWeight
from dovetail.models.dtypes import FLOATS
from dovetail.models.experts import Experts, expert_layers
from dovetail.models.layouts import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = GGUFBlocks()
_FORMATS = (CompressedTensors(), BitsAndBytes(), GPTQFormat(1), GPTQFormat(2), AWQ(), MLX(), GGUF)
FORMATS: Mapping[str, Format] = {each.name: each for each in _FORMATS}
ADAPTER = "peft"
"""The format of an adapter beside its base; the others hold whole models."""


def check_format(name: str) -> None:
    """Raise ExportError for a name that is no format."""
    if name not in FORMATS and name != ADAPTER:
        rule = f"formats: {', '.join([*FORMATS, ADAPTER])}"
        raise ExportError(f"export to {name[:100]}", found="an unknown format", rule=rule, fix="use one of them")


def check_export(
    model: PreTrainedModel,
    to: str,
    *,
    tokenizer: Callable[[], PreTrainedTokenizerBase | None],
    dtype: str | None,
    engine: str | None,
    like: str | Path | None,
) -> None:
    """Raise ExportError or ChainError where an export after training would be refused for what is known before it.

    model      under the last stage of its chain; its values are not read
    tokenizer  loads it, where a GGUF file of its own is to be written
    dtype      that it is to be served in; None: the model's own
    like       for "gguf", as for `export`
    """
    check_format(to)
    check_engine(engine, to)
    layers = chain_layers(model)
    if to == ADAPTER:
        adapter_kinds(model, engine)
        return
    FORMATS[to].check_package()
    if to == GGUF.name:
        if gguf_source(model, like, (layer.base.quantized for layer in layers.values())) is None:
            NewFile.of(model, tokenizer())
    else:
        served_dtype(FORMATS[to], next(iter(layers.values())).base.dtype if dtype is None else dtype)
    for name, layer in layers.items():
        _kind_of_layer(FORMATS[to], name, layer)
    _check_experts(FORMATS[to], model, {name: layer.base.quantized for name, layer in layers.items()})


def fits(to: str, model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """Return how a format takes the layers of a model under a chain, whose values are not read.

    returns  kind in the format -> number of layers; and for the layers that do not fit, a text for each quantizer
    errors   ExportError for an unknown format
    """
    check_format(to)
    layers = chain_layers(model)
    kinds: Counter[str] = Counter()
    refused: dict[str, DovetailError] = {}
    if to == ADAPTER:
        try:
            kinds.update(adapter_kinds(model, None).values())
        except ChainError as error:
            refused[""] = error
        layers = {}
    for name, layer in layers.items():
        try:
            kinds[_kind_of_layer(FORMATS[to], name, layer)] += 1
        except ExportError as error:
            refused.setdefault("" if layer.base.quantized is None else layer.base.quantized.identity, error)
    if layers and not refused:
        try:
            _check_experts(FORMATS[to], model, {name: layer.base.quantized for name, layer in layers.items()})
        except ExportError as error:
            own = layers.keys() - expert_layers(model).keys()
            kinds, refused[""] = Counter(_kind_of_layer(FORMATS[to], name, layers[name]) for name in own), error
    return dict(kinds), [f"{error.where}: {error.found}: {error.rule}. Fix: {error.fix}" for error in refused.values()]


def served_dtype(form: Format, dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype that a model is served in. Raises ExportError for one that the format does not have."""
    name = str(dtype).removeprefix("torch.")
    if name not in form.dtypes:
        rule, fix = f"{form.name} is served in one of " + ", ".join(form.dtypes), f"pass dtype={form.dtypes[0]}"
        raise ExportError(f"export to {form.name}", found=f"dtype={name[:60]}", rule=rule, fix=fix)
    return FLOATS[name]


def gguf_source(
    model: PreTrainedModel, like: str | Path | None, layers: Iterable[QuantizedWeight | None]
) -> Path | None:
    """Return the GGUF file that another one is written like; None: a file of its own.

    Raises ExportError where the file is not there.
    """
    note = getattr(model.config, "dovetail", None)
    if like is None and not any(isinstance(each, BlockWeight) for each in layers):
        return None
    source = like or (note.get("source") if isinstance(note, dict) else None)
    if source is None or not Path(source).is_file():
        found = "no GGUF file to be like" if source is None else f"no file {source}"
        rule = "the metadata, the tokenizer and the tensors that are not quantized are copied from a file of the model"
        fix = "name one with --like FILE (like=), such as the one whose grid the model keeps"
        raise ExportError(f"export to {GGUF.name}", found=found, rule=rule, fix=fix)
    return Path(source)


def adapter_kinds(model: nn.Module, engine: str | None) -> dict[str, str]:
    """Return what the adapter of each layer becomes. Raises ChainError where peft, or vLLM, does not read it."""
    if engine == "vllm":
        return {name: f"lora, rank {len(a_ri)}" for name, (a_ri, _) in check_plain_lora(model).items()}
    record = applied(model)
    return dict.fromkeys(record.layers, f"peft's {kind_of(record).name}")


def _kind_of_layer(form: Format, name: str, layer: ChainLinear) -> str:
    if layer.base.quantized is None:
        raise no_grid(f"export to {form.name}: {name}")
    return kind_in(form, name, layer.base.quantized, layer.layout)


def kind_in(form: Format, name: str, quantized: QuantizedWeight, layout: Layout) -> str:
    """Return what a format calls a quantized layer. Raises ExportError for a layer that it does not hold."""
    if not isinstance(layout, form.layouts):
        raise form.refused(name, quantized, "the format holds layers of nn.Linear", "exclude the layer from targets")
    return form.kind(name, quantized)


def no_grid(where: str) -> ExportError:
    """Return the error of a model, or a layer, without a grid."""
    rule = "the layers must be on a grid that a chain put them on"
    fix = "use a chain with a quantizer, such as int(bits=4, group=32, symmetric=signed, scale_bits=4)"
    return ExportError(where, found="no quantized layer", rule=rule, fix=fix)


def _check_experts(form: Format, model: nn.Module, found: Mapping[str, QuantizedWeight | None]) -> None:
    """Raise ExportError where the format does not hold the MoE experts of a model under a chain, by their grids."""
    if not any(isinstance(module, Experts) for module in model.modules()):
        return
    parts = published_parts(model)
    grids_found = {name: quantized for name, part in parts.items() if (quantized := found[part.layer]) is not None}
    check_modules(form, parts, grids_found)


def check_modules(form: Format, parts: Mapping[str, Part], layers: Mapping[str, QuantizedWeight]) -> None:
    """Raise ExportError where the format does not hold the grids that the experts of a module have together."""
    modules: dict[str, list[QuantizedWeight]] = {}
    for name, part in parts.items():
        if part.experts is not None:
            modules.setdefault(part.experts, []).append(layers[name])
    for path, held in modules.items():
        form.check_experts(path, held)
