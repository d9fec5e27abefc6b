"""Law: a fine-tuned checkpoint that stock transformers loads is packed, and its values are tuned minus base.

The forms are those that transformers writes or still reads: names that it converts (MoE experts, GPT-NeoX's head),
buffers of old Llamas that it ignores, and shards. Others are refused with LoadError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from dovetail import experts
from dovetail.errors import LoadError
from families import CONFIGS, batch, logits, make

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: OlmoeConfig(**SIZES),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, shared_expert_intermediate_size=32),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, head_dim=16),
}
ROTARY = ["llama", "mistral", "qwen2", "mixtral", "gpt_neox"]


def model_of(family: str) -> Any:
    if family in CONFIGS:
        return make(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(MOE[family]()).eval()


def tuned(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model, generator = model_of(family).to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def change(folder: Path, add: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | add(tensors), file, metadata={"format": "pt"})


def old_rotary(folder: Path) -> None:
    """Add the buffers that transformers stored for each layer before version 4.32."""
    names = [f"model.layers.{at}.self_attn.rotary_emb.inv_freq" for at in range(2)]
    change(folder, lambda tensors: {name: torch.rand(8) for name in names})


FORMS: dict[str, Callable[[PreTrainedModel, Path], Any]] = {
    "saved": lambda model, folder: model.save_pretrained(folder),
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="50KB"),
    "old_rotary": lambda model, folder: (model.save_pretrained(folder), old_rotary(folder)),
}
CASES = [
    *((family, "saved", torch.float32) for family in [*CONFIGS, *MOE]),
    *((family, "saved", torch.bfloat16) for family in ["mixtral", "llama", "olmoe"]),
    *((family, "shards", torch.float32) for family in ["mixtral", "gpt_neox", "gpt2", "qwen3_moe"]),
    *((family, "old_rotary", torch.float32) for family in ROTARY),
]


@pytest.mark.parametrize(("family", "form", "dtype"), CASES)
def test_values_are_tuned_minus_base(family: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, model = model_of(family).to(dtype), tuned(family, dtype)
    FORMS[form](model, tmp_path)
    vector = experts.task_vector(tmp_path, base)
    before, after = base.state_dict(), model.state_dict()
    assert len({tensor.data_ptr() for tensor in before.values()}) == len(vector) + sum(
        not tensor.is_floating_point() for tensor in before.values()
    )
    for name, tensor in vector.items():
        assert torch.equal(tensor, (after[name].float() - before[name].float()).to(tensor.dtype)), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "qwen3_moe", "gpt2", "t5"])
def test_what_is_unpacked_is_what_was_tuned(family: str, tmp_path: Path) -> None:
    base, model = model_of(family), tuned(family)
    model.save_pretrained(tmp_path / "tuned")
    experts.unpack(experts.task_vector(tmp_path / "tuned", base), tmp_path / "back", base)
    again = type(model).from_pretrained(tmp_path / "back")
    with torch.no_grad():
        torch.testing.assert_close(logits(again, batch(again)), logits(model, batch(model)), rtol=1e-5, atol=1e-5)
        expert = experts.compress(experts.task_vector(tmp_path / "tuned", base), 0.5)
        experts.activate(base, expert)
        experts.unpack(expert, tmp_path / "expert", model_of(family))
        again = type(model).from_pretrained(tmp_path / "expert")
        torch.testing.assert_close(logits(again, batch(again)), logits(base, batch(base)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("wrong", ["other", "missing", "shape"])
def test_what_transformers_would_leave_out_or_draw_is_refused(family: str, wrong: str, tmp_path: Path) -> None:
    tuned(family).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    if wrong == "other":
        tensors["other.weight"] = torch.zeros(2)
    elif wrong == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LoadError):
        experts.task_vector(tmp_path, model_of(family))
