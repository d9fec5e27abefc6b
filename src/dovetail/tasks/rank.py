"""Rank classification: texts with labels as choices of a language model (ComPEFT, appendix B.1).

The model's log-likelihoods of all label words after the text are ranked, and the likeliest is the answer. It needs no
head, so one model answers classifications, multiple choice and questions, and a task needs no training at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from dovetail.errors import DataError
from dovetail.tasks.task import METRICS, Record, Task, renumbered

PROMPT = "{text}\nAnswer:"
PAIR_PROMPT = "{text}\n{pair}\nAnswer:"


def rank_classification(task: Task, words: Sequence[str], prompt: str | None = None) -> Task:
    """Return a classification as a task of choices, each label as its word.

    words    of the labels in their order: ["negative", "positive"]; a space joins them to the prompt. Labels that are
             texts are matched by their names where all of them are among the words
    prompt   with {text}, and {pair} where the records have one; PROMPT or PAIR_PROMPT when not given
    errors   DataError for a task of another kind, too few words, a prompt without {text}, or with a
             {pair} that records lack
    """
    where = f"task {task.name}"
    if task.kind != "classification":
        rule = "rank classification needs texts with integer labels"
        raise DataError(where, found=f"a {task.kind} task", rule=rule, fix="remove label_words")
    if prompt is not None and "{text}" not in prompt:
        rule, fix = "the prompt must contain {text}", 'write it as "{text}\\nAnswer:"'
        raise DataError(where, found=f"prompt {prompt!r}"[:200], rule=rule, fix=fix)
    paired = all("pair" in record for records in task.splits.values() for record in records)
    if prompt is not None and "{pair}" in prompt and not paired:
        rule, fix = (
            "a prompt with {pair} needs records with a second text",
            "remove {pair}, or name its column in fields",
        )
        raise DataError(where, found="records without a pair", rule=rule, fix=fix)
    if len(set(words)) < len(words) or not all(words):
        rule, fix = "label words must differ and not be empty", "name one word for each label"
        raise DataError(where, found=", ".join(words), rule=rule, fix=fix)
    if task.labels and set(task.labels) <= set(words):
        numbers = [words.index(label) for label in task.labels]
        splits = {split: renumbered(records, numbers) for split, records in task.splits.items()}
        task = replace(task, splits=splits)
    most = max(record["label"] for records in task.splits.values() for record in records)
    least = min(record["label"] for records in task.splits.values() for record in records)
    if least < 0 or most >= len(words):
        found, rule = f"labels from {least} to {most}, {len(words)} words", "each label must have a word"
        raise DataError(where, found=found, rule=rule, fix="number the labels from 0, and name all of their words")
    choices = [f" {word}" for word in words]

    def choice(record: Record) -> Record:
        form = prompt or (PAIR_PROMPT if "pair" in record else PROMPT)
        # In one pass: a text may hold {pair} itself.
        filled = re.sub(r"\{(text|pair)\}", lambda found: record[found[1]], form)
        return {"prompt": filled, "choices": choices, "label": record["label"]}

    splits = {split: [choice(record) for record in records] for split, records in task.splits.items()}
    return replace(task, kind="choice", metric=METRICS["choice"][0], splits=splits)
