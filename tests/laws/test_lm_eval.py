"""Scores that bear the names of lm-eval's are lm-eval's: the same tokens, log-likelihoods, `acc` and `acc_norm`.

Two architectures, three kinds of tokenizers, four endings of the prompt, 16 records each; lm-eval's numbers were made
by golden/lm_eval_reference.py.
"""

from __future__ import annotations

import json

import pytest
import torch

from dovetail.tasks.scoring import evaluate
from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED
from lm_eval_cases import ENDINGS, MODELS, TOKENIZERS, records
from places import GOLDEN

WANTED = json.loads((GOLDEN / "lm_eval.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("model_name", MODELS)
def test_choices_are_scored_as_lm_eval_scores_them(model_name: str, name: str, ending: str) -> None:
    make, backend, form = MODELS[model_name]
    model, tokenizer = make(), TOKENIZERS[name](form)
    wanted = WANTED[f"{model_name}, {name}, {ending!r}"]
    kept = [(record, theirs) for record, theirs in zip(records(ending), wanted, strict=True) if theirs is not None]
    assert len(kept) >= 8
    runner = Runner(model, tokenizer, "choices", batch_size=5, max_length=512, progress=False)
    rows = runner.make.choices([record for record, _ in kept], right=False)
    for row, (context, continuation) in zip(
        rows, (pair for _, theirs in kept for pair in theirs["split"]), strict=True
    ):
        labels = [label for label in row["labels"] if label != IGNORED]
        assert labels == continuation
        assert row["input_ids"] == (context if backend == "seq2seq" else context + continuation)
    with torch.inference_mode():
        sums, _ = runner.log_likelihoods(rows)
    assert sums.tolist() == pytest.approx([value for _, theirs in kept for value in theirs["sums"]], rel=1e-4)
    task = Task("choices", "choice", "accuracy", {"test": [record for record, _ in kept]})
    scores = evaluate(model, tokenizer, task, progress=False)["choices"]
    accuracy, norm = (sum(theirs["right"][at] for _, theirs in kept) / len(kept) for at in (0, 1))
    assert scores == {"accuracy": accuracy, "accuracy_norm": norm, "n": len(kept)}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_lm_eval_refuses_is_scored(name: str, ending: str) -> None:
    """A choice that only lengthens the prompt's last token has tokens of its own."""
    task = Task("choices", "choice", "accuracy", {"test": records(ending)})
    assert evaluate(MODELS["llama"][0](), TOKENIZERS[name](), task, progress=False)["choices"]["n"] == 16


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_row_that_is_trained_is_the_row_that_is_scored(ending: str) -> None:
    model, tokenizer = MODELS["llama"][0](), TOKENIZERS["pieces"]("<s> $A")
    make = Runner(model, tokenizer, "choices", batch_size=5, max_length=512, progress=False).make
    chosen = records(ending)
    scored = iter(make.choices(chosen, right=False))
    rows = [[next(scored) for _ in record["choices"]][record["label"]] for record in chosen]
    end = [tokenizer.eos_token_id]
    assert make.examples("choice", chosen) == [{name: ids + end for name, ids in row.items()} for row in rows]
