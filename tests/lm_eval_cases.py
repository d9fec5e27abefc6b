"""What Dovetail and lm-eval both score: tiny models, three kinds of tokenizers, four endings of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from small_tokenizers import SIZE, TOKENIZERS

__all__ = ["ENDINGS", "MODELS", "TOKENIZERS", "records"]

_IDS = {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENDINGS = ["", " ", "\n", "\n\n  "]
_CHOICES = [
    [" copper", " water and sunlight", " a chicken", " eight"],
    ["copper", "water", "eggs", "a star"],
    ["  the sun", " Ökologie été", " days"],
    [" a", "\nThe moon is not a star", "eight legs"],
]
_PROMPTS = ["Question: which of these is a metal? Answer:", "The sun is", "<s>Question: how many?", "A year has 365"]


def records(ending: str) -> list[dict[str, Any]]:
    """Every prompt with every list of choices."""
    return [
        {"prompt": prompt + ending, "choices": choices, "label": (at + number) % len(choices)}
        for at, prompt in enumerate(_PROMPTS)
        for number, choices in enumerate(_CHOICES)
    ]


def _llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        max_position_embeddings=512, **_IDS,
    )).eval()  # fmt: skip


def _t5() -> PreTrainedModel:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, initializer_factor=3.0,
        decoder_start_token_id=0, **_IDS,
    )).eval()  # fmt: skip


MODELS = {
    "llama": (_llama, "causal", None),
    "llama_begun": (_llama, "causal", "<s> $A"),
    "t5": (_t5, "seq2seq", "$A </s>"),
}
"""Name -> what makes the model, lm-eval's backend, and the marks that the tokenizer puts around texts."""
