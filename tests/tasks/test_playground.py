"""The embedded model loads with stock transformers, and the tasks are what the page says they are."""

import json
import random

import pytest
import torch
from corpus import documents, held_out, parts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dovetail.errors import DataError
from dovetail.tasks.playground import MODEL_DIR, TASKS, TEXT_FIELDS, task
from dovetail.tasks.playground.grammar import PHENOMENA
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


def test_model_is_small_and_float32(model):
    assert 0.5e6 < model.num_parameters() < 4e6
    assert sum(file.stat().st_size for file in MODEL_DIR.glob("*.safetensors")) <= 8 * 2**20
    assert json.loads((MODEL_DIR / "config.json").read_text())["dtype"] == "float32"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert all(
        layer.in_features % 128 == 0 and layer.out_features % 128 == 0
        for layer in model.model.modules()
        if isinstance(layer, nn.Linear)
    )


def test_tokenizer_round_trip(tokenizer):
    texts = [task("perplexity").split("test")[0]["text"], "42 ünd 7 — naïve? \n x", "The fox  has\t40 nuts."]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_one_token_a_digit(tokenizer):
    ids = tokenizer("12345 67 8")["input_ids"]
    assert [tokenizer.decode([i]).strip() for i in ids if tokenizer.decode([i]).strip()] == list("12345678")


def test_special_tokens(tokenizer, model):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert None not in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("name", ["word_problems", "multiple_choice"])
def test_prompt_and_answer_tokens_concatenate(name, tokenizer):
    for record in task(name).split("test"):
        for answer in record.get("choices", [record.get("answer")]):
            apart = tokenizer(record["prompt"])["input_ids"] + tokenizer(answer)["input_ids"]
            assert tokenizer(record["prompt"] + answer)["input_ids"] == apart


@pytest.mark.parametrize("name", TASKS)
def test_task_is_deterministic_and_sized(name):
    first = task(name)
    assert isinstance(first, Task)
    assert first.name == name
    task.cache_clear()
    again = task(name)
    assert again is not first
    assert again.splits == first.splits
    assert {split: len(records) for split, records in again.splits.items()} == {
        "train": 4000, "validation": 250, "test": 500,
    }  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_text(name):
    splits = {
        split: {record[field] for record in records for field in TEXT_FIELDS if field in record}
        for split, records in task(name).splits.items()
    }
    assert splits["train"].isdisjoint(splits["validation"] | splits["test"])
    assert splits["validation"].isdisjoint(splits["test"])


def test_pretraining_shows_nothing_held_out():
    stream = documents(0, held_out())
    assert all(held_out().isdisjoint(parts(next(stream))) for _ in range(20_000))
    told = "The fox has 9 nuts. The fox finds 3 more. Then the fox loses 2 nuts. Now the fox has 10 nuts."
    asked = told.rpartition(". ")[0] + ". How many nuts does the fox have now?"
    assert parts(told)[2] == parts(f"Question: {asked}\nAnswer:")[2]


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_minimal_pairs_differ(phenomenon):
    rng = random.Random(0)
    for _ in range(500):
        good, bad = phenomenon(rng)
        assert good != bad
        assert good.endswith(".")


def test_unknown_task_is_refused():
    with pytest.raises(DataError, match="word_problems"):
        task("haiku")


def test_base_has_something_to_learn(model, tokenizer):
    assert evaluate(model, tokenizer, "word_problems", split="validation")["word_problems"]["exact_match"] <= 0.4
    assert evaluate(model, tokenizer, "perplexity", split="validation")["perplexity"]["perplexity"] < 6
