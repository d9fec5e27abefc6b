"""Export of a merged model in the format in which it is served: the same codes and scales, or a refusal.

Nothing is quantized anew unless `requantize` asks for it. Each tensor that is written is decoded by the format owner's
own code (for GPTQ and AWQ where gptqmodel is installed, else by Dovetail, as the report says) and compared with
`QuantizedWeight.dequantize`: in float32 they must be equal, which says that codes and scales are the same; in the dtype
that is served, the weights that differ are counted.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.held import grids
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.checkpoint.formats.awq import AWQ
from dovetail.checkpoint.formats.bitsandbytes import BitsAndBytes
from dovetail.checkpoint.formats.compressed_tensors import CompressedTensors
from dovetail.checkpoint.formats.contract import WEIGHTS, Format
from dovetail.checkpoint.formats.engines import LORA_RANKS, check_engine, command_line
from dovetail.checkpoint.formats.gguf import checked_header
from dovetail.checkpoint.formats.gguf.blocks import GGUFBlocks
from dovetail.checkpoint.formats.gguf.convert import converted
from dovetail.checkpoint.formats.gguf.new import NewFile
from dovetail.checkpoint.formats.gguf.write import placed
from dovetail.checkpoint.formats.gptq import GPTQFormat
from dovetail.checkpoint.formats.mlx import MLX
from dovetail.checkpoint.formats.peft.plain_lora import check_plain_lora, export_plain_lora
from dovetail.checkpoint.formats.peft.write import export_peft, kind_of
from dovetail.checkpoint.load import load
from dovetail.checkpoint.packed import stored
from dovetail.checkpoint.requantize import Requantized, relative_error, requantized, requantizer
from dovetail.errors import ChainError, DovetailError, ExportError
from dovetail.files import atomic, check_file, check_folder, write_bytes
from dovetail.links.quantize.ggml import BlockWeight
from dovetail.models.dtypes import FLOATS
from dovetail.models.layouts import Layout, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GGUF = GGUFBlocks()
_FORMATS = (CompressedTensors(), BitsAndBytes(), GPTQFormat(1), GPTQFormat(2), AWQ(), MLX(), _GGUF)
FORMATS: Mapping[str, Format] = {each.name: each for each in _FORMATS}
ADAPTER = "peft"
"""The format of an adapter beside its base; the others hold whole models."""


CARD = "README.md"
RECORD = "dovetail_export.json"
"""The file in an exported folder that says what it is."""


class ExportRecord(pydantic.BaseModel, extra="forbid"):
    """What RECORD holds: fields of ExportReport, without paths."""

    format: str
    dtype: str
    decoder: str
    claim: Literal["values", "codes"]
    weights: int
    differing: int
    requantize: str | None = None


@dataclass(frozen=True)
class ExportedLayer:
    """A layer in the other format.

    quantizer  the grid, with all arguments
    kind       what the format calls it
    weights    number of weights that were compared
    differing  those that the owner's decoder makes others of in the served dtype
    error      relative error of a layer that was quantized anew, ‖new - old‖ / ‖old‖; None: it keeps its codes
    """

    quantizer: str
    kind: str
    weights: int
    differing: int
    error: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    dtype       that the model is served in
    decoder     the function that read every tensor, of the format's owner where it is installed
    claim       "values": same values in `dtype`; "codes": same codes and scales, `differing` values in `dtype`;
                "adapter": the same change of the weights; "fits" of a dry run, in which nothing was compared
    weights, differing   over all quantized layers
    nbytes      of the files with weights
    notes       what a reader must know
    error       relative error of the layers that were quantized anew, together; None: there are none. `claim` is then
                about the values that were made
    """

    format: str
    output: str
    dtype: str
    decoder: str
    claim: str
    layers: dict[str, ExportedLayer]
    weights: int
    differing: int
    nbytes: int
    notes: list[str] = field(default_factory=list)
    error: float | None = None


def check_format(name: str) -> None:
    """Raise ExportError for a name that is no format."""
    if name not in FORMATS and name != ADAPTER:
        rule = f"formats: {', '.join([*FORMATS, ADAPTER])}"
        raise ExportError(f"export to {name[:100]}", found="an unknown format", rule=rule, fix="use one of them")


@torch.no_grad()
def export(
    model: str | Path | PreTrainedModel,
    to: str,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    engine: str | None = None,
    like: str | Path | None = None,
    llama_cpp: str | Path | None = None,
    requantize: str | None = None,
    dry_run: bool = False,
) -> ExportReport:
    """Write a merged model, or an adapter, in another format, in a new or empty folder, atomically.

    model      merged with `dovetail.merge`, packed or stock; or the folder of a run, of a packed or of a merged model;
               for "peft" a model under a chain
    to         a key of FORMATS: "compressed-tensors", "bitsandbytes", "gptq", "gptq_v2", "awq", "mlx" or "gguf"; or
               "peft"
    output     the folder; for "gguf" the file
    tokenizer  saved beside it; of a folder, its own
    dtype      that the model is served in; None: the model's own
    engine     "vllm", "transformers", "ollama" or "openvino": refuse what it does not read; None: any
    like       for "gguf" a file of the same model, whose metadata, tokenizer and other tensors are copied; None: the
               file whose grid the model keeps (`load(..., grid="keep")`), or for other models a file of its own, which
               `dovetail.checkpoint.formats.gguf.families` describes
    llama_cpp  for "gguf" without `like`: a checkout of llama.cpp, whose `convert_hf_to_gguf.py` is run to make the file
               to be like; for families that Dovetail does not describe
    requantize a quantizer for the layers whose grid the format does not hold; their codes change, and the report has
               the error of each and of all. None: such a layer is refused
    dry_run    only check whether all layers fit; nothing is written
    errors     ExportError naming the layer, the reason and a quantizer to use instead, before anything is written
    """
    folder = Path(output).absolute()
    check_format(to)
    check_engine(engine, to)
    if not dry_run:
        (check_file if to == _GGUF.name else check_folder)(folder)
    if to == ADAPTER:
        return _export_adapter(model, folder, engine, dry_run)
    form = FORMATS[to]
    form.check_package()
    if not isinstance(model, nn.Module):
        path = Path(model)
        run = (path / "report.json").is_file()
        # A packed model has its codes; a stock one's are those nearest to its values.
        kept = "packed" if to == _GGUF.name and (path / "packed").is_dir() else "model"
        model, tokenizer = load(path / kept if run else model)
    if form is _GGUF and llama_cpp is not None and like is None:
        layers, _, _ = layers_for(form, model, torch.float32, requantize)
        with tempfile.TemporaryDirectory() as scratch:
            others = other_tensors(model, layers, None)
            like = converted(Path(llama_cpp), Path(scratch), model, tokenizer, layers, others)
            return _export_gguf(model, tokenizer, folder, engine, like, requantize, dry_run)
    if form is _GGUF:
        return _export_gguf(model, tokenizer, folder, engine, like, requantize, dry_run)
    served = _served(form, model.dtype if dtype is None else dtype)
    layers, outside, anew = layers_for(form, model, served, requantize)
    kinds = {name: form.kind(name, quantized) for name, quantized in layers.items()}
    said = _said(form, layers, anew)
    shown = str(served).removeprefix("torch.")
    notes = [*form.notes(layers, served), *_anew_notes(anew), *command_line(engine, str(folder), shown)]
    error = relative_error(anew.values()) if anew else None
    weights = sum(each.weights for each in said.values())
    if dry_run:
        return ExportReport(to, str(folder), shown, form.decoder, "fits", said, weights, 0, 0, notes, error)
    tensors = other_tensors(model, layers, served)
    for name, quantized in layers.items():
        encoded, differing = proved(form, name, quantized, served)
        said[name] = replace(said[name], differing=differing)
        tensors |= {f"{name}.{part}": tensor for part, tensor in encoded.items()}
    differing = sum(each.differing for each in said.values())
    if differing:
        notes.append(
            f"{differing:,} of {weights:,} values differ in {shown}, where scales are rounded: "
            "use scale_bits=4, or serve in float32"
        )
    claim = "codes" if differing else "values"
    record = ExportRecord(
        format=to, dtype=shown, decoder=form.decoder, claim=claim, weights=weights, differing=differing,
        requantize=requantize if anew else None,
    )  # fmt: skip
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = served, [type(model).__name__]
    vars(config).update(form.config(layers, outside, served))
    vars(config).pop("dovetail", None)
    with atomic(folder) as part:
        part.mkdir(parents=True)
        save_file({k: t.contiguous().clone() for k, t in tensors.items()}, part / WEIGHTS, {"format": "pt"})
        nbytes = (part / WEIGHTS).stat().st_size
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if model.can_generate():
            model.generation_config.save_pretrained(part)
        config.save_pretrained(part)
        write_bytes(part / RECORD, record.model_dump_json(indent=2) + "\n")
        write_bytes(part / CARD, _card(record, kinds.values(), anew))
    return ExportReport(to, str(folder), shown, form.decoder, claim, said, weights, differing, nbytes, notes, error)


def _said(
    form: Format, layers: Mapping[str, QuantizedWeight], anew: Mapping[str, Requantized]
) -> dict[str, ExportedLayer]:
    """Return what the report says of each layer, before values in the served dtype are compared."""
    errors = {name: relative_error([each]) for name, each in anew.items()}
    return {
        name: ExportedLayer(q.identity, form.kind(name, q), math.prod(q.shape), 0, errors.get(name))
        for name, q in layers.items()
    }


def _anew_notes(anew: Mapping[str, Requantized]) -> list[str]:
    if not anew:
        return []
    worst = max(anew, key=lambda name: relative_error([anew[name]]))
    return [
        f"{len(anew)} layers were quantized anew: relative error {relative_error(anew.values()):.2%}, "
        f"largest {relative_error([anew[worst]]):.2%} in {worst}"
    ]


def _card(record: ExportRecord, kinds: Iterable[str], anew: Mapping[str, Requantized]) -> str:
    """Return the model card, README.md: the layers and the three claims, as Markdown."""
    counts = "\n".join(f"- {count} layers: {kind}" for kind, count in Counter(kinds).items())
    equal = "all equal" if record.claim == "values" else f"{record.differing:,} differ"
    said = "; ".join(_anew_notes(anew)) or "nothing was quantized anew"
    return f"""---
library_name: transformers
tags: [{record.format}, dovetail]
---

# Served as {record.format} in {record.dtype}

Written by Dovetail with the codes and scales of the model that it was made from; {said}.

{counts}

| claim | result |
|---|---|
| same codes and scales | {record.weights:,} weights equal in float32 |
| same values in {record.dtype} | {equal} |
| same logits | depends on the engine; `dovetail verify` measures it in transformers |

Decoder: {record.decoder}. Check it: `dovetail verify FOLDER --against MODEL`.
"""


def _export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: Path,
    engine: str | None,
    like: str | Path | None,
    requantize: str | None,
    dry_run: bool,
) -> ExportReport:
    """Write a GGUF file, like another one or of its own."""
    form, where = _GGUF, f"export to {_GGUF.name}"
    layers, _, anew = layers_for(form, model, torch.float32, requantize)
    said, error = _said(form, layers, anew), relative_error(anew.values()) if anew else None
    weights = sum(each.weights for each in said.values())
    notes = form.notes(layers, torch.float32) + _anew_notes(anew)
    source, others = _source(model, like, layers.values()), other_tensors(model, layers, None)
    if source is None:
        file = NewFile.of(model, tokenizer)
        notes += file.notes()
    else:
        if path.exists() and path.samefile(source):
            rule, fix = "the file that is copied must not be overwritten", "choose another --output"
            raise ExportError(where, found=f"{path} as output and source", rule=rule, fix=fix)
        file = placed(form, checked_header(source), model, layers)
        file.check_others(form, others)
    if dry_run:
        return ExportReport(form.name, str(path), "float32", form.decoder, "fits", said, weights, 0, 0, notes, error)

    def encode(name: str, quantized: QuantizedWeight) -> Tensor:
        return proved(form, name, quantized, torch.float32)[0]["weight"]

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        if isinstance(file, NewFile):
            file.write(part, layers, others, form, encode)
        else:
            written = file.write(part, layers, form, encode)
            only = "; only codes differ" if written.codes_only and written.changed else ""
            notes += [f"{written.changed} of {len(file.header.shapes)} tensors differ from {source}{only}"]
        nbytes = part.stat().st_size
    notes += [f"start it: {line}" for line in _runs(engine, path)]
    return ExportReport(form.name, str(path), "float32", form.decoder, "values", said, weights, 0, nbytes, notes, error)


def _source(model: PreTrainedModel, like: str | Path | None, layers: Iterable[QuantizedWeight | None]) -> Path | None:
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
        raise ExportError(f"export to {_GGUF.name}", found=found, rule=rule, fix=fix)
    return Path(source)


def _runs(engine: str | None, path: Path) -> list[str]:
    if engine == "ollama":
        return [f'write "FROM {path}" into a file Modelfile, then ollama create NAME -f Modelfile']
    return [f"llama-cli -m {path}"] if engine is None else []


def _export_adapter(
    model: str | Path | PreTrainedModel, folder: Path, engine: str | None, dry_run: bool
) -> ExportReport:
    """Write the adapter of a model's current stage for peft; for vLLM as plain LoRA."""
    where = f"export to {ADAPTER}"
    if not isinstance(model, nn.Module):
        rule, fix = "an adapter is exported from a model under its chain", "use dovetail export, or load_adapter first"
        raise ExportError(where, found=f"the path {str(model)[:200]}", rule=rule, fix=fix)
    layers = chain_layers(model)
    if not layers or any(layer.record is None for layer in layers.values()):
        rule, fix = "the model must be under a chain that is not merged", "export the merged model to another format"
        raise ExportError(where, found="no adapter", rule=rule, fix=fix)
    kinds, notes, ranks = _adapter_kinds(model, engine), [], {}
    if engine == "vllm" and not dry_run:
        ranks = export_plain_lora(model, folder)
        rank = next(size for size in LORA_RANKS if size >= max(rank for rank, _ in ranks.values()))
        largest = max(difference for _, difference in ranks.values())
        notes.append(f"start it: vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}")
        notes.append(f"largest difference of a change, over its largest number: {largest:.1e}")
    elif not dry_run:
        export_peft(model, folder)
    if any(layer.base.quantized is not None or layer.base.mask_bits is not None for layer in layers.values()):
        notes.append("the adapter belongs to the base that the chain made (docs/peft.md), not to the original model")
    said = {
        name: ExportedLayer(layer.base.identity, kinds[name], layer.base.shape[0] * layer.base.shape[1], 0)
        for name, layer in layers.items()
    }
    dtype, claim = str(model.dtype).removeprefix("torch."), "fits" if dry_run else "adapter"
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if ranks:
        decoder, weights = "the definition of each link, in float64", sum(each.weights for each in said.values())
    else:
        decoder, weights = "none: the parameters are written as they are", 0
    return ExportReport(ADAPTER, str(folder), dtype, decoder, claim, said, weights, 0, nbytes, notes)


def _adapter_kinds(model: nn.Module, engine: str | None) -> dict[str, str]:
    """Return what the adapter of each layer becomes. Raises ChainError where peft, or vLLM, does not read it."""
    if engine == "vllm":
        return {name: f"lora, rank {len(a_ri)}" for name, (a_ri, _) in check_plain_lora(model).items()}
    record = applied(model)
    return dict.fromkeys(record.layers, f"peft's {kind_of(record).name}")


def _served(form: Format, dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype that a model is served in. Raises ExportError for one that the format does not have."""
    name = str(dtype).removeprefix("torch.")
    if name not in form.dtypes:
        rule, fix = f"{form.name} is served in one of " + ", ".join(form.dtypes), f"pass dtype={form.dtypes[0]}"
        raise ExportError(f"export to {form.name}", found=f"dtype={name[:60]}", rule=rule, fix=fix)
    return FLOATS[name]


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
        _adapter_kinds(model, engine)
        return
    FORMATS[to].check_package()
    if to == _GGUF.name:
        if _source(model, like, (layer.base.quantized for layer in layers.values())) is None:
            NewFile.of(model, tokenizer())
    else:
        _served(FORMATS[to], next(iter(layers.values())).base.dtype if dtype is None else dtype)
    for name, layer in layers.items():
        _kind_of_layer(FORMATS[to], name, layer)


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
            kinds.update(_adapter_kinds(model, None).values())
        except ChainError as error:
            refused[""] = error
        layers = {}
    for name, layer in layers.items():
        try:
            kinds[_kind_of_layer(FORMATS[to], name, layer)] += 1
        except ExportError as error:
            refused.setdefault("" if layer.base.quantized is None else layer.base.quantized.identity, error)
    return dict(kinds), [f"{error.where}: {error.found}: {error.rule}. Fix: {error.fix}" for error in refused.values()]


def _kind_of_layer(form: Format, name: str, layer: ChainLinear) -> str:
    if layer.base.quantized is None:
        raise _no_grid(f"export to {form.name}: {name}")
    return _kind(form, name, layer.base.quantized, layer.layout)


def _kind(form: Format, name: str, quantized: QuantizedWeight, layout: Layout) -> str:
    if not isinstance(layout, form.layouts):
        raise form.refused(name, quantized, "the format holds layers of nn.Linear", "exclude the layer from targets")
    return form.kind(name, quantized)


def _no_grid(where: str) -> ExportError:
    rule = "the layers must be on a grid that a chain put them on"
    fix = "use a chain with a quantizer, such as int(bits=4, group=32, symmetric=signed, scale_bits=4)"
    return ExportError(where, found="no quantized layer", rule=rule, fix=fix)


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
        raise _no_grid(where)
    layers, anew = {}, {}
    for name, (quantized, layout) in found.items():
        try:
            _kind(form, name, quantized, layout)
            if link is not None:
                form.encode(quantized, served)  # raises where the values do not fit
            layers[name] = quantized
        except ExportError:
            if link is None:
                raise
            anew[name] = requantized(f"export to {form.name}: {name}", quantized, link)
            layers[name] = anew[name].quantized
            _kind(form, name, layers[name], layout)
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
