"""Perplexity: exp of the mean negative log-likelihood of all tokens of all texts, each token counted once.

A text longer than a row goes on in the next one with one token of context: cheaper than sliding windows, and a
little higher. Perplexities compare only between models of one tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import text_rows


def score_text(runner: Runner, records: Sequence[Record]) -> dict[str, float]:
    """perplexity, and nats_per_token, its logarithm; inf where exp would overflow."""
    rows = text_rows(
        [record["text"] for record in records],
        runner.tokenizer,
        encoder_decoder=runner.encoder_decoder,
        max_length=runner.max_length,
        split=True,
    )
    sums, counts = runner.log_likelihoods(rows)
    nats = -(sums.sum() / counts.sum()).item()
    return {"perplexity": math.exp(nats) if nats < 700 else math.inf, "nats_per_token": nats}
