"""Minimal pairs: of two sentences that differ in one thing, does the model find the good one likelier?

Sums of log-likelihoods are compared, unnormalised, as is usual for minimal pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import text_rows


def score_pairs(runner: Runner, records: Sequence[Record]) -> dict[str, float]:
    """accuracy: the share of pairs whose good sentence is strictly likelier."""
    texts = [record["good"] for record in records] + [record["bad"] for record in records]
    rows = text_rows(
        texts, runner.tokenizer, encoder_decoder=runner.encoder_decoder, max_length=runner.max_length, split=False
    )
    good, bad = runner.log_likelihoods(rows)[0].chunk(2)
    return {"accuracy": (good > bad).double().mean().item()}
