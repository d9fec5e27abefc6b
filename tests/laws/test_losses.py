"""A reported loss is the mean over the counted labels, and nothing else: every number is a label of a regression, and
what a model adds to its loss is reported apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, Collator, encode
from families import make
from small_models import PAD, bert, make_tokenizer, quiet, sum_records

_SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
_EXPERTS = {**_SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "output_router_logits": True}
MOE = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_EXPERTS, num_local_experts=4, router_aux_loss_coef=0.5)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(
        **_EXPERTS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        router_aux_loss_coef=0.5,
    )),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(
        **_EXPERTS, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5,
    )),
}  # fmt: skip
RECORDS = sum_records(8)
TASK = Task("sums", "generation", "exact_match", {"train": RECORDS, "validation": RECORDS})


def without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def nats(model: Any) -> float:
    """The mean negative log-likelihood of the labels, from the logits."""
    encoder_decoder = model.config.is_encoder_decoder
    rows = encode("generation", RECORDS, make_tokenizer(), encoder_decoder=encoder_decoder, max_length=64)
    batch = Collator(PAD)(rows)
    labels = batch["labels"]
    if not encoder_decoder:
        labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    logits = logits if encoder_decoder else logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", [*MOE, "llama", "gpt2", "t5", "gemma2"])
def test_the_loss_of_a_step_is_that_of_its_labels(name: str, accumulation: int) -> None:
    torch.manual_seed(0)
    model = MOE[name]() if name in MOE else make(name)
    without_dropout(model)
    expected = nats(model)
    report = quiet(model, TASK, batch_size=8 // accumulation, gradient_accumulation=accumulation, max_steps=1,
                   evaluate_every=1, learning_rate=1e-12)  # fmt: skip
    (stage,) = report.stages
    assert stage.losses == [(1, pytest.approx(expected, rel=1e-4))]
    assert stage.evaluations[0][1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert bool(stage.auxiliary_losses) == (name in MOE)
    assert all(loss > 0.01 for _, loss in stage.auxiliary_losses)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("value", [-100.0, 0.0, -99.0])
def test_every_number_is_a_label(value: float, accumulation: int) -> None:
    records = [{"text": r["prompt"], "label": value if at % 2 else 3.5} for at, r in enumerate(RECORDS)]
    task = Task("values", "regression", "pearson", {"train": records, "validation": records})
    model = bert(1).eval()
    without_dropout(model)
    tokenizer = make_tokenizer()
    said = torch.stack([model(**tokenizer(r["text"], return_tensors="pt")).logits[0, 0] for r in records]).detach()
    expected = F.mse_loss(said, torch.tensor([r["label"] for r in records])).item()
    report = quiet(model, task, batch_size=8 // accumulation, gradient_accumulation=accumulation, max_steps=1,
                   evaluate_every=1, learning_rate=1e-12)  # fmt: skip
    assert report.stages[0].losses == [(1, pytest.approx(expected, rel=1e-4))]
    assert report.stages[0].evaluations[0][1]["loss"] == pytest.approx(expected, rel=1e-4)
