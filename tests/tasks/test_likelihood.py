"""Scores of choices from given log-likelihoods."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dovetail.tasks.rules import Scoring
from dovetail.tasks.scoring.likelihood import score_choices
from dovetail.tasks.tokens import RowMaker
from small_models import make_tokenizer


def test_accuracy_norm_divides_by_characters_not_by_bytes() -> None:
    """Four characters in eight bytes at -6 are less likely for each character than eight ASCII ones at -10."""
    runner = SimpleNamespace(
        make=RowMaker(make_tokenizer(), False, 64),
        scoring=Scoring(),
        log_likelihoods=lambda rows: (torch.tensor([-6.0, -10.0]),),
    )
    record = {"prompt": "one plus two is", "choices": ["éééé", "nine six"], "label": 1}
    scores, _ = score_choices(runner, [record])
    assert scores == {"accuracy": 0.0, "accuracy_norm": 1.0}
