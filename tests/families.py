"""Tiny random models of every family that the tests speak of: two layers, made from configs, no downloads.

`FAMILIES[name]()` makes the same model each time (seeded, float32, eval mode); `batch(model)` is an input that it
takes and `logits(model, inputs)` what it answers. Needs a few hundred kilobytes and some milliseconds each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

VOCABULARY, HIDDEN, FEEDFORWARD, LAYERS, HEADS = 128, 64, 128, 2, 4

# Shared by the decoders whose configs use Llama's names. Grouped-query attention (2 key-value heads for 4 heads), so
# that query and key differ in shape.
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEEDFORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = _LLAMA | {"head_dim": 16}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEEDFORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": FEEDFORWARD,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_END = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_GEMMA),
    "gemma": lambda: GemmaConfig(**_GEMMA),
    "gemma2": lambda: Gemma2Config(**_GEMMA, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, query_pre_attn_scalar=16),
    "phi3": lambda: Phi3Config(**_LLAMA),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=128, **_END
    ),
    "gpt_neox": lambda: GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEEDFORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        **_END,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=FEEDFORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        **_END,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS, **_END),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, **_END
    ),
    "mixtral": lambda: MixtralConfig(**_LLAMA, num_local_experts=2),
    "t5": lambda: T5Config(**_T5),
    "t5_gated": lambda: T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_BERT, bos_token_id=1, eos_token_id=2),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        hidden_dim=FEEDFORWARD,
        n_layers=LAYERS,
        n_heads=HEADS,
        max_position_embeddings=128,
        pad_token_id=0,
    ),
}
ENCODERS = ("bert", "roberta", "distilbert")


@functools.cache
def _made(name: str, seed: int) -> PreTrainedModel:
    config = CONFIGS[name]()
    if name in ENCODERS:
        auto = AutoModelForSequenceClassification
    elif config.is_encoder_decoder:
        auto = AutoModelForSeq2SeqLM
    else:
        auto = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


def make(name: str, *, seed: int = 0) -> PreTrainedModel:
    """The tiny model of family `name`, float32, eval mode; encoders carry a classification head of 2 labels."""
    return copy.deepcopy(_made(name, seed))  # in half the time of making it again


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: (lambda name=name: make(name)) for name in CONFIGS}


def batch(model: PreTrainedModel, *, rows: int = 2, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """A valid input: input_ids and attention_mask, both int64 (rows, tokens); decoder_input_ids for T5.

    The last row ends in two padding tokens, which the mask hides; tokens 0 to 2 (pad, begin, end) occur nowhere else.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids_bt = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask_bt = torch.ones_like(input_ids_bt)
    input_ids_bt[-1, -2:], mask_bt[-1, -2:] = 0, 0
    inputs = {"input_ids": input_ids_bt, "attention_mask": mask_bt}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, tokens // 2), generator=generator)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits: (rows, tokens, vocabulary), or (rows, labels) where it carries a classification head."""
    return model(**inputs).logits


def move(model: nn.Module, by: float = 0.05, seed: int = 3) -> None:
    """Adds noise to every adapter parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".links." in name:
                parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
