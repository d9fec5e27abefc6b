"""A weight that is held while a model is only read gives the same bits as one that is made in every forward pass."""

from __future__ import annotations

import pytest
import torch

from dovetail import apply, train
from dovetail.chains.layer.linear import chain_layers
from dovetail.tasks import holding as module
from dovetail.tasks.holding import holding
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from families import batch, logits, make, move
from small_models import llama, make_tokenizer

CHAINS = [
    "nf4", "nf4 >> lora(r=2)", "int(bits=4, group=32) >> lora(r=2) >> regrid", "fp8 >> ia3",
    "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=2) >> remask >> regrid", "wanda(0.5) >> dora(r=2) >> remask",
    "int(bits=4, group=32) >> loha(r=2)", "lora(r=2, elastic=[2, 1])",
]  # fmt: skip
RECORDS = [{"prompt": "one plus two is", "answer": " three"}, {"prompt": "two is", "answer": " two"}]
SUMS = Task("sums", "generation", "exact_match", {"train": RECORDS, "test": RECORDS})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_outputs_are_the_same_bits(chain: str, dtype: torch.dtype) -> None:
    model = make("llama").to(dtype)
    apply(model, chain, calibration=[batch(model)])
    move(model)
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        before = model(ids).logits
        with holding(model):
            assert any(layer.held_nbytes for layer in chain_layers(model).values()) or chain.startswith("lora")
            held = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, held)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_of_every_layout(name: str) -> None:
    model = apply(make(name), "int(bits=4, group=0) >> lora(r=2) >> regrid").eval()
    move(model)
    inputs = batch(model)
    with torch.inference_mode():
        before = logits(model, inputs)
        with holding(model):
            assert torch.equal(logits(model, inputs), before)


def test_training_after_scoring_moves_the_weight() -> None:
    model = apply(llama(), "int(bits=4, group=32) >> lora(r=2) >> regrid")
    first = evaluate(model, make_tokenizer(), SUMS, progress=False)
    train(model, make_tokenizer(), SUMS, max_steps=4, batch_size=2, lr_scale=20, progress=False)
    ids = torch.arange(6).view(1, 6)
    with torch.inference_mode():
        alone = model.eval()(ids).logits
        with holding(model):
            assert torch.equal(model(ids).logits, alone)
    assert first.keys() == evaluate(model, make_tokenizer(), SUMS, progress=False).keys()
    assert all(layer._held is None and layer.base._held is None for layer in chain_layers(model).values())


def test_nothing_is_held_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply(llama(), "nf4 >> lora(r=2)")
    needed = sum(layer.held_nbytes for layer in chain_layers(model).values())
    monkeypatch.setattr(module, "free_memory", lambda device: 2 * needed - 1)
    with holding(model):
        assert all(layer.base._held is None for layer in chain_layers(model).values())


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    assert module.free_memory(torch.device("cpu")) > 0
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 250\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert module.free_memory(torch.device("cpu")) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert module.free_memory(torch.device("cpu")) > 350
