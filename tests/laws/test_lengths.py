"""No row is longer than the model takes, and every row that is cut is counted."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from dovetail.tasks.lengths import length_limit
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from families import CONFIGS, ENCODERS, make
from small_models import WORDS, make_tokenizer, quiet
from unusual_models import MAKERS, unusual

LIMITS = {"mpt": 24, "xlm_roberta": 39, "mpnet": 38, "longformer": 38, "roberta": 129, "led": 32}
"""Their longest rows: positions may begin behind the padding's, and LED's encoder takes more than its decoder."""
HEADS = [*ENCODERS, "xlm_roberta", "mpnet", "longformer"]


def model_of(name: str) -> Any:
    return make(name) if name in CONFIGS else unusual(name)


def text(words: int) -> str:
    random = Random(words)
    return " ".join(random.choice(WORDS) for _ in range(words))


def task_of(name: str, words: int) -> Task:
    if name in HEADS:
        return Task("t", "classification", "accuracy", {"test": [{"text": text(words), "label": at} for at in (0, 1)]})
    return Task("t", "generation", "exact_match", {"test": [{"prompt": text(words), "answer": " one"}]})


@pytest.mark.parametrize("words", [3, 300])
@pytest.mark.parametrize("name", [*CONFIGS, *(name for name in MAKERS if name != "fnet")])
def test_rows_of_any_length_are_scored_and_cuts_are_counted(name: str, words: int) -> None:
    model, task = model_of(name), task_of(name, words)
    limit = length_limit(model, make_tokenizer(), 1024, task.split("test"))
    scores = evaluate(model, make_tokenizer(), task, progress=False)["t"]
    more = 0 if name in HEADS or model.config.is_encoder_decoder else 5
    assert scores.get("cut", 0) == (words > limit - more) * len(task.split("test"))


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_is_the_longest_row_that_runs(name: str) -> None:
    model = model_of(name)
    limit = length_limit(model, make_tokenizer(), 1024, task_of(name, 300).split("test"))
    assert limit == LIMITS[name]
    ids = torch.full((1, limit + 1), 5)
    more = {"decoder_input_ids": ids[:, :2]} if model.config.is_encoder_decoder else {}
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids, **more)
    model(input_ids=ids[:, :limit], **more)


@pytest.mark.parametrize("wanted", [8, 20, 1024])
@pytest.mark.parametrize("name", ["llama", "t5", "roberta"])
def test_a_training_counts_what_it_cuts(name: str, wanted: int) -> None:
    kind = "classification" if name == "roberta" else "generation"
    records = [{"text": text(words), "label": 0} if name == "roberta" else {"prompt": text(words), "answer": " one"}
               for words in (2, 15, 200)]  # fmt: skip
    model = make(name)
    limit = length_limit(model, make_tokenizer(), wanted, records)
    report = quiet(model, Task("t", kind, "accuracy" if name == "roberta" else "exact_match", {"train": records}),
                   max_length=wanted, max_steps=1)  # fmt: skip
    room = limit - (2 if name == "llama" else 0)
    assert report.cut == sum(words > room for words in (2, 15, 200))
