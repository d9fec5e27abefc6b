"""Scores from log-likelihoods: multiple choice, minimal pairs and perplexity.

Multiple choice is rank classification: the model's answer is the most likely choice after the prompt. The plain sum of
log-likelihoods favours short choices. Dividing it by the choice's length in characters corrects this, but no longer
measures what the model would say. Both follow lm-eval 0.4 (`acc`, `acc_norm`): its split of prompt and choice, and its
length, which does not count the space that joins every choice of a record to the prompt (lm-eval's target_delimiter).
`Scoring.normalize` counts bytes (lm-eval's acc_bytes) or tokens instead.
An encoder-decoder whose tokenizer begins texts with a token (BART) is scored after that token, as it is trained.

Minimal pairs: of two sentences that differ in one point, is the good one more likely? Sums of log-likelihoods are
compared without normalization, as is usual for minimal pairs.

Perplexity is exp of the mean negative log-likelihood of all tokens of all texts, each token counted once. A text longer
than a row continues in the next row with one token of context: the windows are disjoint, and `windows` counts them.
Sliding windows (`Scoring.stride`) give each token more context, and a slightly lower perplexity; a stride of the whole
window gives lm-eval's rolling windows, which are disjoint up to the last one. Perplexities per token can be compared
between models with one tokenizer only. word_perplexity, byte_perplexity and bits_per_byte (those of lm-eval's wikitext)
divide the same sum by the words and UTF-8 bytes of the texts. The windows must have one length in each comparison.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import accumulate

from dovetail.progress import note
from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import IGNORED


def score_choices(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy, by the sum of log-likelihoods, and accuracy_norm, per unit of length. The first wins a tie."""
    choices = [choice for record in records for choice in record["choices"]]
    rows = runner.make.choices(records, right=False)
    sums = runner.log_likelihoods(rows)[0].tolist()
    unit = runner.scoring.normalize
    lengths = [length for record in records for length in _lengths(record["choices"], unit == "bytes")]
    if unit == "tokens":
        lengths = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    normalized = [value / max(1, length) for value, length in zip(sums, lengths, strict=True)]
    ends = list(accumulate(len(record["choices"]) for record in records))
    right = norm_right = 0
    chosen = []
    for record, end in zip(records, ends, strict=True):
        places = range(end - len(record["choices"]), end)
        label = places[record["label"]]
        likeliest = max(places, key=sums.__getitem__)
        chosen.append(choices[likeliest])
        right += likeliest == label
        norm_right += max(places, key=normalized.__getitem__) == label
    return {"accuracy": right / len(records), "accuracy_norm": norm_right / len(records)}, chosen


def _lengths(choices: Sequence[str], in_bytes: bool) -> list[int]:
    """Return the characters or bytes of each choice, without the space that joins all of them to the prompt."""
    joined = all(choice.startswith(" ") for choice in choices)
    return [len(choice.encode() if in_bytes else choice) - joined for choice in choices]


def score_pairs(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return accuracy: the fraction of pairs whose good sentence is strictly more likely."""
    texts = [record["good"] for record in records] + [record["bad"] for record in records]
    good, bad = runner.log_likelihoods(runner.make.texts(texts, split=False))[0].chunk(2)
    right = good > bad
    said = [record["good" if better else "bad"] for record, better in zip(records, right.tolist(), strict=True)]
    return {"accuracy": right.double().mean().item()}, said


def score_text(runner: Runner, records: Sequence[Record]) -> Scored:
    """Return perplexities (inf where exp would overflow), nats_per_token, bits_per_byte; windows if more than texts."""
    texts, stride = [record["text"] for record in records], runner.scoring.stride
    rows = runner.make.texts(texts, split=True) if stride is None else runner.make.windows(texts, stride)
    sums, counts = runner.log_likelihoods(rows)
    total = -sums.sum().item()
    # lm-eval's wikitext counts words in this way.
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    nbytes = sum(len(text.encode()) for text in texts)
    nats = total / counts.sum().item()
    scores: dict[str, float] = {
        "perplexity": _exp(nats),
        "nats_per_token": nats,
        "word_perplexity": _exp(total / words),
        "byte_perplexity": _exp(total / nbytes),
        "bits_per_byte": total / nbytes / math.log(2),
    }
    if len(rows) == len(texts):
        return scores, []
    how = "disjoint windows" if stride is None else f"windows, {stride} tokens apart,"
    said = f"{runner.name}: {len(texts)} texts are scored in {len(rows)} {how} of {runner.max_length} tokens"
    note(said, shown=runner.progress)
    return scores | {"windows": len(rows)}, []


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
