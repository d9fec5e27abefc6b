"""The first training row is printed with the tokens that count, and kept."""

from __future__ import annotations

import pytest

from dovetail.tasks.tokens import IGNORED, MAX_STRETCH, rendered
from dovetail.training.train import train
from small_models import llama, make_tokenizer, sum_records, t5


@pytest.mark.parametrize("make", [llama, t5])
def test_the_first_row_of_training(make, capfd: pytest.CaptureFixture[str]) -> None:
    records = sum_records(8)
    report = train(make(), make_tokenizer(), records, max_steps=1)
    (prompt, counts), (answer, counted) = report.rendered
    assert (counts, counted) == (False, True)
    assert records[0]["prompt"].strip() in prompt
    assert answer.strip() == f"{records[0]['answer'].strip()} </s>"
    assert f"{prompt}⟦{answer}⟧" in capfd.readouterr().err
    train(make(), make_tokenizer(), records, max_steps=1, progress=False)
    assert capfd.readouterr().err == ""


def test_long_stretches_are_shortened() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("one " * 1000 + "two")["input_ids"]
    (long, _), (short, counted) = rendered(tokenizer, {"input_ids": ids, "labels": [IGNORED] * 1000 + ids[-1:]})
    assert len(long) < MAX_STRETCH + 5
    assert (short, counted) == ("two", True)
    assert rendered(tokenizer, {"input_ids": ids, "labels": 1}) == []
