"""A score depends neither on the batch size nor on padding: every row is scored as it is scored alone."""

from __future__ import annotations

import pytest
import torch

from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from families import CONFIGS, ENCODERS, make
from small_models import WORDS, make_tokenizer
from unusual_models import unusual

DECODERS = [name for name in CONFIGS if name not in ENCODERS]
CHANGED_BY_PADDING = ["rwkv", "xlnet"]
UNUSUAL = [*CHANGED_BY_PADDING, "mamba", "mpt", "led"]
PROMPTS = [" ".join(WORDS[at % 14] for at in range(start, start + length)) for start, length in
           [(0, 1), (3, 7), (5, 2), (1, 4), (8, 4), (2, 9), (11, 1)]]  # fmt: skip


def model_of(name: str):
    if name in CONFIGS:
        model = make(name)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
        return model
    return unusual(name)


def outputs(model, task: Task, batch_size: int):
    said: dict[str, list[str]] = {}
    scores = evaluate(model, make_tokenizer(), task, batch_size=batch_size, progress=False, on_outputs=said.__setitem__)
    return scores[task.name], said[task.name]


@pytest.mark.parametrize("kind", ["generation", "text"])
@pytest.mark.parametrize("name", [*DECODERS, *UNUSUAL])
def test_a_language_model_scores_the_same_in_batches_of_any_size(name: str, kind: str) -> None:
    model = model_of(name)
    if kind == "generation":
        alone = Task("t", kind, "exact_match", {"test": [{"prompt": p, "answer": " one two"} for p in PROMPTS]})
        records = [
            {"prompt": p, "answer": said + " one"} for p, said in zip(PROMPTS, outputs(model, alone, 1)[1], strict=True)
        ]
        task = Task("t", kind, "exact_match", {"test": records})
    else:
        task = Task("t", kind, "perplexity", {"test": [{"text": text} for text in PROMPTS]})
    scores, said = outputs(model, task, 1)
    for size in (3, 7):
        found, texts = outputs(model, task, size)
        assert texts == said
        assert found == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("size", [2, 5, 7])
@pytest.mark.parametrize("name", [*ENCODERS, "fnet"])
def test_a_head_scores_the_same_in_batches_of_any_size(name: str, size: int) -> None:
    task = Task(
        "t",
        "classification",
        "accuracy",
        {"test": [{"text": text, "label": at % 2} for at, text in enumerate(PROMPTS)]},
    )
    model = model_of(name)
    assert outputs(model, task, size) == outputs(model, task, 1)


@pytest.mark.parametrize("name", CHANGED_BY_PADDING)
def test_it_is_said_where_padding_is_left_out(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = Task("t", "generation", "exact_match", {"test": [{"prompt": p, "answer": " one"} for p in PROMPTS]})
    evaluate(unusual(name), make_tokenizer(), task)
    assert "change with the rest of its batch" in capsys.readouterr().err
