"""Export: the owner's decoder on our bytes gives our values, stock transformers gives our logits, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import dovetail
from dovetail.chains.layer.linear import ChainLinear
from dovetail.checkpoint.export import export
from dovetail.checkpoint.export_tensors import quantized_layers
from dovetail.checkpoint.exportable import FORMATS
from dovetail.checkpoint.requantize import requantizer
from dovetail.cli.main import app
from dovetail.errors import DovetailError, ExportError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.models.dtypes import FLOATS
from exported import available, merged
from families import batch, logits, make
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


@pytest.mark.parametrize(
    ("to", "text", "dtype", "claim"),
    [
        ("gptq", "wanda(0.5) >> int(bits=3, group=32, symmetric=signed)", "float16", "values"),
        ("gptq", "gptq(bits=4, group=32, scale_bits=7)", "bfloat16", "values"),
        ("gptq_v2", "int(bits=8, group=0)", "bfloat16", "codes"),
        ("mlx", "wanda(0.5) >> int(bits=4, group=32, scale_bits=7)", "float16", "values"),
        ("mlx", "mxfp4", "float32", "values"),
    ],
)
def test_the_files_of_other_engines_hold_the_same(to: str, text: str, dtype: str, claim: str, tmp_path: Path) -> None:
    """Read from the file and decoded again: the weights of the merged model, pruned ones zero."""
    available(to)
    model, form = merged(text), FORMATS[to]
    report = export(model, to, tmp_path / "out", dtype=dtype)
    assert (report.claim, report.dtype) == (claim, dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    layers, _ = quantized_layers(form, model)
    stock = dovetail.to_stock(model)
    for name, quantized in layers.items():
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        weight = stock.get_submodule(name).get_parameter("weight").detach()
        assert torch.equal(form.decode(parts, quantized, torch.float32), weight)
    assert tensors["model.norm.weight"].dtype == FLOATS[dtype]


def test_the_configs_of_mixed_layers(tmp_path: Path) -> None:
    text = "int(bits=4, group=32, symmetric=signed)"
    layers = {"*.mlp.*": "int(bits=8, group=32, symmetric=signed) >> lora(r=4) >> regrid"}
    model = merged(text, layers=layers, targets=["*.mlp.*", "*.q_proj"])
    export(model, "gptq", tmp_path / "gptq", dtype="float16")
    said = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["checkpoint_format"], said["bits"], said["sym"]) == ("gptq", "gptq", 8, True)
    four = {"bits": 4, "group_size": 32, "sym": True}
    assert said["dynamic"][r"+:^model\.layers\.0\.self_attn\.q_proj$"] == four
    assert said["dynamic"][r"-:^model\.layers\.1\.self_attn\.v_proj$"] == {}
    available("mlx")
    export(model, "mlx", tmp_path / "mlx", dtype="float16")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 32)
    assert config["quantization"]["model.layers.0.self_attn.q_proj"]["bits"] == 4


def test_dtypes_and_zero_points_that_a_format_lacks_are_refused(tmp_path: Path) -> None:
    model = merged("int(bits=4, group=32)", dtype=torch.bfloat16)
    with pytest.raises(ExportError, match=r"(?s)dtype=float32.*float16, bfloat16"):
        export(model, "gptq", tmp_path / "out", dtype="float32")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, ChainLinear)
    quantized = layer.base.quantized
    assert isinstance(quantized, AffineWeight)
    assert quantized.zero_og is not None
    quantized.zero_og[:] = 0
    with pytest.raises(ExportError, match=r"(?s)zero points minus 1.*gptq_v2"):
        export(model, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(model, "gptq_v2", tmp_path / "out").weights > 0
    available("mlx")
    with pytest.raises(ExportError, match=r"(?s)dtype=bfloat16.*float16, float32"):
        export(model, "mlx", tmp_path / "mlx")
    with pytest.raises(ExportError, match=r"(?s)exact in the served dtype.*scale_bits=7"):
        export(model, "mlx", tmp_path / "mlx", dtype="float16")


@pytest.mark.parametrize("quantized", [True, False])
def test_values_beyond_float16_are_refused(quantized: bool, tmp_path: Path) -> None:
    model = merged("int(bits=4, group=32, symmetric=signed)", dtype=torch.bfloat16)
    if quantized:
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        assert isinstance(layer, ChainLinear)
        assert isinstance(layer.base.quantized, AffineWeight)
        layer.base.quantized.get_buffer("scale_og")[:] = 6e4
    else:
        model.get_submodule("model.norm").get_parameter("weight").data[0] = 1e5
    with pytest.raises(ExportError, match=r"(?s)(up_proj|model\.norm\.weight).*finite in float16.*bfloat16"):
        export(model, "gptq", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert export(model, "gptq", tmp_path / "out", dtype="bfloat16").weights > 0


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
    with pytest.raises(
        ExportError, match="formats: compressed-tensors, bitsandbytes, gptq, gptq_v2, awq, mlx, gguf, peft"
    ):
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
        command = ["export", str(tmp_path / "packed"), "--to", CT, "-o", str(tmp_path / "out"), "--for", "vllm", *more]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0
        assert said in done.output
        assert "vllm serve" in done.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("to", ["compressed-tensors", "gguf"])
def test_layers_that_do_not_fit_are_quantized_anew_on_request_alone(to: str, tmp_path: Path) -> None:
    pytest.importorskip(to.replace("-", "_"), reason=f"the package {to} is not installed")
    model, tokenizer = dovetail.load("playground")
    dovetail.apply(model, "nf4", targets=["*.down_proj"])
    dovetail.merge(model)
    before = model.get_submodule("model.layers.0.mlp.down_proj").get_parameter("weight").detach().clone()
    out, link = tmp_path / ("out.gguf" if to == "gguf" else "out"), "int(bits=8, group=32, symmetric=signed)"
    with pytest.raises(ExportError, match="nf4"):
        export(model, to, out, tokenizer=tokenizer)
    with pytest.raises(ExportError, match="no calibration data"):
        export(model, to, out, tokenizer=tokenizer, requantize="lora(r=4)")
    report = export(model, to, out, tokenizer=tokenizer, requantize=link, dtype="float32")
    name = "model.layers.0.mlp.down_proj"
    anew = requantizer(link).quantize(before)
    expected = float((anew.dequantize(torch.empty_like(before)) - before).norm() / before.norm())
    assert report.layers[name].error == pytest.approx(expected, rel=1e-4)
    assert report.error is not None
    assert 0 < report.error < 0.01
    assert any("4 layers were quantized anew" in note for note in report.notes)
    found = dovetail.verify(out, model, requantize=link if to == "gguf" else None)
    assert found.holds
    assert "quantized anew" in found.claims[0].detail
