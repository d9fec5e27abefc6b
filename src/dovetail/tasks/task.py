"""What to train and evaluate on: records of a known kind, in splits, checked before anything runs.

A task holds plain dictionaries. Its kind says which fields a record has, how training makes a loss of it and
how evaluation scores it:

| kind | fields | trained on | scored by |
|---|---|---|---|
| generation | prompt, answer | the answer's tokens | exact match of the greedy continuation |
| choice | prompt, choices, label (index) | the right choice's tokens | likelihood of the choices |
| pairs | good, bad | the good sentence | share of pairs whose good sentence is likelier |
| text | text | every token | perplexity |
| classification | text, pair (optional), label (int) | a head | accuracy, Matthews correlation |
| regression | text, pair (optional), label (float) | a head | Pearson and Spearman correlation |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.errors import DataError

Record = Mapping[str, Any]

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "generation": {"prompt": str, "answer": str},
    "choice": {"prompt": str, "choices": list, "label": int},
    "pairs": {"good": str, "bad": str},
    "text": {"text": str},
    "classification": {"text": str, "label": int},
    "regression": {"text": str, "label": (int, float)},
}

METRICS: dict[str, tuple[str, ...]] = {
    "generation": ("exact_match",),
    "choice": ("accuracy",),
    "pairs": ("accuracy",),
    "text": ("perplexity",),
    "classification": ("accuracy", "matthews"),
    "regression": ("pearson", "spearman"),
}

LOWER_IS_BETTER = ("perplexity",)
"""Metrics whose smaller value is better."""

MAX_VALUE = 1e18
"""The largest label in size: its square is a float32 still, and so is a squared error."""


@dataclass(frozen=True)
class Task:
    """Records for training and evaluation.

    name     shown in tables and reports
    kind     a key of FIELDS
    metric   the main metric of the task, one of METRICS[kind]
    splits   split name ("train", "validation", "test") -> records
    """

    name: str
    kind: str
    metric: str
    splits: Mapping[str, Sequence[Record]] = field(repr=False)

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        if self.kind not in FIELDS:
            raise DataError(where, found=f"kind={self.kind}", rule="kind must be one of " + ", ".join(FIELDS))
        if self.metric not in METRICS[self.kind]:
            raise DataError(
                where,
                found=f"metric={self.metric}",
                rule=f"a {self.kind} task is measured by " + " or ".join(METRICS[self.kind]),
            )
        for split, records in self.splits.items():
            if not records:
                raise DataError(
                    f"{where}, split {split}", found="no records", rule="a split must contain at least one record"
                )
            for index, record in enumerate(records):
                _check(f"{where}, split {split}, record {index}", self.kind, record)

    def split(self, name: str) -> Sequence[Record]:
        """Return the records of a split; DataError lists the splits."""
        if name not in self.splits:
            raise DataError(
                f"task {self.name}",
                found=f"split {name!r}",
                rule="the splits of this task are " + ", ".join(self.splits),
            )
        return self.splits[name]


def _check(where: str, kind: str, record: Record) -> None:
    for name, kinds in FIELDS[kind].items():
        if name not in record:
            raise DataError(
                where,
                found="fields " + ", ".join(map(str, record)),
                rule=f"a {kind} record must have a field {name!r}",
                fix="name the column that holds it under `fields:` of the recipe",
            )
        value = record[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise DataError(where, found=f"{name}={value!r}"[:200], rule=f"{name} is of type {_type_name(kinds)}")
    for name, value in record.items():
        _check_value(where, name, value)
    if kind == "choice" and not 0 <= record["label"] < len(record["choices"]):
        raise DataError(
            where,
            found=f"label={record['label']}, {len(record['choices'])} choices",
            rule="label must be the index of the correct choice",
        )


def _check_value(where: str, name: str, value: Any) -> None:
    """Raise DataError for a label too large for a loss, or text that a tokenizer refuses."""
    if name == "label" and not abs(value) <= MAX_VALUE:
        raise DataError(
            where, found=f"label={value!r}"[:200], rule=f"label must be finite, at most {MAX_VALUE:.0e} in size"
        )
    for text in value if isinstance(value, list) else [value]:
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError as error:
            found = f"{name} with half a surrogate pair, U+{ord(text[error.start]):04X}"
            raise DataError(where, found=found, rule="texts must consist of whole Unicode characters") from None


def _type_name(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in kinds) if isinstance(kinds, tuple) else kinds.__name__
