"""Labels that are texts, "positive" and "negative", as the numbers of a head's outputs.

A task numbers its labels from 0 in the order of their names. A model's config keeps the names (`id2label`), so that
other data with the same names are scored by the model's own numbers, whichever labels they contain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dovetail.errors import DataError
from dovetail.progress import note_once
from dovetail.tasks.task import Task, renumbered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NO_NAME = re.compile(r"LABEL_\d+")
"""What transformers calls an output without a name."""


def name_labels(config: PreTrainedConfig, labels: Sequence[str]) -> None:
    """Name the outputs of a model that is trained on these labels, unless its own names contain all of them."""
    known = _names(config)
    if not labels or set(labels) <= set(known):
        return
    if own := [name for name in known if not _NO_NAME.fullmatch(name)]:
        note_once(f"the model's labels {', '.join(own)[:200]} are replaced by {', '.join(labels)[:200]}")
    names = dict(enumerate(labels))
    names |= {number: f"LABEL_{number}" for number in range(len(labels), config.num_labels or 0)}
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}


def as_model_labels(task: Task, config: PreTrainedConfig) -> Task:
    """Return the task with the model's labels and numbers for its records; a task of numbers unchanged.

    Raises DataError for a label that the model does not name.
    """
    names = _names(config)
    if not task.labels or tuple(names) == task.labels:
        return task
    if strange := [label for label in task.labels if label not in names]:
        named = [name for name in names if not _NO_NAME.fullmatch(name)]
        raise DataError(
            f"task {task.name}",
            found=f"label {strange[0]!r}; the model has " + (", ".join(named)[:200] or "no names of labels"),
            rule="labels that are texts must be names that the model gives its outputs",
            fix="train the model on them, set id2label in its config, or replace each label by a number from 0",
        )
    numbers = [names.index(label) for label in task.labels]
    splits = {split: renumbered(records, numbers) for split, records in task.splits.items()}
    return replace(task, splits=splits, labels=tuple(names))


def _names(config: PreTrainedConfig) -> list[str]:
    known = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return [known[number] for number in sorted(known)]
