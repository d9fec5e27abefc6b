"""Export of adapters: stock peft computes the chain's logits from the plain LoRA that is written for vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import dovetail
from dovetail.checkpoint.export import ExportReport, export
from dovetail.errors import ChainError, ExportError
from families import batch, logits, make, move

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ("lora(r=4, alpha=6)", 4),
        ("lora(r=4, alpha=6, scaling=rs)", 4),
        ("lora(r=6, elastic=[6, 4, 2])", 4),
        ("adalora(r=6, budget=4)", 6),
        ("vera(r=12, seed=7)", 12),
        ("loha(r=3, alpha=5)", 9),
        ("lora(r=4) >> vera(r=8)", 12),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stock_peft_computes_the_same_from_a_plain_lora(text: str, rank: int, family: str, tmp_path: Path) -> None:
    model = make(family)
    dovetail.apply(model, text)
    move(model)
    report = export(model, "peft", tmp_path / "out", engine="vllm")
    assert report.claim == "adapter"
    assert {layer.kind for layer in report.layers.values()} == {f"lora, rank {rank}"}
    assert any("--max-lora-rank" in note for note in report.notes)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {rank}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["modules_to_save"]) == (
        rank, rank, False, None,
    )  # fmt: skip
    stock = peft.PeftModel.from_pretrained(make(family), tmp_path / "out").double().eval()
    inputs = batch(model)
    expected, found = logits(model.double(), inputs), logits(stock, inputs)
    assert (expected - found).abs().max() <= 16 * torch.finfo(torch.float32).eps * max(1, expected.abs().max())


def test_layers_of_other_ranks_are_filled_with_zeros(tmp_path: Path) -> None:
    model = make("llama")
    dovetail.apply(model, "lora(r=4)", layers={"*.mlp.*": "lora(r=8)"})
    move(model)
    report = export(model, "peft", tmp_path / "out", engine="vllm")
    assert report.layers["model.layers.0.self_attn.q_proj"].kind == "lora, rank 4"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a_ri = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert len(a_ri) == 8
    assert not a_ri[4:].any()
    assert a_ri[:4].any()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ia3", "no LoRA does"),
        ("dora(r=4)", "no LoRA does"),
        ("lora(r=4) >> ia3", "no LoRA does"),
        ("int(bits=4, group=32) >> lora(r=4) >> regrid", "re-imposes"),
        ("loha(r=24)", "ranks up to 512"),
    ],
)
def test_what_no_lora_is_is_refused_with_a_way_out(text: str, found: str, tmp_path: Path) -> None:
    model = make("llama")
    dovetail.apply(model, text)
    with pytest.raises(ChainError, match=f"(?s){found}.*merge"):
        export(model, "peft", tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()


def test_modules_trained_beside_the_adapter_are_refused_for_vllm_alone(tmp_path: Path) -> None:
    model = make("bert")
    dovetail.apply(model, "lora(r=4)")
    with pytest.raises(ChainError, match="modules_to_save"):
        export(model, "peft", tmp_path / "out", engine="vllm")
    report = export(model, "peft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert (report.claim, report.weights) == ("adapter", 0)


def test_engines_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(ExportError, match="no adapter"):
        export(model, "peft", tmp_path / "out")
    with pytest.raises(ExportError, match="the path runs/first"):
        export("runs/first", "peft", tmp_path / "out")
    with pytest.raises(ExportError, match=r"(?s)engine=vllm.*vllm reads compressed-tensors.*export to"):
        export(model, "mlx", tmp_path / "out", engine="vllm")
    with pytest.raises(ExportError, match=r"(?s)engine=tgi.*engines: vllm"):
        export(model, "gptq", tmp_path / "out", engine="tgi")


def test_a_dry_run_and_a_plan_say_whether_the_adapter_fits(tmp_path: Path) -> None:
    model = make("llama")
    dovetail.apply(model, "nf4 >> lora(r=4)")
    for engine in (None, "vllm"):
        report: ExportReport = export(model, "peft", tmp_path / "out", engine=engine, dry_run=True)
        assert report.claim == "fits"
        assert any("docs/peft.md" in note for note in report.notes)
    assert not (tmp_path / "out").exists()
    found = dovetail.plan("nf4 >> lora(r=4)", memory=False, to="peft")
    assert found.export_kinds == {"peft's lora": found.layer_count}
    found = dovetail.plan("int(bits=4, group=32) >> lora(r=4) >> regrid", memory=False, to="peft")
    assert "merge the chain" in found.export_refused[0]
