"""The families of models that Dovetail describes to llama.cpp by itself, and their hyperparameters as GGUF keys.

llama.cpp takes from a file what differs between the models of a family, and has the rest in its code: the activation,
which layers attend to a window, the scale of the attention. A model that differs from its family in such a value is
refused: llama.cpp would compute other numbers from the same weights.

Source: llama.cpp's converter (`conversion/`) and its loader of hyperparameters (`src/models/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel

LIKE = (
    "name a GGUF file of the model with --like FILE, or a checkout of llama.cpp that converts it with --llama-cpp DIR"
)
"""The fix for what Dovetail does not describe by itself."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp assumes of the models of one class of transformers.

    architecture  llama.cpp's name
    activation    of the feed-forward layers
    permuted      whether the rows of query and key are stored in the order of llama.cpp's rotation, which turns
                  neighbouring rows of a head; transformers turns the rows of its halves
    shifted       whether norms are stored plus 1
    period        every period-th layer attends to all tokens, and the others to a window; 0: all attend to all tokens
    scaled_size   number of layers of the size whose attention is scaled by hidden_size / heads; that of all others by
                  head_dim
    rope_types    of transformers, which the architecture has in llama.cpp
    """

    architecture: str
    activation: str = "silu"
    permuted: bool = False
    shifted: bool = False
    period: int = 0
    scaled_size: int | None = None
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")

    def rows(self, name: str, config: PreTrainedConfig) -> Tensor | None:
        """Return row of the tensor -> row of the layer, int64, of a query or key in this order; else None.

        name  of the tensor in the file
        """
        if not self.permuted or (heads := _heads(name, config.to_dict())) is None:
            return None
        size = _head_size(config.to_dict())
        return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)

    def is_shifted(self, name: str) -> bool:
        """Return whether a tensor is stored plus 1."""
        return self.shifted and name.endswith("norm.weight")


_GEMMA = {"activation": "gelu_pytorch_tanh", "shifted": True}
_LLAMA = Family("llama", permuted=True, rope_types=("default", "linear", "yarn", "llama3"))
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
    "Qwen3MoeForCausalLM": Family("qwen3moe"),
    "Gemma2ForCausalLM": Family("gemma2", **_GEMMA, period=2, scaled_size=46, rope_types=("default",)),
    "Gemma3ForCausalLM": Family("gemma3", **_GEMMA, period=6, scaled_size=62, rope_types=("default", "linear")),
    "Phi3ForCausalLM": Family("phi3", rope_types=("default",)),
}
"""Class of transformers -> family."""
_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
_ANY = {None}


def family_of(model: PreTrainedModel) -> Family:
    """Return the family of a model, whose values are not read.

    Raises ExportError for a model of another class, and for one that differs from what llama.cpp has in its code.
    """
    name, text = type(model).__name__, model.config.to_dict()
    if (family := FAMILIES.get(name)) is None:
        raise _refused(name, f"without a file to be like, a model is one of {', '.join(FAMILIES)}")
    rope, local = _rotation(text)
    size = _head_size(text)
    layers, scale = text["num_hidden_layers"], text.get("query_pre_attn_scalar")
    expected = text["hidden_size"] // text["num_attention_heads"] if layers == family.scaled_size else size
    period = family.period
    kinds = [_FULL if not period or at % period == period - 1 else "sliding_attention" for at in range(layers)]
    must: dict[str, tuple[Any, set[Any]]] = {
        "activation": (text.get("hidden_act", text.get("hidden_activation")), {family.activation}),
        "rope_type": (rope["rope_type"], set(family.rope_types)),
        "rope_type of the window": ("default" if local is rope else local["rope_type"], {"default"}),
        "query_pre_attn_scalar": (scale, {expected} if family.shifted else _ANY),
        "layer_types": (tuple(text.get("layer_types") or kinds), {tuple(kinds)}),
        "use_bidirectional_attention": (bool(text.get("use_bidirectional_attention")), {False}),
        "attention_bias": (bool(text.get("attention_bias")), {False, family.permuted}),
    }
    if name == "Gemma3ForCausalLM":
        must |= {
            "attn_logit_softcapping": (text.get("attn_logit_softcapping"), _ANY),
            "rope_theta of the window": (local["rope_theta"], {10000.0}),
        }
    if name == "Gemma2ForCausalLM":
        caps = {"attn_logit_softcapping", "final_logit_softcapping"}
        must |= {key: (text.get(key) is not None, {True}) for key in caps}
    if name == "Qwen3MoeForCausalLM":
        must |= {
            "norm_topk_prob": (text["norm_topk_prob"], {True}),
            "decoder_sparse_step": (text["decoder_sparse_step"], {1}),
            "mlp_only_layers": (tuple(text["mlp_only_layers"] or ()), {()}),
        }
    for key, (found, allowed) in must.items():
        if found not in allowed:
            said = " or ".join(str(each)[:100] for each in allowed)
            raise _refused(f"{name} with {key}={str(found)[:100]}", f"llama.cpp computes {key}={said} for this family")
    if rope["rope_type"] == "yarn" and (extra := sorted(key for key in rope.keys() - _YARN if rope[key] is not None)):
        raise _refused(f"{name} with {', '.join(extra)} of yarn", "llama.cpp has no such numbers, or other ones")
    return family


def write_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig, family: Family) -> None:
    """Write what llama.cpp must know to compute with a model of `family_of`."""
    from gguf import RopeScalingType

    text = config.to_dict()
    rope, local = _rotation(text)
    size = _head_size(text)
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    if family.architecture == "qwen3moe":
        writer.add_expert_count(text["num_local_experts"])
        writer.add_expert_used_count(text["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if not family.shifted:
        writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        if rope.get("beta_slow") is not None:
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if family.period:
        writer.add_sliding_window(text["sliding_window"])
    if local is not rope:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if family.shifted and (cap := text.get("attn_logit_softcapping")) is not None:
        writer.add_attn_logit_softcapping(cap)
    if family.shifted and (cap := text.get("final_logit_softcapping")) is not None:
        writer.add_final_logit_softcapping(cap)


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Return by what llama.cpp divides each frequency, float32 (head_dim / 2,), for positions as Llama 3.1 scales them.

    None where the file says the scaling by keys, or there is none.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    text = config.to_dict()
    rope, _ = _rotation(text)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_size(text)
    plain = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def hyperparameter_notes(config: PreTrainedConfig, family: Family) -> list[str]:
    """Return where llama.cpp or transformers computes or reads otherwise although the weights are equal."""
    text, found = config.to_dict(), list[str]()
    window = text.get("sliding_window")
    if not family.period and window is not None and window < text["max_position_embeddings"]:
        found.append(f"llama.cpp attends to all tokens in this family, transformers to the last {window:,}")
    if family.architecture == "qwen3moe" and text["moe_intermediate_size"] != _EXPERT_SIZE:
        said = f"reads the size of experts in a GGUF file as {_EXPERT_SIZE}: pass it the config of the model"
        found.append(f"transformers 5.23 {said}")
    return found


_EXPERT_SIZE = 768
"""Of a Qwen 3 MoE to transformers' GGUF loader, which does not read the key."""


_FULL = "full_attention"


def _rotation(text: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of the rotary embedding of the layers that attend to all tokens, and of those of a window.

    They are the same object where the model has one rotation.
    """
    rope = text["rope_parameters"]
    full = rope.get(_FULL, rope)
    return full, rope.get("sliding_attention", full)


def _head_size(text: dict[str, Any]) -> int:
    return text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]


def _heads(name: str, text: dict[str, Any]) -> int | None:
    """Return the number of heads of a query or key by the name of its tensor; None for others."""
    part = name.split(".")[-2]
    keys = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    return text[keys[part]] if part in keys else None


def _refused(found: str, rule: str) -> ExportError:
    return ExportError("export to gguf: the model", found=found, rule=rule, fix=LIKE)
