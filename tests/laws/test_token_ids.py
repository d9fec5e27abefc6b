"""Every token id has a row in the embedding, or record, token and both sizes are named before the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dovetail
from dovetail.compression.calibration import calibration_batches
from dovetail.errors import DataError
from dovetail.runs.plan import widest_batch
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.tasks.vocabulary import vocabulary_of
from families import CONFIGS, ENCODERS, make
from small_models import make_tokenizer, quiet
from unusual_models import unusual

ADDED = "<|im_end|>"
TEXTS = ["one plus two is", f"three {ADDED} four is", "the sum of one is"]


def tokenizer_with_more(size: int) -> Any:
    """A tokenizer whose added token has the first id behind the embedding."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<filler {at}>" for at in range(size - len(tokenizer))])
    tokenizer.add_tokens([ADDED])
    assert tokenizer.convert_tokens_to_ids(ADDED) == size
    return tokenizer


def task_of(kind: str, *, added: bool = True) -> Task:
    texts = TEXTS if added else [text.replace(ADDED, "") for text in TEXTS]
    records: list[dict[str, Any]] = {
        "generation": [{"prompt": text, "answer": " one"} for text in texts],
        "choice": [{"prompt": "one is", "choices": [" one", " " + text], "label": 1} for text in texts],
        "pairs": [{"good": text, "bad": "one"} for text in texts],
        "text": [{"text": text} for text in texts],
        "classification": [{"text": text, "label": at % 2} for at, text in enumerate(texts)],
    }[kind]
    return Task("t", kind, dovetail.tasks.task.METRICS[kind][0], dict.fromkeys(("train", "test"), records))


def model_of(name: str) -> Any:
    return make(name) if name in CONFIGS else unusual(name)


KINDS = ["generation", "choice", "pairs", "text"]
NAMED = r"record 1\n.*'<\|im_end\|>' with id 128; the model's (embedding has 128 rows|head has 128 outputs)"
CASES = [(n, k) for n in ("llama", "gpt2", "bloom", "opt", "t5", "rwkv", "mamba") for k in KINDS]
CASES += [(n, "classification") for n in ENCODERS]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_token_without_a_row_is_named(name: str, kind: str) -> None:
    model, tokenizer, task = model_of(name), tokenizer_with_more(128), task_of(kind)
    with pytest.raises(DataError, match=NAMED) as caught:
        evaluate(model, tokenizer, task, progress=False)
    assert "resize" in caught.value.fix
    with pytest.raises(DataError, match=NAMED):
        quiet(model, task, tokenizer, max_steps=1)
    with pytest.raises(DataError, match=NAMED):
        calibration_batches(task, tokenizer, samples=3, seed=2, decoder_start=0 if name == "t5" else None,
                            vocabulary=vocabulary_of(model))  # fmt: skip
    with pytest.raises(DataError, match=NAMED):
        widest_batch(model, tokenizer, task, batch_size=2, max_length=64)
    evaluate(model, tokenizer, task_of(kind, added=False), progress=False)
    model.resize_token_embeddings(len(tokenizer))
    evaluate(model, tokenizer, task, progress=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_batches_to_calibrate_on_are_checked(name: str) -> None:
    model, tokenizer = make(name), tokenizer_with_more(128)
    batch = dict(tokenizer(TEXTS, return_tensors="pt", padding=True))
    batch.pop("token_type_ids", None)
    with pytest.raises(DataError, match=r"batch 1, row 1\n.*id 128; the model's embedding has 128 rows"):
        dovetail.apply(model, "wanda(0.5)", calibration=[{"input_ids": torch.ones(1, 4, dtype=torch.int64)}, batch])


@pytest.mark.parametrize("kind", ["generation", "text"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mamba"])
def test_a_padding_token_without_a_row_is_not_used(name: str, kind: str) -> None:
    """It is hidden by the mask, so any other token serves."""
    tokenizer = tokenizer_with_more(128)
    model, task = model_of(name), task_of(kind, added=False)
    wanted = evaluate(model, tokenizer, task, progress=False)["t"]
    tokenizer.pad_token = ADDED
    assert evaluate(model, tokenizer, task, progress=False)["t"] == pytest.approx(wanted)
    quiet(model, task, tokenizer, max_steps=1)
