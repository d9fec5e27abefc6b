"""Outputs are compared before and after every merge of a Hugging Face model, on a batch made from its configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import dovetail
from dovetail.errors import CannotMerge
from dovetail.models import targets
from dovetail.models.probe import probe_batch
from families import CONFIGS, FAMILIES, move

SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
SEQUENCE = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
TOKENS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 32, "patch_size": 8}
OTHERS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **IMAGE)),
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(**SEQUENCE, **TOKENS, max_source_positions=50, num_mel_bins=16, decoder_start_token_id=1)
    ),
    "wav2vec2": lambda: Wav2Vec2ForCTC(
        Wav2Vec2Config(**SMALL, vocab_size=32, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SEQUENCE, **TOKENS, max_position_embeddings=64)),
    "deberta": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, vocab_size=128)),
    "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=128, d_model=64, n_layer=1, n_head=4, d_inner=128)),
}
EVERY = {**FAMILIES, **OTHERS, **{f"{n}-body": (lambda n=n: AutoModel.from_config(CONFIGS[n]())) for n in CONFIGS}}


def merged(model: nn.Module, text: str) -> dovetail.MergeReport:
    dovetail.apply(model.eval(), text)
    move(model)
    return dovetail.merge(model)


@pytest.mark.parametrize("name", EVERY)
def test_outputs_are_compared(name: str) -> None:
    torch.manual_seed(0)
    report = merged(EVERY[name](), "magnitude(0.5) >> lora(r=4) >> remask")
    assert report.max_abs_logit_diff == 0
    assert report.exact


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_the_batch_is_the_same_each_time_and_holds_no_padding(name: str) -> None:
    model = EVERY[name]()
    first, second = probe_batch(model), probe_batch(model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    if "input_ids" in first and name != "bart":
        assert not bool((first["input_ids"] == model.config.pad_token_id).any())


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_computes_something_else_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba multiplies by the weight of dt_proj without calling the layer, which targets would refuse."""
    monkeypatch.setattr(targets, "reads_weight", lambda parent, child: False)
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=8, time_step_rank=16)
    ).eval()
    report = merged(model, "magnitude(0.5) >> lora(r=4) >> remask")
    assert not report.exact
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff > 0


def test_a_model_that_takes_more_is_refused_with_the_way_out() -> None:
    """CLIP needs an image beside its token ids."""
    parts = {"text_config": {**SMALL, **TOKENS}, "vision_config": {**SMALL, **IMAGE}}
    with pytest.raises(CannotMerge, match="pass probe="):
        merged(CLIPModel(CLIPConfig(**parts)), "lora(r=4)")
