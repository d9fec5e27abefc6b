"""Multiple choice by rank classification: the model's answer is the choice that it finds likeliest after the prompt.

The plain sum of log-likelihoods favours short choices; dividing it by the choice's length in characters (as the
evaluation harnesses do) makes up for that, and no longer asks what the model would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Record
from dovetail.tasks.tokens import answer_rows


def score_choices(runner: Runner, records: Sequence[Record]) -> dict[str, float]:
    """accuracy: by the sum of log-likelihoods; accuracy_norm: by that sum per character. The first wins a tie."""
    prompts = [record["prompt"] for record in records for _ in record["choices"]]
    choices = [choice for record in records for choice in record["choices"]]
    rows = answer_rows(
        prompts,
        choices,
        runner.tokenizer,
        encoder_decoder=runner.encoder_decoder,
        max_length=runner.max_length,
        end=False,
    )
    sums = runner.log_likelihoods(rows)[0].tolist()
    per_character = [value / max(1, len(choice)) for value, choice in zip(sums, choices, strict=True)]
    ends = list(accumulate(len(record["choices"]) for record in records))
    right = norm_right = 0
    for record, end in zip(records, ends, strict=True):
        places = range(end - len(record["choices"]), end)
        label = places[record["label"]]
        right += max(places, key=sums.__getitem__) == label
        norm_right += max(places, key=per_character.__getitem__) == label
    return {"accuracy": right / len(records), "accuracy_norm": norm_right / len(records)}
