"""A task head trains beside the chain, whatever the task; the head of a language model does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    ViTConfig,
)

import dovetail
from dovetail.checkpoint.adapter import load_adapter, save_adapter
from dovetail.models.targets import new_heads
from dovetail.training.optimizer import trained_parts
from families import CONFIGS, make

AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
    "choices": AutoModelForMultipleChoice,
}
CASES = [(name, task) for name in ("bert", "roberta", "distilbert") for task in AUTO]
CASES += [(name, task) for name in ("gpt2", "llama", "qwen3", "t5", "bloom", "falcon", "mistral")
          for task in ("sequence", "tokens", "answers") if (name, task) != ("t5", "tokens")]  # fmt: skip


def model_of(name: str, task: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "vit":
        config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                           image_size=16, patch_size=8)  # fmt: skip
        return AutoModelForImageClassification.from_config(config)
    return AUTO[task].from_config(CONFIGS[name]())


def head_of(model: Any) -> set[str]:
    """The parameters outside the body."""
    if model.base_model is model:
        return {name for name, _ in model.named_parameters() if name.startswith("qa_outputs.")}
    body = {id(p) for p in model.base_model.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in body}


@pytest.mark.parametrize(("name", "task"), [*CASES, ("vit", "images")])
def test_a_task_head_trains_and_is_saved(name: str, task: str, tmp_path: Path) -> None:
    model = model_of(name, task).eval()
    head = head_of(model)
    assert head
    dovetail.apply(model, "lora(r=2)")
    trained = {path for path, p in model.named_parameters() if p.requires_grad}
    assert {path for path in trained if ".links." not in path} == head
    assert "heads" in trained_parts(model)
    with torch.no_grad():
        for path in trained:
            model.get_parameter(path).add_(0.25)
    save_adapter(model, tmp_path)
    again = model_of(name, task).eval()
    load_adapter(again, tmp_path)
    for path in head:
        assert torch.equal(again.get_parameter(path), model.get_parameter(path))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "t5_gated", "opt", "mixtral"])
def test_the_head_of_a_language_model_stays(name: str) -> None:
    model = dovetail.apply(make(name), "lora(r=2)")
    assert new_heads(model) == []
    assert all(".links." in path for path, p in model.named_parameters() if p.requires_grad)


def test_the_head_of_masked_language_modelling_stays() -> None:
    model = dovetail.apply(AutoModelForMaskedLM.from_config(CONFIGS["bert"]()), "lora(r=2)")
    assert all(".links." in path for path, p in model.named_parameters() if p.requires_grad)
