"""Tiny GGUF files made with the gguf package's writer, in llama.cpp's conventions, from the models of `families`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import CONFIGS, VOCABULARY

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3",
    "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
"""Family -> the architecture of its GGUF file."""
UNWRITTEN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128}, "gemma2": {"query_pre_attn_scalar": 256}, "gemma3": {"query_pre_attn_scalar": 256},
    "gpt2": {"n_positions": 1024},
}  # fmt: skip
"""Family -> values that a file does not hold, or that transformers does not read: they must be the defaults."""


def make_plain(family: str) -> PreTrainedModel:
    """Return the tiny model of a family, with default values of what a GGUF file does not tell transformers."""
    config = CONFIGS[family]()
    for key, value in UNWRITTEN.get(family, {}).items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def _metadata(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    text = config.to_dict()
    heads = config.num_attention_heads
    writer.add_name(f"a {name}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(text.get("intermediate_size") or 4 * config.hidden_size)
    writer.add_head_count(heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = text["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    size = text.get("head_dim") or config.hidden_size // heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    if name == "llama":
        writer.add_rope_dimension_count(size)
    if text.get("sliding_window"):
        writer.add_sliding_window(text["sliding_window"])


def _vocabulary(writer: gguf.GGUFWriter, architecture: str) -> None:
    """Write a vocabulary of letters with one merge: SentencePiece's for Gemma, else byte-level."""
    pieces = architecture.startswith("gemma")
    letters = [chr(at) for at in range(ord("!"), ord("~") + 1)]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *letters, "▁" if pieces else "Ġ", "ab"]
    tokens += [f"<extra_{at}>" for at in range(VOCABULARY - len(tokens))]
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    if pieces:
        writer.add_token_scores([-float(at) for at in range(VOCABULARY)])
    else:
        writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_chat_template(TEMPLATE)


def _stored(architecture: str, name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Return a weight as llama.cpp's converter stores it."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + 1
    transposed = ("attn_qkv.weight", "ffn_up.weight", "ffn_down.weight", "attn_output.weight")
    return weight.T if architecture == "gpt2" and name.endswith(transposed) else weight


def random_blocks(shape: tuple[int, int], kind: gguf.GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """Blocks of random codes and factors, whose float16 scales are of the size of a model's: uint8 (o, row bytes)."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    numbers = np.random.default_rng(seed)
    blocks = numbers.integers(0, 256, (shape[0] * shape[1] // block, nbytes), dtype=np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,))
    for place in at:
        scale = numbers.uniform(0.0001, 0.0002, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    family: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    keys: Mapping[str, int] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Write a model as a GGUF file, with further keys; matrices get the type `kind`, vectors float32.

    kinds  part of a tensor's name -> its type in place of `kind`; types that the gguf package does not quantize to get
           random blocks
    """
    architecture = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, architecture)
    _metadata(writer, model.config, family)
    _vocabulary(writer, architecture)
    for key, value in (keys or {}).items():
        writer.add_uint32(key, value)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        weight = np.ascontiguousarray(_stored(architecture, name, tensor.float().numpy(), model.config))
        own = next((each for part, each in (kinds or {}).items() if part in name), kind)
        if weight.ndim > 1 and own is gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, weight.astype(np.float16))
        elif weight.ndim > 1 and own is not gguf.GGMLQuantizationType.F32:
            try:
                blocks = gguf.quantize(weight, own)
            except NotImplementedError:
                blocks = random_blocks(weight.shape, own, len(name))
            writer.add_tensor(name, blocks, raw_dtype=own)
        else:
            writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
