"""Verification of an exported folder against the model that it was made from, with every runtime that is installed.

Three claims, each checked on its own:

    codes   the written tensors are those of the model's grid, and the format owner's decoder gives its values in
            float32
    values  the same decoder gives the model's values in the served dtype, and all other tensors are equal
    logits  transformers computes the same logits from the folder as from the same values in a stock checkpoint
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.export import RECORD, ExportRecord
from dovetail.checkpoint.export_tensors import folder_tensors, layers_for, other_tensors
from dovetail.checkpoint.exportable import FORMATS
from dovetail.checkpoint.formats.contract import WEIGHTS, Format
from dovetail.checkpoint.formats.gguf import checked_header
from dovetail.checkpoint.formats.gguf.blocks import GGUFBlocks
from dovetail.checkpoint.formats.gguf.names import read_bytes
from dovetail.checkpoint.formats.gguf.write import placed
from dovetail.checkpoint.load import load
from dovetail.errors import ExportError
from dovetail.files import read_json
from dovetail.models.dtypes import FLOATS
from dovetail.models.layouts import LinearLayout

Outcome = Literal["holds", "fails", "not claimed", "not checked"]


@dataclass(frozen=True)
class Claim:
    """One of the three claims about a folder.

    name     "codes", "values" or "logits"
    outcome  "fails" where the export claimed it; "not claimed": it does not hold and nobody said so
    detail   the numbers, or why it was not checked
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """What was found of an exported folder.

    dtype    that it is served in
    decoder  the function that read every tensor
    """

    folder: str
    against: str
    format: str
    dtype: str
    decoder: str
    claims: list[Claim]

    @property
    def holds(self) -> bool:
        return all(claim.outcome != "fails" for claim in self.claims)


@dataclass(frozen=True)
class _Written:
    """What is on disk, in a folder or in a GGUF file.

    layer      path of a layer -> its tensors, by name as the format's `encode` returns them
    apart      names of the other tensors that are not the model's
    folder     that transformers loads, with `arguments`; None where it does not
    """

    layer: Callable[[str], Mapping[str, Tensor]]
    apart: list[str]
    folder: Path
    arguments: dict[str, Any] | None


@torch.no_grad()
def verify(folder: str | Path, against: str | Path | PreTrainedModel, *, requantize: str | None = None) -> VerifyReport:
    """Check the three claims about a folder, or a GGUF file, that `dovetail.export` wrote.

    against     the model that was exported: in memory, or the folder of a run, of a packed or of a merged model
    requantize  the quantizer that a GGUF file was exported with; a folder says its own. The claims are then about the
                values that were made
    errors    LoadError for a folder that `export` did not write; ExportError where the model does not fit the format
    """
    path = Path(folder).absolute()
    record = _record(path)
    form, served = FORMATS[record.format], FLOATS[record.dtype]
    form.check_package()
    model = against if isinstance(against, PreTrainedModel) else _loaded(Path(against), isinstance(form, GGUFBlocks))
    layers, _, anew = layers_for(form, model, served, record.requantize or requantize)
    if isinstance(form, GGUFBlocks):
        written = _in_file(form, path, model, layers)
    else:
        others, expected = form.others(path, layers), folder_tensors(model, served)
        apart = [name for name in others.keys() | expected if not _equal_one(others.get(name), expected.get(name))]
        written = _Written(partial(form.written, path), sorted(apart), path, form.stock_arguments(layers))
    codes, values = _decoded(form, written, layers, served, record.claim)
    if anew:
        codes = replace(codes, detail=f"{codes.detail}; {len(anew)} layers were quantized anew")
    logits = _logits(form, written, model, layers, served, values.outcome == "holds")
    source = type(model).__name__ if isinstance(against, PreTrainedModel) else str(against)
    return VerifyReport(str(path), source, form.name, record.dtype, form.decoder, [codes, values, logits])


def _record(path: Path) -> ExportRecord:
    """Return what an export said of its folder; of a GGUF file, what it says of all of them."""
    if path.is_file():
        form = GGUFBlocks()
        return ExportRecord(
            format=form.name, dtype=form.dtypes[0], decoder=form.decoder, claim="values", weights=0, differing=0
        )
    rule, fix = "the folder must contain what dovetail export wrote", "export the model again"
    record = read_json(path / RECORD, ExportRecord, rule=rule, fix=fix)
    if record.format not in FORMATS or record.dtype not in FORMATS[record.format].dtypes:
        raise ExportError(f"verify {path}", found=f"{record.format}, {record.dtype}"[:200], rule=rule, fix=fix)
    return record


def _loaded(path: Path, packed: bool) -> PreTrainedModel:
    """Return the model of a folder; of a run, the one that it was exported from."""
    part = "packed" if packed and (path / "packed").is_dir() else "model"
    model, _ = load(path / part if (path / "report.json").is_file() else path)
    return model


def _in_file(form: GGUFBlocks, path: Path, model: PreTrainedModel, layers: Mapping[str, QuantizedWeight]) -> _Written:
    header = checked_header(path)
    places = placed(form, header, model, layers)

    def layer(name: str) -> dict[str, Tensor]:
        place, kind = places.layers[name], form.form(name, layers[name])
        if header.types[place.name] != kind.number:
            return {}
        o = layers[name].shape[0]
        rows = torch.from_numpy(read_bytes(header, place.name, range(place.first, place.first + o))).view(o, -1)
        return {"weight": rows if place.rows is None else rows[place.rows]}

    apart = []
    try:
        places.check_others(form, other_tensors(model, None))
    except ExportError as error:
        apart.append(f"{error.where.rpartition(' ')[2]}: {error.found}")
    return _Written(layer, apart, path.parent, {"gguf_file": path.name})


def _decoded(
    form: Format, written: _Written, layers: Mapping[str, QuantizedWeight], served: torch.dtype, claimed: str
) -> tuple[Claim, Claim]:
    """Return the claims about codes and values, layer by layer."""
    weights, wrong, differing, changed = 0, 0, 0, []
    for name, quantized in layers.items():
        count = quantized.shape[0] * quantized.shape[1]
        weights += count
        tensors, expected = written.layer(name), form.encode(quantized, served)
        if not _equal(tensors, expected):
            changed.append(name)
        if not _same_form(tensors, expected):
            wrong, differing = wrong + count, differing + count
            continue
        wrong += _unequal(form, tensors, quantized, torch.float32)
        differing += _unequal(form, tensors, quantized, served)
    shown = str(served).removeprefix("torch.")
    said = f"{weights - wrong:,} of {weights:,} weights equal in float32, {len(layers)} layers"
    said += f"; {len(changed)} have other bytes, first {changed[0]}" if changed else ""
    codes = Claim("codes", "fails" if wrong or changed else "holds", said)
    said = f"{weights - differing:,} of {weights:,} weights equal in {shown}"
    said += f"; other tensors differ, first {written.apart[0]}" if written.apart else ", and all other tensors"
    outcome: Outcome = "holds"
    if differing or written.apart:
        outcome = "not claimed" if claimed == "codes" and not written.apart and not wrong else "fails"
    return codes, Claim("values", outcome, said)


def _unequal(form: Format, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> int:
    values = form.decode(tensors, quantized, dtype)
    return values.numel() - int((values == quantized.dequantize(torch.empty_like(values))).sum())


def _same_form(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Return whether names, shapes and dtypes are as expected, so that the decoder can be run."""
    if tensors.keys() != expected.keys():
        return False
    return all((t.shape, t.dtype) == (expected[key].shape, expected[key].dtype) for key, t in tensors.items())


def _equal(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return _same_form(tensors, expected) and all(_equal_one(t, expected[key]) for key, t in tensors.items())


def _equal_one(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors have the same bytes."""
    if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = (t.contiguous().view(-1).view(torch.uint8) if t.numel() else t for t in (one, other))
    return torch.equal(first, second)


def _logits(
    form: Format,
    written: _Written,
    model: PreTrainedModel,
    layers: Mapping[str, QuantizedWeight],
    served: torch.dtype,
    same_values: bool,
) -> Claim:
    """Return the claim about logits: transformers on the folder beside transformers on a stock checkpoint."""
    if written.arguments is None:
        return Claim("logits", "not checked", f"transformers does not load {form.name} here")
    if model.main_input_name != "input_ids":
        return Claim("logits", "not checked", f"the model reads {model.main_input_name}")
    if any(not isinstance(layer.layout, LinearLayout) for layer in chain_layers(model).values()):
        return Claim("logits", "not checked", "the model has transposed weights")
    auto: Any = type(model)
    with tempfile.TemporaryDirectory() as scratch:
        dense = {f"{name}.weight": q.dequantize(torch.empty(q.shape, dtype=served)) for name, q in layers.items()}
        save_file(folder_tensors(model, served) | dense, Path(scratch) / WEIGHTS, {"format": "pt"})
        config: Any = type(model.config).from_dict(model.config.to_dict())
        config.dtype, config.architectures = served, [auto.__name__]
        for key in ("quantization_config", "dovetail"):
            vars(config).pop(key, None)
        config.save_pretrained(scratch)
        expected = _answer(auto.from_pretrained(scratch, dtype=served))
    try:
        found = _answer(auto.from_pretrained(written.folder, dtype=served, **written.arguments))
    except (AttributeError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Claim("logits", "fails", f"transformers does not run the folder: {said}")
    if not bool(expected.isfinite().all()):
        return Claim("logits", "not checked", f"the logits of the same values are not finite in {served}")
    if wrong := found.numel() - int(found.isfinite().sum()):
        return Claim("logits", "fails", f"{wrong:,} of {found.numel():,} are not finite in transformers")
    largest, span = float((found - expected).abs().max()), float(expected.max() - expected.min())
    if not largest:
        return Claim("logits", "holds", f"equal in transformers, {expected.numel():,} numbers")
    outcome: Outcome = "fails" if same_values and form.dense else "not claimed"
    return Claim("logits", outcome, f"differ by up to {largest:.2g} of a span of {span:.2g} in transformers")


def _answer(model: PreTrainedModel) -> Tensor:
    """Return the logits, float32, of 2 x 16 tokens drawn from a seed."""
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    ids_bt = torch.randint(0, vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids_bt, "attention_mask": torch.ones_like(ids_bt)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_bt
    return model.eval()(**inputs).logits.float()
