"""A chain that `plan` calls legal can be applied, and one that it refuses cannot: the same rules hold in both."""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    FalconMambaConfig,
    Gemma3Config,
    Gemma3TextConfig,
    JetMoeConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import dovetail
from dovetail.errors import DovetailError
from dovetail.runs.plan import plan
from families import CONFIGS, ENCODERS, make
from small_runs import save_model

STATE = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128, "state_size": 8}
TEXT = {"vocab_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
OTHERS = {
    "mamba": lambda: MambaConfig(**STATE),
    "mamba2": lambda: Mamba2Config(**STATE, num_heads=4, head_dim=32, n_groups=1),
    "falcon_mamba": lambda: FalconMambaConfig(**STATE),
    "jetmoe": lambda: JetMoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_key_value_heads=2,
        kv_channels=16, num_local_experts=2, num_experts_per_tok=1,
    ),
    "gemma3_with_images": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, hidden_size=64, num_hidden_layers=1, head_dim=16), vision_config=VISION,
        mm_tokens_per_image=4,
    ),
    "bart": lambda: BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
    ),
}  # fmt: skip
CHAINS = [
    "wanda(0.5)", "int(bits=4, group=64)", "gptq(bits=4, group=96)", "lora(r=80)", "ria(0.5) >> lora(r=2) >> remask",
    "sparsegpt(pattern=2:4)", "vera(r=4)", "nf4(group=48)", "fp8 >> ia3", "lora(r=2) >> gptq(bits=4, group=32)",
]  # fmt: skip
TARGETS = ["all-linear", "up", "*proj", "*embed*", "*vision*", "*head*"]
CASES = list(zip([*CONFIGS, *OTHERS] * 3, islice(cycle(CHAINS), 72), islice(cycle(TARGETS), 72), strict=False))
CASES += [(name, text, "all-linear") for name in ("gemma3_with_images", "mamba") for text in CHAINS[:6]]


def real(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    if name in CONFIGS:
        return make(name)
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def refusal(call: Any) -> str:
    try:
        call()
    except DovetailError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "text", "targets"), CASES)
def test_plan_refuses_what_apply_refuses(name: str, text: str, targets: str) -> None:
    config = {**CONFIGS, **OTHERS}[name]()
    kind = "classification" if name in ENCODERS else "generation"
    planned = plan(text, config, targets=targets, task_kind=kind, memory=False, batch_size=2, length=12)
    model = real(name, config)
    ids = torch.randint(3, 120, (16, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
    refused = refusal(lambda: dovetail.apply(model, text, targets=targets, calibration=[batch] * 4))
    assert planned.legal == (not refused), f"plan: {planned.problem or 'legal'}\napply: {refused or 'legal'}"


QUANTIZED = [
    {"quant_method": "gptq", "bits": 4, "group_size": 32},
    {"quant_method": "awq", "bits": 4, "group_size": 32},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "hqq"},
    {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    {"quant_method": "a method of tomorrow"},
    {"bits": 4},
    {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    },
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", QUANTIZED, ids=lambda q: str(q.get("quant_method")))
def test_plan_refuses_what_load_and_apply_refuse_of_a_quantized_checkpoint(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    refused = refusal(lambda: dovetail.apply(dovetail.load(folder)[0], "lora(r=2)"))
    try:
        planned = plan("lora(r=2)", folder, memory=False).problem
    except DovetailError as error:
        planned = str(error)
    assert bool(planned) == bool(refused), f"plan: {planned or 'legal'}\napply: {refused or 'legal'}"
