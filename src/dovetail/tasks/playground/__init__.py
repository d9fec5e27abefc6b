"""An embedded language model and tasks to tune it on, so that Dovetail works offline.

The records of the tasks are drawn from the generator. Each text occurs in one split only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from dovetail.errors import DataError
from dovetail.tasks.playground.generator import PAGE, any_story, as_prompt, choice_question, document
from dovetail.tasks.playground.grammar import minimal_pair
from dovetail.tasks.task import Record, Task

MODEL_DIR = Path(__file__).parent / "model"
"""The pretrained model, a standard Hugging Face checkpoint."""

SIZES = {"train": 4000, "validation": 250, "test": 500}
"""Records in each split."""


def _word_problem(rng: Random) -> dict[str, Any]:
    story = any_story(rng, 2)
    return {"prompt": as_prompt(f"{story.text} {story.question}"), "answer": f" {story.answer}"}


def _multiple_choice(rng: Random) -> dict[str, Any]:
    question, choices, label = choice_question(rng)
    return {"prompt": as_prompt(question), "choices": choices, "label": label}


def _acceptability(rng: Random) -> dict[str, Any]:
    return minimal_pair(rng)._asdict()


def _acceptability_label(rng: Random) -> dict[str, Any]:
    label = rng.randrange(2)
    pair = minimal_pair(rng)
    return {"text": pair.good if label else pair.bad, "label": label}


def _text(rng: Random) -> dict[str, Any]:
    # Several documents to a record: perplexity over a few tokens would say little.
    return {"text": "\n".join(document(rng) for _ in range(PAGE))}


MAKERS: dict[str, tuple[str, str, Callable[[Random], dict[str, Any]]]] = {
    "word_problems": ("generation", "exact_match", _word_problem),
    "multiple_choice": ("choice", "accuracy", _multiple_choice),
    "acceptability": ("pairs", "accuracy", _acceptability),
    "acceptability_labels": ("classification", "accuracy", _acceptability_label),
    "perplexity": ("text", "perplexity", _text),
}
"""Task name -> its kind, its metric and what makes a record."""

TASKS: tuple[str, ...] = tuple(MAKERS)
"""The names that `task` knows."""


@cache
def task(name: str) -> Task:
    """Return a task of the playground, always with the same records; DataError lists the known tasks.

    No text is in two splits: test and validation are drawn first, and what they hold is left out of train.
    """
    if name not in MAKERS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1)
        fix = f"did you mean {near[0]}?" if near else "name one of them, or a recipe with data of its own"
        raise DataError("playground", found=f"task {name!r}", rule="the tasks are " + ", ".join(TASKS), fix=fix)
    kind, metric, make = MAKERS[name]
    taken: set[Hashable] = set()
    splits: dict[str, list[Record]] = {}
    for split in ("test", "validation", "train"):
        rng = Random(f"task {name} {split}")
        records: list[Record] = []
        while len(records) < SIZES[split]:
            record = make(rng)
            texts = [record[field] for field in TEXT_FIELDS if field in record]
            if taken.isdisjoint(texts):
                taken.update(texts)
                records.append(record)
        splits[split] = records
    return Task(name, kind, metric, {split: splits[split] for split in SIZES})


TEXT_FIELDS = ("prompt", "good", "bad", "text")
