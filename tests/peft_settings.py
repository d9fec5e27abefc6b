"""Adapters of stock peft for the laws: every setting on every family, moved as if they had been trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import CONFIGS, batch, logits, make

FAMILIES = ["llama", "tied_llama", "qwen2", "gpt2", "gemma", "opt", "bloom", "falcon", "phi3", "mixtral", "t5", "bert"]
TARGETS = {
    "gpt2": ["c_attn"], "bloom": ["query_key_value"], "falcon": ["query_key_value"], "phi3": ["qkv_proj"],
    "t5": ["q", "v"], "bert": ["query", "value"],
}  # fmt: skip
HEAD = {"t5": "lm_head", "bert": "classifier"}
EMBEDDING = {
    "gpt2": "wte", "bloom": "word_embeddings", "falcon": "word_embeddings", "t5": "shared", "bert": "word_embeddings",
}  # fmt: skip
NORM = {"gpt2": "ln_f", "bloom": "ln_f", "falcon": "ln_f", "opt": "final_layer_norm", "t5": "final_layer_norm",
        "bert": "LayerNorm"}  # fmt: skip

Setting = Callable[[list[str], str], peft.PeftConfig]
SETTINGS: dict[str, Setting] = {
    "lora": lambda t, f: peft.LoraConfig(r=4, target_modules=t),
    "rslora": lambda t, f: peft.LoraConfig(r=4, use_rslora=True, target_modules=t),
    "dora": lambda t, f: peft.LoraConfig(r=4, use_dora=True, target_modules=t),
    "ia3": lambda t, f: peft.IA3Config(target_modules=t, feedforward_modules=[]),
    "loha": lambda t, f: peft.LoHaConfig(r=4, target_modules=t),
    "vera": lambda t, f: peft.VeraConfig(r=4, target_modules=t[:1]),
    "head": lambda t, f: peft.LoraConfig(r=4, target_modules=t, modules_to_save=[HEAD.get(f, "lm_head")]),
    "embedding": lambda t, f: peft.LoraConfig(
        r=4, target_modules=t, modules_to_save=[EMBEDDING.get(f, "embed_tokens")]
    ),
    "both": lambda t, f: peft.IA3Config(
        target_modules=t,
        feedforward_modules=[],
        modules_to_save=[HEAD.get(f, "lm_head"), EMBEDDING.get(f, "embed_tokens")],
    ),
    "norm": lambda t, f: peft.LoraConfig(r=4, target_modules=t, modules_to_save=[NORM.get(f, "norm")]),
    "on_the_head": lambda t, f: peft.LoraConfig(r=4, target_modules=[*t, HEAD.get(f, "lm_head")]),
    "on_the_embedding": lambda t, f: peft.LoraConfig(r=4, target_modules=[*t, EMBEDDING.get(f, "embed_tokens")]),
    "wide": lambda t, f: peft.LoraConfig(r=80, target_modules=t),
    "biases": lambda t, f: peft.LoraConfig(r=4, target_modules=t, bias="all"),
    "own_biases": lambda t, f: peft.LoraConfig(r=4, target_modules=t, bias="lora_only"),
    "bias_of_b": lambda t, f: peft.LoraConfig(r=4, target_modules=t, lora_bias=True),
    "tokens": lambda t, f: peft.LoraConfig(r=4, target_modules=t, trainable_token_indices=[5, 9]),
    "pissa": lambda t, f: peft.LoraConfig(r=4, target_modules=t, init_lora_weights="pissa"),
    "olora": lambda t, f: peft.LoraConfig(r=4, target_modules=t, init_lora_weights="olora"),
    "mica": lambda t, f: peft.LoraConfig(r=4, target_modules=t, init_lora_weights="mica"),
    "orthogonal": lambda t, f: peft.LoraConfig(r=4, target_modules=t, init_lora_weights="orthogonal"),
    "drawn": lambda t, f: peft.LoraConfig(r=4, target_modules=t, init_lora_weights=False),
    "adalora": lambda t, f: peft.AdaLoraConfig(target_modules=t, total_step=10),
    "oft": lambda t, f: peft.OFTConfig(target_modules=t, oft_block_size=16),
    "hra": lambda t, f: peft.HRAConfig(r=4, target_modules=t),
}


def base_of(family: str) -> Any:
    if family != "tied_llama":
        return make(family)
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def config_of(family: str, setting: str) -> peft.PeftConfig:
    config: Any = SETTINGS[setting](TARGETS.get(family, ["q_proj", "v_proj"]), family)
    if family == "bert":
        config.task_type = "SEQ_CLS"
    if family == "gpt2" and "fan_in_fan_out" in config.to_dict():
        config.fan_in_fan_out = True
    return config


def tuned(family: str, config: peft.PeftConfig, directory: Path, **saving: Any) -> None:
    """Put a peft adapter on a new base, move its parameters by normal noise, and save it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base_of(family), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.create_or_update_model_card = lambda directory: None  # its template takes longer than the rest
    model.save_pretrained(str(directory), **saving)


@torch.no_grad()
def answer(model: Any) -> Tensor:
    return logits(model.eval(), batch(model))


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
