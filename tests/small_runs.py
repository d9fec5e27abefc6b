"""A model and data files small enough to run a whole recipe in a second or two."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from dovetail.studies.cells import Job, Outcome
from small_models import bert, llama, make_tokenizer

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MAIN = "wanda(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid"


def save_model(folder: Path, *, labels: int = 0) -> Path:
    """A Llama, or with labels a BERT, with two layers and random weights; an ordinary checkpoint."""
    model = bert(labels) if labels else llama()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_sums(folder: Path) -> dict[str, Any]:
    """Files of sums in words, and the recipe's data part for them."""
    random = Random(0)
    rows = []
    for _ in range(60):
        a, b = random.randint(1, 4), random.randint(1, 4)
        question = "the sum of " * random.randint(1, 3) + f"{NUMBERS[a - 1]} plus {NUMBERS[b - 1]} is"
        rows.append({"question": question, "answer": " " + NUMBERS[a + b - 1]})
    write_lines(folder / "train.jsonl", rows[:40])
    write_lines(folder / "test.jsonl", rows[40:])
    return {
        "name": "sums", "kind": "generation", "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"),
        "fields": {"prompt": "question"},
    }  # fmt: skip


def save_labels(folder: Path) -> dict[str, Any]:
    """Files of sentences with two labels, and the recipe's data part for them."""
    random = Random(0)
    rows = []
    for _ in range(40):
        words = random.choices(NUMBERS, k=random.randint(2, 6))
        rows.append({"sentence": " ".join(words), "other": random.choice(NUMBERS), "label": int("three" in words)})
    write_lines(folder / "labels.jsonl", rows)
    return {
        "name": "labels", "kind": "classification", "metric": "matthews", "train": str(folder / "labels.jsonl"),
        "validation": str(folder / "labels.jsonl"), "fields": {"text": "sentence", "pair": "other"},
    }  # fmt: skip


def small_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The main job on a small model and small data, four steps of training."""
    return {
        "model": str(save_model(folder / "base")),
        "chain": MAIN,
        "data": save_sums(folder),
        "train": {"max_steps": 4, "batch_size": 8, "checkpoint_every": 2},
        "calibration": {"samples": 16},
        **changes,
    }


def cells_in_this_process(todo: Sequence[Job], jobs: int, turns: Any) -> Iterator[Outcome | str]:
    """Do the cells of a study one after the other, as `run_cells` does in processes, which take seconds to start."""
    left = list(todo)
    while left:
        found = turns.take(left)
        if isinstance(found, Outcome):
            yield found
        elif found is None:
            time.sleep(0.05)
        else:
            yield found.slug
            outcome = Job.model_validate_json(found.model_dump_json()).done()
            turns.end(outcome)
            yield outcome
