"""A score depends neither on the batch size nor on padding: every row is scored as it is scored alone."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from dovetail.tasks.scoring import evaluate
from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Task
from families import CONFIGS, ENCODERS, make
from small_models import WORDS, make_tokenizer
from unusual_models import unusual

ALIKE = ["mistral", "qwen2", "gemma", "t5_gated"]  # they differ from another family in widths and activations only
DECODERS = [name for name in CONFIGS if name not in (*ENCODERS, *ALIKE)]
CHANGED_BY_PADDING = ["rwkv", "xlnet"]
UNUSUAL = [*CHANGED_BY_PADDING, "mamba", "mpt", "led", "longt5"]
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
    for size in (3, 7) if name in UNUSUAL else (3,):
        found, texts = outputs(model, task, size)
        assert texts == said
        assert found == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("name", [*DECODERS, *UNUSUAL])
def test_logits_that_no_label_needs_change_no_score(name: str) -> None:
    """The head runs on the tokens before the choices alone, in models that can leave out the others."""
    model = model_of(name).eval()
    records = [{"prompt": prompt, "choices": [" two", " one three four"]} for prompt in PROMPTS]
    kept, whole = (Runner(model, make_tokenizer(), "t", 3, 64, False) for _ in range(2))
    vars(whole)["_keeps_logits"] = False
    with torch.no_grad():
        (sums, counts), (all_sums, all_counts) = (
            runner.log_likelihoods(runner.make.choices(records, right=False)) for runner in (kept, whole)
        )
    assert counts.tolist() == all_counts.tolist()
    assert sums.tolist() == pytest.approx(all_sums.tolist(), rel=1e-5)
    assert kept._keeps_logits or name in ("t5", "bart", *UNUSUAL)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [2, 5, 7])
def test_padding_that_changes_rows_of_some_lengths_is_left_out(size: int, side: Literal["left", "right"]) -> None:
    """LongT5 sums up blocks of 4 tokens, which padding on the left by 4 tokens does not change."""
    model, lengths = unusual("longt5"), [1, 2, 3, 4, 5, 6, 7, 9, 12]
    rows = [{"input_ids": list(range(3, 3 + length))} for length in lengths]

    def outputs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        decoder_ids = torch.zeros(len(batch["input_ids"]), 2, dtype=torch.int64)
        return model(**batch, decoder_input_ids=decoder_ids).logits

    runner = Runner(model, make_tokenizer(), "t", size, 1024, progress=False)
    with torch.inference_mode():
        for chosen, batch in runner.batches(rows, side, outputs):
            for row, found in zip(chosen, outputs(batch), strict=True):
                alone = outputs({"input_ids": torch.tensor([rows[row]["input_ids"]])})[0]
                torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_an_encoder_reads_prompts_from_its_first_position(capsys: pytest.CaptureFixture[str]) -> None:
    model = unusual("led")
    task = Task("t", "generation", "exact_match", {"test": [{"prompt": p, "answer": " one"} for p in PROMPTS]})
    evaluate(model, make_tokenizer(), task)
    assert "change with the rest of its batch" not in capsys.readouterr().err


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
