"""MoE experts in the formats in which they are served: the layers of their published checkpoint, on the same grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import dovetail
import small_tokenizers
from dovetail.checkpoint.export import export
from dovetail.checkpoint.export_tensors import layers_for
from dovetail.checkpoint.exportable import FORMATS, fits
from dovetail.checkpoint.verify import verify
from dovetail.errors import ExportError
from exported import available
from families import batch, move
from llama_cpp import likeliest
from todays_families import make

torch.set_num_threads(1)
CT = "compressed-tensors"
SIGNED = "int(bits=4, group=16, symmetric=signed, scale_bits=4)"
EIGHT = "int(bits=8, group=16, symmetric=signed, scale_bits=4)"


def tuned(model: PreTrainedModel, text: str = SIGNED, *, packed: bool = True, **given: Any) -> PreTrainedModel:
    """Return the model, quantized, tuned on the grid and merged."""
    closed = "remask >> regrid" if "wanda" in text else "regrid"
    dovetail.apply(model, f"{text} >> lora(r=4) >> {closed}", calibration=[batch(model, seed=4)], **given)
    move(model)
    dovetail.merge(model, packed=packed)
    return model


def published(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Return the tensors that transformers saves of a merged model, by the names of its checkpoint."""
    dovetail.to_stock(model).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "text", "packed", "dtype", "given"),
    [
        ("qwen3_moe", SIGNED, True, torch.bfloat16, {}),
        ("mixtral", f"wanda(0.5) >> {SIGNED}", False, torch.bfloat16, {}),
        ("olmoe", "fp8", True, torch.float32, {}),
        ("qwen2_moe", SIGNED, False, torch.float32,
         {"layers": {"*.self_attn.*": f"{EIGHT} >> lora(r=4) >> regrid"}}),
    ],
)  # fmt: skip
def test_the_layers_are_those_of_the_checkpoint(
    family: str, text: str, packed: bool, dtype: torch.dtype, given: dict[str, Any], tmp_path: Path
) -> None:
    available(CT)
    model: Any = tuned(make(family).to(dtype), text, packed=packed, **given)
    report = export(model, CT, tmp_path / "out")
    assert report.claim == "values"
    assert [claim.outcome for claim in verify(tmp_path / "out", model).claims] == ["holds"] * 3
    form, (layers, _, _) = FORMATS[CT], layers_for(FORMATS[CT], model, dtype, None)
    found, stock = load_file(tmp_path / "out" / "model.safetensors"), published(model, tmp_path / "stock")
    assert sum(".experts." in name for name in layers) == 2 * 4 * 3
    for name, tensor in stock.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            parts = {key.removeprefix(f"{layer}."): t for key, t in found.items() if key.startswith(f"{layer}.")}
            assert torch.equal(form.decode(parts, layers[layer], dtype), tensor)
        else:
            assert torch.equal(found[name], tensor)
    assert {key.rpartition(".")[0] for key in found} == {key.rpartition(".")[0] for key in stock}


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_gptq_and_awq_hold_experts(to: str, tmp_path: Path) -> None:
    model = tuned(make("mixtral"), "int(bits=4, group=32, symmetric=signed)")
    layers, _, _ = layers_for(FORMATS[to], model, torch.float16, None)
    assert export(model, to, tmp_path / "out", dtype="float16").claim == "values"
    assert verify(tmp_path / "out", model).holds
    found, stock = load_file(tmp_path / "out" / "model.safetensors"), published(model, tmp_path / "stock")
    name = "model.layers.1.block_sparse_moe.experts.3.w3"
    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in found.items() if key.startswith(f"{name}.")}
    assert torch.equal(FORMATS[to].decode(parts, layers[name], torch.float32), stock[f"{name}.weight"])


@pytest.mark.parametrize(
    ("to", "family", "text", "given", "message"),
    [
        (CT, "olmoe", "int(bits=4, group=16, scale_bits=7)", {}, r"(?s)experts without zero points.*symmetric=signed"),
        (CT, "olmoe", SIGNED, {"targets": ["*.gate_up_proj.*"]}, r"(?s)matrices of experts without a grid.*experts"),
        (CT, "olmoe", SIGNED, {"layers": {"*.gate_up_proj.2": f"{EIGHT} >> lora(r=4) >> regrid"}},
         r"(?s)on one grid, and these are on int4.*int8"),
        (CT, "gpt_oss", SIGNED, {}, "stored as"),
        (CT, "jetmoe", SIGNED, {}, "linear layers of whole rows"),
        ("bitsandbytes", "olmoe", "nf4(block=32)", {}, r"(?s)not MoE experts.*exclude"),
        ("mlx", "olmoe", "int(bits=4, group=32, symmetric=signed, scale_bits=7)", {}, "not MoE experts"),
    ],
)  # fmt: skip
def test_experts_that_a_format_does_not_hold_are_refused_before_and_after_training(
    to: str, family: str, text: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    available(to)
    model = make(family)
    dovetail.apply(model, f"{text} >> lora(r=4) >> regrid", **given)
    kinds, refused = fits(to, model)
    assert sum(kinds.values()) < 8 + 2 * 8
    assert refused
    dovetail.merge(model, packed=True)
    with pytest.raises(ExportError, match=message):
        export(model, to, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def qwen3_moe() -> PreTrainedModel:
    """Return a tiny model with the size of experts that transformers' GGUF loader takes for granted."""
    config = Qwen3MoeConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, moe_intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=128, initializer_range=0.25, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_gguf_stacks_the_experts(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed")
    tokenizer = small_tokenizers.bytes_bpe("<s> $A")
    model: Any = qwen3_moe()
    tuned(model, "int(bits=8, group=32, symmetric=signed)")
    report = export(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)
    assert report.claim == "values"
    assert [claim.outcome for claim in verify(tmp_path / "model.gguf", model).claims] == ["holds"] * 3
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stock = dovetail.to_stock(model).model.layers[1].mlp.experts
    gate, up = (
        torch.tensor(gguf.dequantize(tensors[f"blk.1.ffn_{name}_exps.weight"].data, 8)) for name in ("gate", "up")
    )
    assert torch.equal(torch.cat([gate, up], dim=1), stock.gate_up_proj.detach())
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"

    # Like this file, other codes on the same grid move nothing else; another grid makes tensors of another format.
    same = export(model, "gguf", tmp_path / "same.gguf", like=tmp_path / "model.gguf")
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()
    assert same.notes[0].startswith("0 of")
    four = qwen3_moe()
    four.load_state_dict(model.state_dict())
    dovetail.apply(four, "int(bits=4, group=32, symmetric=signed)", targets=["*.experts.*"])
    dovetail.merge(four, packed=True)
    export(four, "gguf", tmp_path / "four.gguf", like=tmp_path / "model.gguf")
    assert verify(tmp_path / "four.gguf", four).holds
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "four.gguf").tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_0"
    assert kinds["blk.0.attn_q.weight"] == "Q8_0"

    pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    prompts = [[1, *(5 + at * 37 % 300 for at in range(length))] for length in (9, 12, 40)]
    answers = likeliest(tmp_path / "model.gguf", *prompts, top=384)
    ids, (found,) = next((ids, steps) for ids, steps in zip(prompts, answers, strict=True) if steps)
    expected = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    worst = max(abs(float(expected[token]) - each) for token, each in found.items() if each > -20)
    assert worst < 0.05 * float(expected.max() - expected.min())


def test_a_router_that_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = tuned(make("qwen3_moe"), "int(bits=4, group=32, symmetric=signed)")
    tokenizer = small_tokenizers.bytes_bpe("<s> $A")
    with pytest.raises(ExportError, match="norm_topk_prob=False"):
        export(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)
    with pytest.raises(ExportError, match="OlmoeForCausalLM"):
        export(tuned(make("olmoe"), "int(bits=4, group=32)"), "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not (tmp_path / "model.gguf").exists()
