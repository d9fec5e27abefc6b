"""GGUF files that are written: bytes that did not have to change do not, and the gguf package reads our values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import dovetail
from dovetail.chains.layer.held import grids
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.export import export
from dovetail.checkpoint.load import load
from dovetail.cli.main import app
from dovetail.errors import ExportError
from families import batch, logits, make, move

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from test_keep import CHAIN, KIND, MIXED, wide  # noqa: E402

from gguf_files import ARCHITECTURES, make_plain, write_gguf  # noqa: E402

torch.set_num_threads(1)

TABLE = {
    "int(bits=2, group=32)": "Q4_0",
    "int(bits=3, group=32, symmetric=true)": "Q4_0",
    "int(bits=3, group=64)": "Q4_0",
    "int(bits=4, group=32, symmetric=signed, scale_bits=4)": "Q4_0",
    "int(bits=4, group=0, symmetric=true)": "Q4_0",
    "int(bits=4, group=32, scale_bits=7)": "Q4_1",
    "gptq(bits=4, group=64, scale_bits=4)": "Q4_1",
    "int(bits=4, group=32)": "Q5_0",
    "hqq(bits=4, group=32, zero=exact)": "Q5_0",
    "hqq(bits=1, group=32, zero=exact)": "Q4_0",
    "int(bits=8, group=64, symmetric=signed)": "Q8_0",
    "gptq(bits=8, group=32, symmetric=true)": "Q8_0",
    "mxfp4": "MXFP4",
}
REFUSED = {
    "int(bits=8, group=64)": r"±255.*symmetric=signed",
    "int(bits=4, group=16)": r"multiples of 32.*group=32",
    "hqq(bits=4, group=32)": r"integers.*zero=exact",
    "nf4": r"integers with a scale per group",
    "fp8": r"integers with a scale per group|multiples of 32",
    "nvfp4": r"multiples of 32|integers",
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(wide(), tmp_path_factory.mktemp("mixed") / "mixed.gguf", "llama", kinds=MIXED)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(make("llama"), tmp_path_factory.mktemp("halves") / "half.gguf", "llama", KIND.F16)


def tuned(path: Path, chain: str = CHAIN, *, packed: bool = True, **given: Any) -> PreTrainedModel:
    model, _ = load(path, grid="keep" if "keep" in chain else None)
    dovetail.apply(model, chain, calibration=[batch(model, seed=4)], **given)
    move(model)
    dovetail.merge(model, packed=packed)
    return model


def content(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_nothing_trained_gives_the_same_file(family: str, tmp_path: Path) -> None:
    path = write_gguf(make_plain(family), tmp_path / "model.gguf", family, KIND.Q5_0, kinds={"ffn_down": KIND.Q8_0})
    model, _ = load(path, grid="keep")
    for loaded in (model, None):
        if loaded is None:
            dovetail.apply(model, CHAIN)
            dovetail.merge(model, packed=True)
        report = export(model, "gguf", tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
        assert report.claim == "values"
        assert "0 of " in report.notes[0]


def test_every_format_survives(mixed: Path, tmp_path: Path) -> None:
    kinds = {**MIXED, "attn_q": KIND.Q5_K, "attn_v": KIND.IQ4_XS, "ffn_up": KIND.Q4_1, "ffn_gate": KIND.MXFP4}
    other = write_gguf(wide(), tmp_path / "other.gguf", "llama", kinds=kinds)
    for path in (mixed, other):
        model, _ = load(path, grid="keep")
        dovetail.apply(model, CHAIN)
        dovetail.merge(model, packed=True)
        export(model, "gguf", tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("packed", [True, False])
def test_a_tuned_file_differs_in_codes_alone(packed: bool, mixed: Path, tmp_path: Path) -> None:
    model = tuned(mixed, packed=packed)
    assert bool(grids(model)) != packed
    report = export(model, "gguf", tmp_path / "out.gguf")
    assert report.notes[0].endswith("only codes differ")
    assert {layer.kind for layer in report.layers.values()} == {kind.name for kind in MIXED.values()} - {"F16"}
    before, after = np.fromfile(mixed, np.uint8), np.fromfile(tmp_path / "out.gguf", np.uint8)
    assert before.shape == after.shape
    assert (before != after).any()
    first = min(tensor.data_offset for tensor in content(mixed).values())
    assert np.array_equal(before[:first], after[:first])
    again = load(tmp_path / "out.gguf")[0]  # by transformers, dequantized
    inputs = batch(again)
    with torch.no_grad():
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    # The tuned file is a base as the first one was.
    bits = [dovetail.footprint(load(each, grid="keep")[0]).bits_per_weight for each in (mixed, tmp_path / "out.gguf")]
    assert bits[0] == bits[1]


@pytest.mark.parametrize("text", TABLE)
def test_a_quantizer_becomes_blocks_of_the_same_values(text: str, halves: Path, tmp_path: Path) -> None:
    model = tuned(halves, f"{text} >> lora(r=4) >> regrid", packed=False)
    report = export(model, "gguf", tmp_path / "out.gguf", like=halves)
    assert {layer.kind for layer in report.layers.values()} == {TABLE[text]}
    assert any("OpenVINO" in note for note in report.notes) == (TABLE[text] == "Q5_0")
    again = load(tmp_path / "out.gguf", dtype=model.dtype)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
    kinds = {name: tensor.tensor_type.name for name, tensor in content(tmp_path / "out.gguf").items()}
    assert kinds["blk.0.attn_q.weight"] == TABLE[text]
    assert kinds["token_embd.weight"] == "F16"
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields.keys() == gguf.GGUFReader(halves).fields.keys()
    planned = dovetail.plan(f"{text} >> lora(r=4) >> regrid", str(halves), memory=False, to="gguf")
    assert planned.export_kinds == {TABLE[text]: planned.layer_count}


@pytest.mark.parametrize("text", REFUSED)
def test_a_grid_that_does_not_fit_is_refused_with_the_fix(text: str, halves: Path, tmp_path: Path) -> None:
    model = tuned(halves, f"{text} >> lora(r=4) >> regrid")
    with pytest.raises(ExportError, match=f"(?s){REFUSED[text]}"):
        export(model, "gguf", tmp_path / "out.gguf", like=halves)
    assert not list(tmp_path.iterdir())
    planned = dovetail.plan(f"{text} >> lora(r=4) >> regrid", str(halves), memory=False, to="gguf")
    assert planned.export_kinds == {}
    assert planned.export_refused


def test_a_pruned_model_keeps_its_zeros(halves: Path, tmp_path: Path) -> None:
    model = tuned(halves, "wanda(0.5) >> int(bits=4, group=32, symmetric=true) >> lora(r=4) >> remask >> regrid")
    export(model, "gguf", tmp_path / "out.gguf", like=halves)
    again = load(tmp_path / "out.gguf")[0]
    for name, layer in chain_layers(model).items():
        weight = again.get_submodule(name).get_parameter("weight")
        assert torch.equal(weight == 0, layer.base.matrix() == 0)
        assert (weight == 0).float().mean() >= 0.5


def test_some_layers_on_a_grid_and_the_others_as_in_the_file(halves: Path, tmp_path: Path) -> None:
    model = tuned(halves, "int(bits=4, group=32, symmetric=true) >> lora(r=4) >> regrid", targets=["up", "query"])
    report = export(model, "gguf", tmp_path / "out.gguf", like=halves)
    assert len(report.layers) == 4
    kinds = {name: tensor.tensor_type.name for name, tensor in content(tmp_path / "out.gguf").items()}
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"


def test_another_file_or_none_is_refused(mixed: Path, halves: Path, tmp_path: Path) -> None:
    chain = "int(bits=4, group=32, symmetric=true) >> lora(r=4) >> regrid"
    model = tuned(halves, chain)
    out = tmp_path / "out.gguf"
    with pytest.raises(ExportError, match=r"(?s)no GGUF file to be like.*--like FILE"):
        export(model, "gguf", out)
    with pytest.raises(ExportError, match=r"(?s)no file .*none.gguf"):
        export(model, "gguf", out, like=tmp_path / "none.gguf")
    with pytest.raises(ExportError, match=r"(?s)mixed.gguf.*a layer of \[64, 64\]"):
        export(model, "gguf", out, like=mixed)
    other = write_gguf(make("llama", seed=1), tmp_path / "other.gguf", "llama", KIND.F16)
    with pytest.raises(ExportError, match=r"(?s)weights that are not those of .*other.gguf.*copied from the file"):
        export(model, "gguf", out, like=other)
    held, _ = load(mixed, grid="keep")
    dovetail.apply(held, CHAIN)
    with pytest.raises(ExportError, match="not merged"):
        export(held, "gguf", out)
    own = tuned(mixed)
    with pytest.raises(ExportError, match="output and source"):
        export(own, "gguf", mixed)
    assert not out.exists()
    assert export(own, "gguf", out, dry_run=True).claim == "fits"
    assert not out.exists()


def test_a_tensor_that_the_file_lacks_is_refused(halves: Path, tmp_path: Path) -> None:
    model, _ = load(halves)
    layer = model.get_submodule("model.layers.0.self_attn.o_proj")
    layer.bias = torch.nn.Parameter(torch.zeros(64, dtype=model.dtype))
    dovetail.apply(model, "int(bits=4, group=32, symmetric=true) >> lora(r=4) >> regrid", targets=["up"])
    dovetail.merge(model, packed=True)
    export(model, "gguf", tmp_path / "zero.gguf", like=halves)
    with torch.no_grad():
        layer.bias[3] = 1.0
    with pytest.raises(ExportError, match=r"(?s)o_proj\.bias.*no such tensor in .*half\.gguf"):
        export(model, "gguf", tmp_path / "out.gguf", like=halves)
    assert not (tmp_path / "out.gguf").exists()


def test_the_command(mixed: Path, tmp_path: Path) -> None:
    model, tokenizer = load(mixed, grid="keep")
    dovetail.apply(model, CHAIN)
    move(model)
    dovetail.merge(model, packed=True)
    dovetail.save_packed(model, tmp_path / "packed", tokenizer=tokenizer)
    command = ["export", str(tmp_path / "packed"), "--to", "gguf", "-o", str(tmp_path / "out.gguf")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "the same values in float32" in done.output
    assert "only codes differ" in done.output
    done = CliRunner().invoke(app, [*command, "--like", str(mixed), "--for", "ollama"])
    assert done.exit_code == 0, done.output
    assert "FROM " in done.output
