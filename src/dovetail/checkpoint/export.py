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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.export_tensors import folder_tensors, layers_for, other_tensors, proved
from dovetail.checkpoint.exportable import (
    ADAPTER,
    FORMATS,
    GGUF,
    adapter_kinds,
    check_format,
    gguf_source,
    served_dtype,
)
from dovetail.checkpoint.formats.contract import WEIGHTS, Format
from dovetail.checkpoint.formats.engines import LORA_RANKS, check_engine, command_line
from dovetail.checkpoint.formats.gguf import checked_header
from dovetail.checkpoint.formats.gguf.convert import converted
from dovetail.checkpoint.formats.gguf.new import NewFile
from dovetail.checkpoint.formats.gguf.write import placed
from dovetail.checkpoint.formats.peft.plain_lora import export_plain_lora
from dovetail.checkpoint.formats.peft.write import export_peft
from dovetail.checkpoint.load import load
from dovetail.checkpoint.requantize import Requantized, relative_error
from dovetail.errors import ExportError
from dovetail.files import atomic, check_file, check_folder, write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        (check_file if to == GGUF.name else check_folder)(folder)
    if to == ADAPTER:
        return _export_adapter(model, folder, engine, dry_run)
    form = FORMATS[to]
    form.check_package()
    if not isinstance(model, nn.Module):
        path = Path(model)
        run = (path / "report.json").is_file()
        # A packed model has its codes; a stock one's are those nearest to its values.
        kept = "packed" if to == GGUF.name and (path / "packed").is_dir() else "model"
        model, tokenizer = load(path / kept if run else model)
    if form is GGUF and llama_cpp is not None and like is None:
        layers, _, _ = layers_for(form, model, torch.float32, requantize)
        with tempfile.TemporaryDirectory() as scratch:
            others = folder_tensors(model, None)
            like = converted(Path(llama_cpp), Path(scratch), model, tokenizer, layers, others)
            return _export_gguf(model, tokenizer, folder, engine, like, requantize, dry_run)
    if form is GGUF:
        return _export_gguf(model, tokenizer, folder, engine, like, requantize, dry_run)
    served = served_dtype(form, model.dtype if dtype is None else dtype)
    layers, outside, anew = layers_for(form, model, served, requantize)
    kinds = {name: form.kind(name, quantized) for name, quantized in layers.items()}
    said = _said(form, layers, anew)
    shown = str(served).removeprefix("torch.")
    notes = [*form.notes(layers, served), *_anew_notes(anew), *command_line(engine, str(folder), shown)]
    error = relative_error(anew.values()) if anew else None
    weights = sum(each.weights for each in said.values())
    if dry_run:
        return ExportReport(to, str(folder), shown, form.decoder, "fits", said, weights, 0, 0, notes, error)
    tensors = folder_tensors(model, served)
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
    form, where = GGUF, f"export to {GGUF.name}"
    layers, _, anew = layers_for(form, model, torch.float32, requantize)
    said, error = _said(form, layers, anew), relative_error(anew.values()) if anew else None
    weights = sum(each.weights for each in said.values())
    notes = form.notes(layers, torch.float32) + _anew_notes(anew)
    source, others = gguf_source(model, like, layers.values()), other_tensors(model, None)
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
    kinds, notes, ranks = adapter_kinds(model, engine), [], {}
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
