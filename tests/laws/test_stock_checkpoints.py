"""A checkpoint that stock transformers loads completely loads here, to the same tensors, however it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GptOssConfig,
    GraniteMoeConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import dovetail
from families import CONFIGS, ENCODERS, make
from small_models import make_tokenizer

WHOLE = "model.safetensors"
LLAMA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**LLAMA, head_dim=16, moe_intermediate_size=32, num_experts=4),
    "olmoe": lambda: OlmoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: PhimoeConfig(**LLAMA, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(**LLAMA, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "granite_moe": lambda: GraniteMoeConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
}


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **metadata: str) -> None:
    save_file(change(load_file(folder / WHOLE)), folder / WHOLE, metadata or None)


def old_buffers(folder: Path) -> None:
    """Add the buffers that old versions of transformers saved and new ones compute or ignore."""
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "bert.embeddings.position_ids": torch.arange(8)[None],
        "roberta.embeddings.position_ids": torch.arange(8)[None],
    }
    _rewrite(folder, lambda tensors: tensors | old, format="pt")


def no_metadata(folder: Path) -> None:
    """Write the file without the note that torch wrote it."""
    _rewrite(folder, lambda tensors: tensors)


def half(folder: Path) -> None:
    """Store half-precision weights under a config of float32."""
    _rewrite(folder, lambda tensors: {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()})


def body_alone(folder: Path) -> None:
    """Name the tensors as the model without its head does."""
    prefixes = ("model.", "transformer.", "gpt_neox.", "bert.", "roberta.", "distilbert.")

    def bare(key: str) -> str:
        return next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)

    _rewrite(folder, lambda tensors: {bare(key): tensor for key, tensor in tensors.items()})


def stale_index(folder: Path) -> None:
    """Leave the index of an earlier, sharded save beside the whole file."""
    said = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "pytorch_model.bin"}}
    (folder / f"{WHOLE}.index.json").write_text(json.dumps(said))


def old_config(folder: Path) -> None:
    """Use the keys of old versions of transformers."""
    said = json.loads((folder / "config.json").read_text())
    said["torch_dtype"], said["transformers_version"] = said.pop("dtype", "float32"), "4.30.0"
    (folder / "config.json").write_text(json.dumps(said))


NAMES = [*CONFIGS, *EXPERTS]
SOME = ["llama", "gpt2", "mixtral", "t5", "bert", *EXPERTS]
"""Each kind of model, and all whose tensors transformers converts on load."""
WRITTEN = [
    *((name, change) for name in NAMES for change in (old_buffers, body_alone)),  # which concern names of tensors
    *((name, change) for name in SOME for change in ("shards", no_metadata, half, stale_index, old_config)),
]


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return make(name) if name in CONFIGS else AutoModelForCausalLM.from_config(EXPERTS[name]()).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "change"), WRITTEN, ids=lambda each: getattr(each, "__name__", each))
def test_stock_checkpoints_load(name: str, change: Any, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB" if change == "shards" else "1GB")
    make_tokenizer().save_pretrained(tmp_path)
    if change != "shards":
        change(tmp_path)
    heads: Any = AutoModelForSequenceClassification if name in ENCODERS else AutoModelForCausalLM
    auto: Any = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else heads
    stock, info = auto.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        pytest.skip("stock transformers does not find every weight either")
    ours, _ = dovetail.load(tmp_path, task_kind="classification" if name in ENCODERS else "generation")
    theirs, found = stock.state_dict(), ours.state_dict()
    assert theirs.keys() == found.keys()
    assert all(torch.equal(theirs[key], found[key]) and theirs[key].dtype == found[key].dtype for key in theirs)
