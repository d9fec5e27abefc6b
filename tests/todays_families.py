"""Tiny random models of today's families: mixtures of experts, state-space and hybrid models, and what else is usual.

`CONFIGS[name]()` is a configuration of two to four layers; `make(name)` the model, seeded, float32, in eval mode.
`tests/families.py` holds the families that every contract test runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = _SIZES | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_END = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_STATES = _END | {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    # Mixtures of experts
    "mixtral": _LOCAL,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": _EXPERTS | {"head_dim": 16},
    "qwen3_next": _EXPERTS | {
        "head_dim": 16, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gpt_oss": _LOCAL | {"head_dim": 16},
    "olmoe": _EXPERTS,
    "phimoe": _LOCAL,
    "minimax": _LOCAL | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
    "glm4_moe": _ROUTED | {"head_dim": 16},
    "deepseek_v2": _ROUTED | _MLA | {"topk_method": "greedy"},
    "deepseek_v3": _ROUTED | _MLA,
    "deepseek_v4": _ROUTED | {
        "head_dim": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "num_key_value_heads": 1, "o_groups": 2,
        "o_lora_rank": 16, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4, "hc_mult": 2,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "hy_v4": _ROUTED | _MLA | {
        "head_dim": 16, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 4, "hc_mult": 2,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention"] * 2,
        "indexer_types": ["full", "full"],
    },
    "dots1": _ROUTED | {"head_dim": 16},
    "ernie4_5_moe": _SIZES | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0,
        "moe_num_shared_experts": 1,
    },
    "granitemoe": _LOCAL,
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 32},
    "lfm2_moe": _EXPERTS | {
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
    },
    "hunyuan_v1_moe": _SIZES | {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "llama4_text": _LOCAL | {
        "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0],
    },
    "jetmoe": _SIZES | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16, "num_key_value_heads": 2,
        "num_attention_heads": 4,
    },
    # State spaces, recurrences and hybrids
    "jamba": _SIZES | _MAMBA | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 16, "use_mamba_kernels": False,
    },
    "mamba": _STATES | {"time_step_rank": 48},
    "falcon_mamba": _STATES,
    "recurrent_gemma": _SIZES | {
        "num_hidden_layers": 3, "lru_width": 64, "head_dim": 16, "attention_window_size": 32,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "lfm2": _SIZES | {"layer_types": ["conv", "full_attention"]},
    # Dense models
    "gemma3n_text": _SIZES | {
        "head_dim": 16, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "laurel_rank": 16,
        "num_kv_shared_layers": 0, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
    },
    "granite": _SIZES,
    "gptj": _END | {
        "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64,
    },
    "mpt": {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "pad_token_id": 0},
    "phi3": _SIZES,
    "qwen3": _SIZES | {"head_dim": 16},
    "gemma3_text": _SIZES | {"head_dim": 16},
    "olmo2": _SIZES,
}  # fmt: skip
"""Name of a family in transformers -> the fields of a tiny configuration."""


def config(name: str) -> Any:
    """Return a tiny configuration of a family."""
    return CONFIG_MAPPING[name](**FAMILIES[name])


def make(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model of a family; weights are wide enough that every layer counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(name)).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
            elif name.endswith("correct_output_scale"):  # of Gemma 3n: with its initial zeros, layers get no input
                nn.init.ones_(parameter)
    return model


def batch(rows: int = 4, tokens: int = 24) -> dict[str, Tensor]:
    """Return token ids and a mask, without padding."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS: dict[str, Callable[[], PreTrainedModel]] = {name: (lambda name=name: make(name)) for name in FAMILIES}
