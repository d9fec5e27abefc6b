"""A model that computes NaN or infinity has no score: one error names the first module whose output is not finite."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import dovetail
from dovetail.cli.main import main
from dovetail.errors import DataError, DovetailError, NotFinite, TrainError
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from families import CONFIGS, ENCODERS, make
from small_models import make_tokenizer, quiet

PROMPTS = ["one plus two", "three", "the sum of one plus four is"]
TASKS = {
    "generation": Task("t", "generation", "exact_match", {
        split: [{"prompt": p, "answer": " one"} for p in PROMPTS] for split in ("train", "test")
    }),
    "choice": Task("t", "choice", "accuracy", {
        split: [{"prompt": p, "choices": [" one", " two"], "label": 0} for p in PROMPTS] for split in ("train", "test")
    }),
    "pairs": Task("t", "pairs", "accuracy", {"test": [{"good": p, "bad": "of " + p} for p in PROMPTS]}),
    "text": Task("t", "text", "perplexity", {"test": [{"text": p} for p in PROMPTS]}),
    "classification": Task("t", "classification", "accuracy", {
        split: [{"text": p, "label": at % 2} for at, p in enumerate(PROMPTS)] for split in ("train", "test")
    }),
}  # fmt: skip
BAD = {
    "llama": "model.norm",
    "qwen3": "model.layers.1.self_attn.q_norm",
    "gpt2": "transformer.h.0.ln_1",
    "opt": "model.decoder.layers.1.fc1",
    "gpt_neox": "gpt_neox.layers.0.attention.dense",
    "t5": "encoder.final_layer_norm",
    "bert": "bert.encoder.layer.1.output.dense",
    "distilbert": "classifier",
}
VALUES = {"nan": float("nan"), "inf": float("inf")}
CASES = [(name, kind) for name in BAD for kind in TASKS if (kind == "classification") == (name in ENCODERS)]


def spoiled(name: str, value: str):
    model = make(name)
    with torch.no_grad():
        next(model.get_submodule(BAD[name]).parameters()).view(-1)[0] = VALUES[value]
    return model


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_score(name: str, kind: str, value: str) -> None:
    with pytest.raises(NotFinite, match=rf"first returned by {BAD[name]}, whose \w+ is not finite"):
        evaluate(spoiled(name, value), make_tokenizer(), TASKS[kind], progress=False)


@pytest.mark.parametrize("chain", [None, "lora(r=2)"])
@pytest.mark.parametrize("name", BAD)
def test_no_training(name: str, chain: str | None) -> None:
    model = spoiled(name, "nan")
    if chain is not None:
        dovetail.apply(model, chain, targets="query" if name == "opt" else "all-linear")
    task = TASKS["classification" if name in ENCODERS else "generation"]
    with pytest.raises(TrainError, match=r"first returned by \S+, whose \S+ is not finite") as caught:
        quiet(model, task, max_steps=2)
    assert "step 1" in caught.value.where


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if bad not in ("model.norm", "classifier")])
def test_no_calibration(name: str) -> None:
    model, tokenizer = spoiled(name, "nan"), make_tokenizer()
    batch = dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :2]
    with pytest.raises(DovetailError):
        dovetail.apply(model, "wanda(0.5)", calibration=[batch])


def test_a_norm_that_is_not_finite_is_named_by_calibration() -> None:
    model, tokenizer = spoiled("gpt2", "nan"), make_tokenizer()
    with pytest.raises(DataError, match=r"first returned by transformer.h.0.ln_1, whose weight"):
        dovetail.apply(model, "wanda(0.5)", calibration=[dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_overflow_in_half_precision_is_named(name: str) -> None:
    model = make(name).half()
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ in ("Linear", "Conv1D"):
                module.weight.fill_(60.0)
        model.get_input_embeddings().weight.fill_(300.0)
    with pytest.raises(NotFinite, match="first returned by") as caught:
        evaluate(model, make_tokenizer(), TASKS["text"], progress=False)
    assert "larger range" in caught.value.fix


def test_masked_tokens_of_a_vocabulary_are_no_fault() -> None:
    """A head may hold minus infinity for tokens that are never said."""
    model = make("gpt_neox")
    bias = torch.zeros(model.config.vocab_size)
    bias[50:] = -torch.inf
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output + bias)
    for kind in ("generation", "choice", "text"):
        evaluate(model, make_tokenizer(), TASKS[kind], progress=False)


def test_the_command_line_ends_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = dovetail.load("playground")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["dovetail", "evaluate", str(tmp_path), "--task", "multiple_choice", "--limit", "8"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "first returned by model.norm, whose weight is not finite" in capsys.readouterr().err


assert set(BAD) <= set(CONFIGS)
