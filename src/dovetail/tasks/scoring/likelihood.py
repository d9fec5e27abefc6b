"""Scores from log-likelihoods: multiple choice, minimal pairs and perplexity.

Multiple choice is rank classification: the model's answer is the most likely choice after the prompt. The plain sum of
log-likelihoods favours short choices. Dividing it by the choice's length in characters, as evaluation harnesses do,
corrects this, but no longer measures what the model would say.

Minimal pairs: of two sentences that differ in one point, is the good one more likely? Sums of log-likelihoods are
compared without normalization, as is usual for minimal pairs.

Perplexity is exp of the mean negative log-likelihood of all tokens of all texts, each token counted once. A text longer
than a row continues in the next row with one token of context, which is cheaper than sliding windows and gives a
slightly higher perplexity. Compare perplexities only between models with one tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.task import Record


def score_choices(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy, by the sum of log-likelihoods, and accuracy_norm, per character. The first wins a tie."""
    prompts = [record["prompt"] for record in records for _ in record["choices"]]
    choices = [choice for record in records for choice in record["choices"]]
    sums = runner.log_likelihoods(runner.make.answers(prompts, choices, end=False))[0].tolist()
    per_character = [value / max(1, len(choice)) for value, choice in zip(sums, choices, strict=True)]
    ends = list(accumulate(len(record["choices"]) for record in records))
    right = norm_right = 0
    chosen = []
    for record, end in zip(records, ends, strict=True):
        places = range(end - len(record["choices"]), end)
        label = places[record["label"]]
        likeliest = max(places, key=sums.__getitem__)
        chosen.append(choices[likeliest])
        right += likeliest == label
        norm_right += max(places, key=per_character.__getitem__) == label
    return {"accuracy": right / len(records), "accuracy_norm": norm_right / len(records)}, chosen


def score_pairs(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy: the fraction of pairs whose good sentence is strictly more likely."""
    texts = [record["good"] for record in records] + [record["bad"] for record in records]
    good, bad = runner.log_likelihoods(runner.make.texts(texts, split=False))[0].chunk(2)
    right = good > bad
    said = [record["good" if better else "bad"] for record, better in zip(records, right.tolist(), strict=True)]
    return {"accuracy": right.double().mean().item()}, said


def score_text(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return perplexity, and nats_per_token, its logarithm; inf where exp would overflow."""
    texts = [record["text"] for record in records]
    sums, counts = runner.log_likelihoods(runner.make.texts(texts, split=True))
    nats = -(sums.sum() / counts.sum()).item()
    return {"perplexity": math.exp(nats) if nats < 700 else math.inf, "nats_per_token": nats}, []
