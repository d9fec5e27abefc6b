"""Tiny models that differ from the families in what they do with padding, positions or their outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    FNetConfig,
    FNetForSequenceClassification,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForSequenceClassification,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

_ENCODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_SIDES = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_END = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "rwkv": lambda: RwkvForCausalLM(
        RwkvConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, intermediate_size=64, **_END)
    ),
    "xlnet": lambda: XLNetLMHeadModel(
        XLNetConfig(vocab_size=128, d_model=32, n_layer=2, n_head=2, d_inner=64, **_END)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8, **_END)
    ),
    "mpt": lambda: MptForCausalLM(
        MptConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=2, max_seq_len=24, expansion_ratio=2)
    ),
    "led": lambda: LEDForConditionalGeneration(
        LEDConfig(
            vocab_size=128, d_model=32, **_SIDES, max_encoder_position_embeddings=32, attention_window=4,
            max_decoder_position_embeddings=28, decoder_start_token_id=2, **_END,
        )
    ),
    "longt5": lambda: LongT5ForConditionalGeneration(
        LongT5Config(
            vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, local_radius=3,
            global_block_size=4, encoder_attention_type="transient-global", decoder_start_token_id=0, pad_token_id=0,
            eos_token_id=1,
        )
    ),
    "fnet": lambda: FNetForSequenceClassification(
        FNetConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, intermediate_size=64, **_END)
    ),
    "xlm_roberta": lambda: XLMRobertaForSequenceClassification(XLMRobertaConfig(**_ENCODER, **_END)),
    "mpnet": lambda: MPNetForSequenceClassification(MPNetConfig(**_ENCODER, pad_token_id=1)),
    "longformer": lambda: LongformerForSequenceClassification(
        LongformerConfig(**_ENCODER, pad_token_id=1, attention_window=4)
    ),
}  # fmt: skip


def unusual(name: str) -> PreTrainedModel:
    """The tiny model of that name, float32, eval mode, with weights large enough that its outputs differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[name]().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model
