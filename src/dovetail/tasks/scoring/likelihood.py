"""Scores from log-likelihoods: multiple choice, minimal pairs and perplexity.

Multiple choice is rank classification: the model's answer is the most likely choice after the prompt. The plain sum of
log-likelihoods favours short choices. Dividing it by the choice's length in characters corrects this, but no longer
measures what the model would say. Both follow lm-eval 0.4 (`acc`, `acc_norm`): its split of prompt and choice, and its
length, which does not count the space that joins every choice of a record to the prompt (lm-eval's target_delimiter).
An encoder-decoder whose tokenizer begins texts with a token (BART) is scored after that token, as it is trained.

Minimal pairs: of two sentences that differ in one point, is the good one more likely? Sums of log-likelihoods are
compared without normalization, as is usual for minimal pairs.

Perplexity is exp of the mean negative log-likelihood of all tokens of all texts, each token counted once. A text longer
than a row continues in the next row with one token of context: the windows are disjoint, not rolling, and `windows`
counts them. Rolling windows, with more context for each token, give a slightly lower perplexity. lm-eval's are disjoint
too, up to the last one, which it fills with context; its perplexities are per word or byte. Compare perplexities only
between models with one tokenizer, on windows of one length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from dovetail.progress import note
from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.task import Record


def score_choices(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy, by the sum of log-likelihoods, and accuracy_norm, per character. The first wins a tie."""
    choices = [choice for record in records for choice in record["choices"]]
    lengths = [length for record in records for length in _lengths(record["choices"])]
    sums = runner.log_likelihoods(runner.make.choices(records, right=False))[0].tolist()
    per_character = [value / max(1, length) for value, length in zip(sums, lengths, strict=True)]
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


def _lengths(choices: Sequence[str]) -> list[int]:
    """Return the characters of each choice, without the space that joins all of them to the prompt."""
    joined = all(choice.startswith(" ") for choice in choices)
    return [len(choice) - joined for choice in choices]


def score_pairs(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy: the fraction of pairs whose good sentence is strictly more likely."""
    texts = [record["good"] for record in records] + [record["bad"] for record in records]
    good, bad = runner.log_likelihoods(runner.make.texts(texts, split=False))[0].chunk(2)
    right = good > bad
    said = [record["good" if better else "bad"] for record, better in zip(records, right.tolist(), strict=True)]
    return {"accuracy": right.double().mean().item()}, said


def score_text(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return perplexity (inf where exp would overflow), nats_per_token, and windows if there are more than texts."""
    texts = [record["text"] for record in records]
    rows = runner.make.texts(texts, split=True)
    sums, counts = runner.log_likelihoods(rows)
    nats = -(sums.sum() / counts.sum()).item()
    scores: dict[str, float] = {"perplexity": math.exp(nats) if nats < 700 else math.inf, "nats_per_token": nats}
    if len(rows) == len(texts):
        return scores, []
    said = f"{runner.name}: {len(texts)} texts are scored in {len(rows)} disjoint windows of {runner.max_length} tokens"
    note(f"{said}, not in rolling windows", shown=runner.progress)
    return scores | {"windows": len(rows)}, []
