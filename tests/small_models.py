"""Models, a tokenizer and tasks small enough to train for a few steps: two layers, a vocabulary of 18 words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from dovetail.tasks.task import Task
from dovetail.training.train import train
from dovetail.training.trainer import StageTrainer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "plus", "is", "the", "sum", "of"]
PAD, BEGIN, END, UNKNOWN = range(4)


def make_tokenizer(*, begin: bool = False, end: bool = False) -> PreTrainedTokenizerFast:
    """Words at spaces; a begin or end token around texts on request."""
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin or end:
        form = ("<s> " if begin else "") + "$A" + (" </s>" if end else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=form, pair=form + " $B", special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SIZES = {"vocab_size": 4 + len(WORDS), "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        max_position_embeddings=64, **SIZES,
    ))  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=PAD, initializer_factor=3.0,
        **SIZES,
    ))  # fmt: skip


def bert(labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=labels,
        initializer_range=0.5, **SIZES,
    ))  # fmt: skip


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _sum(random: Random) -> dict[str, str]:
    a, b = random.randint(1, 4), random.randint(1, 4)
    more = "the sum of " * random.randint(1, 3)
    return {"prompt": f"{more}{NUMBERS[a - 1]} plus {NUMBERS[b - 1]} is", "answer": " " + NUMBERS[a + b - 1]}


def sum_records(rows: int) -> list[dict[str, str]]:
    random = Random(0)
    return [_sum(random) for _ in range(rows)]


SUMS = Task("sums", "generation", "exact_match", {"train": sum_records(72), "validation": sum_records(20)})
LABELS = Task("labels", "classification", "accuracy", {
    "train": [{"text": r["prompt"], "label": int("three" in r["prompt"])} for r in sum_records(72)],
})  # fmt: skip
VALUES = Task("values", "regression", "pearson", {
    "train": [{"text": r["prompt"], "label": NUMBERS.index(r["answer"].strip()) / 8} for r in sum_records(72)],
})  # fmt: skip


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quiet(model, data, tokenizer=None, **settings):
    return train(model, tokenizer or make_tokenizer(), data, **{"batch_size": 8, "progress": False, **settings})


@contextmanager
def training_killed_at(batch: int) -> Iterator[None]:
    """Stop training with a KeyboardInterrupt before this batch, counted from 1, and expect that it stops the block."""
    step, count = StageTrainer.training_step, itertools.count(1)

    def killed(*args, **kwargs):
        if next(count) == batch:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            yield
