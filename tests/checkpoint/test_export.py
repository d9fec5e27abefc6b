"""Export: the owner's decoder on our bytes gives our values, stock transformers gives our logits, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import dovetail
from dovetail.checkpoint.export import FORMATS, export
from dovetail.cli.main import app
from dovetail.errors import DovetailError, ExportError
from families import batch, logits, make, move
from small_models import make_tokenizer

torch.set_num_threads(1)
CT, BNB = "compressed-tensors", "bitsandbytes"

TABLE: dict[str, dict[str, str]] = {
    "int(bits=4, group=32)": {CT: "codes"},
    "int(bits=4, group=32, scale_bits=7)": {CT: "values"},
    "int(bits=4, group=32, symmetric=true)": {CT: "codes"},
    "int(bits=4, group=32, symmetric=signed, scale_bits=4)": {CT: "values"},
    "int(bits=4, group=0, symmetric=signed, scale_bits=7)": {CT: "values"},
    "int(bits=8, group=32, symmetric=signed, scale_bits=4, scales=search)": {CT: "values"},
    "gptq(bits=4, group=32, symmetric=signed, scale_bits=4)": {CT: "values"},
    "hqq(bits=4, group=32, zero=exact)": {CT: "codes"},
    "fp8": {CT: "codes"},
    'fp8(scale="tensor")': {CT: "codes"},
    "nf4": {BNB: "values"},
    "nf4(double=true)": {BNB: "values"},
    "fp4": {BNB: "values"},
    "int(bits=3, group=32)": {},
    "int(bits=2, group=32, symmetric=true)": {},
    "hqq(bits=4, group=32)": {},
    "nf(bits=3)": {},
    "mxfp4": {},
    "nvfp4": {},
}
"""Quantizer -> format -> the claim in bfloat16; refused where it is missing."""


def merged(text: str, *, packed: bool = True, dtype: torch.dtype = torch.float32, **given: Any) -> PreTrainedModel:
    """A tiny Llama, quantized, tuned on the grid and merged."""
    model = make("llama").to(dtype)
    closed = "remask >> regrid" if "wanda" in text else "regrid"
    dovetail.apply(model, f"{text} >> lora(r=4) >> {closed}", calibration=[batch(model, seed=4)], **given)
    move(model)
    dovetail.merge(model, packed=packed)
    return model


def available(name: str) -> None:
    try:
        FORMATS[name].check_package()
    except ExportError as error:
        pytest.skip(error.found)


@pytest.mark.parametrize("to", [CT, BNB])
@pytest.mark.parametrize("text", TABLE)
def test_each_format_takes_each_quantizer_or_says_why_not(text: str, to: str, tmp_path: Path) -> None:
    available(to)
    model = merged(text, dtype=torch.bfloat16)
    claim = TABLE[text].get(to)
    if claim is None:
        with pytest.raises(ExportError) as refused:
            export(model, to, tmp_path / "out")
        assert refused.value.fix
        assert refused.value.rule
        assert not (tmp_path / "out").exists()
        return
    assert export(model, to, tmp_path / "out", dry_run=True).claim == "fits"
    assert not (tmp_path / "out").exists()
    report = export(model, to, tmp_path / "out")
    assert report.claim == claim
    assert (report.differing > 0) == (claim == "codes")
    assert report.weights == sum(layer.weights for layer in report.layers.values()) > 0
    wide = export(model, to, tmp_path / "wide", dtype="float32")
    assert wide.claim == "values"


def loaded(folder: Path, **given: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **given).eval()


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("int(bits=4, group=32, symmetric=true)", torch.float32),
        ("int(bits=4, group=32, symmetric=signed, scale_bits=4)", torch.bfloat16),
        ("int(bits=8, group=0, symmetric=signed, scale_bits=7)", torch.bfloat16),
        ("int(bits=4, group=32, scale_bits=7)", torch.bfloat16),
        ("wanda(0.5) >> int(bits=4, group=32, symmetric=signed, scale_bits=4)", torch.bfloat16),
    ],
)
def test_stock_transformers_gives_the_same_logits(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    available(CT)
    from transformers import CompressedTensorsConfig

    model = merged(text, dtype=dtype)
    report = export(model, CT, tmp_path / "out")
    assert report.claim == "values"
    inputs = batch(model)
    if "symmetric" in text:
        stock = loaded(tmp_path / "out")
    else:
        assert "CompressedTensorsConfig(dequantize=True)" in report.notes[0]
        with pytest.warns(UserWarning, match="quantization_config"):
            stock = loaded(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    with torch.no_grad():
        # Loaded like the other, or `model.to(bfloat16)` would have rounded the frequencies of its positions.
        dovetail.to_stock(model).save_pretrained(tmp_path / "stock")
        assert torch.equal(logits(stock, inputs), logits(loaded(tmp_path / "stock"), inputs))
    if "wanda" in text:
        zeros = [(m.weight == 0).float().mean() for m in model.modules() if isinstance(m, nn.Linear)]
        served = [(m.weight == 0).float().mean() for m in stock.modules() if isinstance(m, nn.Linear)]
        assert served == zeros
        assert max(zeros) >= 0.5


@pytest.mark.parametrize("text", ["nf4", "nf4(double=true)", "fp4"])
def test_bitsandbytes_loads_the_same_weights(text: str, tmp_path: Path) -> None:
    available(BNB)
    from bitsandbytes.functional import dequantize_4bit

    model = merged(text, packed=False)
    export(model, BNB, tmp_path / "out")
    stock = loaded(tmp_path / "out")

    def weight(one: nn.Module) -> Tensor:
        held: Any = one.get_parameter("weight")
        return dequantize_4bit(held.data, held.quant_state) if type(held).__name__ == "Params4bit" else held.detach()

    four_bit = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            other = stock.get_submodule(name)
            four_bit += type(other).__name__ == "Linear4bit"
            assert torch.equal(weight(other), module.weight.detach())
    assert four_bit > 0


def test_a_run_of_stock_modules_and_mixed_layers(tmp_path: Path) -> None:
    """From the folder of a merged model; half of its layers have other bits, and one is not in the chain."""
    available(CT)
    text = "int(bits=4, group=32, symmetric=signed, scale_bits=4)"
    mixed = "int(bits=8, group=32, symmetric=signed, scale_bits=4) >> lora(r=4) >> regrid"
    layers = {"*.mlp.*": mixed}
    model = merged(text, packed=False, layers=layers, targets=["*.mlp.*", "*.q_proj", "*.v_proj"])
    report = export(model, CT, tmp_path / "out")
    assert {layer.kind for layer in report.layers.values()} == {"int4, symmetric, groups of 32",
                                                              "int8, symmetric, groups of 32"}  # fmt: skip
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(logits(loaded(tmp_path / "out"), inputs), logits(model, inputs))


def test_what_is_not_merged_or_has_no_grid_is_refused(tmp_path: Path) -> None:
    available(CT)
    model = make("llama")
    with pytest.raises(ExportError, match="no quantized layer"):
        export(model, CT, tmp_path / "out")
    dovetail.apply(model, "int(bits=4, group=32) >> lora(r=4) >> regrid")
    with pytest.raises(ExportError, match=r"(?s)not merged.*merge"):
        export(model, CT, tmp_path / "out")
    with pytest.raises(ExportError, match=r"(?s)dtype=int8.*float32, bfloat16"):
        export(model, CT, tmp_path / "out", dtype="int8")
    with pytest.raises(ExportError, match="formats: compressed-tensors, bitsandbytes"):
        export(model, "int4", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(DovetailError, match="new or empty folder"):
        export(model, CT, tmp_path / "full")


def test_the_plan_says_which_layers_fit() -> None:
    found = dovetail.plan("int(bits=4, group=32, symmetric=signed) >> lora >> regrid", memory=False, to=CT)
    assert found.export_kinds == {"int4, symmetric, groups of 32": found.layer_count}
    assert found.export_refused == []
    found = dovetail.plan("nf4 >> lora >> regrid", memory=False, to=CT)
    assert found.export_kinds == {}
    assert "scale_bits=4" in found.export_refused[0]
    assert found.legal
    found = dovetail.plan("lora", memory=False, to=BNB)
    assert "on a grid" in found.export_refused[0]


def test_bytes_that_the_owner_decodes_to_other_values_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    available(CT)
    model, form = merged("int(bits=4, group=32, symmetric=true)"), FORMATS[CT]
    encode = type(form).encode

    def spoilt(self: Any, quantized: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = encode(self, quantized, dtype)
        tensors["weight_packed"][0, 0] ^= 1
        return tensors

    monkeypatch.setattr(type(form), "encode", spoilt)
    with pytest.raises(ExportError, match=r"1 of [\d,]+ weights that compressed_tensors"):
        export(model, CT, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path) -> None:
    available(CT)
    model = merged("int(bits=4, group=32, symmetric=signed, scale_bits=4)")
    dovetail.save_packed(model, tmp_path / "packed", tokenizer=make_tokenizer())
    for more, said in ((["--dry-run"], "all layers fit"), ([], "the same values in float32")):
        command = ["export", str(tmp_path / "packed"), "--to", CT, "-o", str(tmp_path / "out"), *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0
        assert said in done.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
