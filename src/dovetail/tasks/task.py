"""What to train and evaluate on: records of a known kind, in splits, checked before anything runs.

A task holds plain dictionaries. Its kind says which fields a record has, how training makes a loss of it and
how evaluation scores it:

| kind | fields | trained on | scored by |
|---|---|---|---|
| generation | prompt, answer | the answer's tokens | exact match of the greedy continuation |
| choice | prompt, choices, label (index) | the right choice's tokens | likelihood of the choices |
| pairs | good, bad | the good sentence | share of pairs whose good sentence is likelier |
| text | text | every token | perplexity |
| chat | messages, tools and template (optional) | the assistant's turns | perplexity, exact match of the last one |
| classification | text, pair (optional), label (int or str) | a head | accuracy, Matthews correlation |
| regression | text, pair (optional), label (float) | a head | Pearson and Spearman correlation |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dovetail.errors import DataError
from dovetail.progress import note_once
from dovetail.tasks.rules import Scoring
from dovetail.tasks.stored import RECORD, gathered

Record = Mapping[str, Any]

FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "generation": {"prompt": str, "answer": str},
    "choice": {"prompt": str, "choices": list, "label": int},
    "pairs": {"good": str, "bad": str},
    "text": {"text": str},
    "chat": {"messages": list},
    "classification": {"text": str, "label": (int, str)},
    "regression": {"text": str, "label": (int, float)},
}

OPTIONAL: dict[str, dict[str, type]] = {
    "chat": {"tools": list, "template": str},
    "classification": {"pair": str},
    "regression": {"pair": str},
}
"""Fields that records of a kind may have beside FIELDS. The messages of a chat are mappings with a `role` and a
`content` or `tool_calls`, as chat templates take them; `train: false` leaves a turn of the assistant out of the loss,
and `train: [[0, 5]]` leaves out the characters of its content that no pair [begin, end) has.
"""

METRICS: dict[str, tuple[str, ...]] = {
    "generation": ("exact_match",),
    "choice": ("accuracy",),
    "pairs": ("accuracy",),
    "text": ("perplexity",),
    "chat": ("perplexity", "exact_match"),
    "classification": ("accuracy", "matthews"),
    "regression": ("pearson", "spearman"),
}

HEAD_KINDS = ("classification", "regression")
"""The kinds whose tasks need a head on the model."""

LOWER_IS_BETTER = ("perplexity",)
"""Metrics whose smaller value is better."""

COUNTS = ("n", "cut", "windows")
"""Beside the scores: records; prompts and texts that were cut, if any; rows of texts, if some have several."""

MAX_LABELS = 1000
"""The most labels that are counted in the records, and the most names of labels: more are rather a mistake."""

MAX_VALUE = 1e18
"""The largest label in size: its square is a float32 still, and so is a squared error."""


@dataclass(frozen=True)
class Task:
    """Records for training and evaluation.

    name     shown in tables and reports
    kind     a key of FIELDS
    metric   the main metric of the task, one of METRICS[kind]
    splits   split name ("train", "validation", "test") -> records
    scoring  how they are scored
    labels   of a classification whose records have texts for labels: their names in the order of their numbers. Such
             records are numbered when the task is made, in the order of the names
    """

    name: str
    kind: str
    metric: str
    splits: Mapping[str, Sequence[Record]] = field(repr=False)
    scoring: Scoring = field(default_factory=Scoring)
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        if self.kind not in FIELDS:
            found, rule = f"kind={self.kind}", "kind must be one of " + ", ".join(FIELDS)
            raise DataError(where, found=found, rule=rule, fix="name one of these kinds")
        if self.metric not in METRICS[self.kind]:
            rule = f"the metric of a {self.kind} task must be " + " or ".join(METRICS[self.kind])
            raise DataError(where, found=f"metric={self.metric}", rule=rule, fix="name one of these metrics")
        for split, records in self.splits.items():
            if not records:
                rule = "a split must contain at least one record"
                raise DataError(f"{where}, split {split}", found="no records", rule=rule, fix="remove the split")
            for index, record in enumerate(records):
                check_record(f"{where}, split {split}, record {index}", self.kind, record)
        if self.kind == "classification":
            self._number_labels(where)

    def _number_labels(self, where: str) -> None:
        """Replace labels that are texts by their numbers."""
        seen = LabelTypes()
        for split, records in self.splits.items():
            for index, record in enumerate(records):
                seen.add(f"{where}, split {split}, record {index}", record["label"])
        if not seen.names:
            return
        names = sorted(seen.names)
        number = {name: at for at, name in enumerate(names)}
        note_once(
            f"{where}: the labels are numbered: " + ", ".join(f"{name} {at}" for name, at in number.items())[:500]
        )
        object.__setattr__(self, "labels", tuple(names))
        object.__setattr__(
            self, "splits", {split: renumbered(records, number) for split, records in self.splits.items()}
        )

    def split(self, name: str) -> Sequence[Record]:
        """Return the records of a split; DataError lists the splits."""
        if name not in self.splits:
            rule = "the splits of this task are " + ", ".join(self.splits)
            raise DataError(f"task {self.name}", found=f"split {name!r}", rule=rule, fix="name one of these splits")
        return self.splits[name]


class LabelTypes:
    """The labels of a classification seen so far: all of them texts, whose names are kept, or all of them numbers.

    `add` raises DataError for a label of the other type, an empty one, and more than MAX_LABELS names.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._numbers = False

    def add(self, where: str, label: Any) -> None:
        """Take the label of one more record."""
        if isinstance(label, str) and _is_number(label):
            rule, fix = "a label that is a number must not be a text", "write the number without quotes"
            raise DataError(where, found=f"label={label!r}"[:200], rule=rule, fix=fix)
        if not isinstance(label, str):
            self._numbers = True
        elif label:
            self.names.add(label)
        if (self.names and self._numbers) or label == "":
            rule = "the labels must be all numbers, or all texts that are not empty"
            raise DataError(where, found=f"label={label!r}"[:200], rule=rule, fix="correct the label")
        if len(self.names) > MAX_LABELS:
            found, rule = f"more than {MAX_LABELS} labels", "labels must be few, each for many records"
            raise DataError(where, found=found, rule=rule, fix="name another column as label, or train on answers")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def renumbered(records: Sequence[Record], number: Mapping[Any, int] | Sequence[int]) -> Sequence[Record]:
    """Return the records with another number for each label."""
    return gathered(({**record, "label": number[record["label"]]} for record in records), RECORD)


def check_record(where: str, kind: str, record: Record) -> None:
    """Raise DataError for a record without the fields of its kind, or with a value that no model can use."""
    optional = {name: type_ for name, type_ in OPTIONAL.get(kind, {}).items() if name in record}
    fields = FIELDS[kind] | optional
    for name, kinds in fields.items():
        if name not in record:
            raise DataError(
                where,
                found="fields " + ", ".join(map(str, record)),
                rule=f"a {kind} record must have a field {name!r}",
                fix="name the column that holds it under `fields:` of the recipe",
            )
        value = record[name]
        if not isinstance(value, kinds) or isinstance(value, bool):
            found, rule = f"{name}={value!r}"[:200], f"{name} must be of type {_type_name(kinds)}"
            fix = "replace each label by a number from 0" if name == "label" else f"convert {name} to that type"
            raise DataError(where, found=found, rule=rule, fix=fix)
    label, choices = record.get("label", 0), record.get("choices", [])
    if "label" in fields and not isinstance(label, str) and not abs(label) <= MAX_VALUE:
        rule = f"label must be finite and at most {MAX_VALUE:.0e} in magnitude"
        raise DataError(where, found=f"label={label!r}"[:200], rule=rule, fix="scale the labels")
    if kind == "choice" and not all(isinstance(choice, str) for choice in choices):
        found = f"choices={choices!r}"[:200]
        raise DataError(where, found=found, rule="choices must be a list of str", fix="convert the choices to text")
    if kind == "choice" and not 0 <= record["label"] < len(choices):
        found, rule = f"label={label}, {len(choices)} choices", "label must be the index of the correct choice"
        raise DataError(where, found=found, rule=rule, fix="number the choices from 0")
    if kind == "chat":
        _check_messages(where, record["messages"])
    for name, value in record.items():
        _check_unicode(where, name, value)


def _check_messages(where: str, messages: Sequence[Any]) -> None:
    """Raise DataError for what a chat template cannot render, or for a conversation without a turn to train."""
    fix = "write messages as [{role: user, content: ...}, {role: assistant, content: ...}]"
    for number, message in enumerate(messages):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            rule = "a message must be a mapping with a role"
            raise DataError(place, found=f"{message!r}"[:200], rule=rule, fix=fix)
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            found, rule = f"content={message.get('content')!r}"[:200], "content must be of type str"
            raise DataError(place, found=found, rule=rule, fix=fix)
        if not _is_train(message.get("train", True), len(message.get("content") or "")):
            rule = "train must be true, false, or pairs [begin, end) of characters of the content, in their order"
            found = f"train={message['train']!r}"[:200]
            raise DataError(place, found=found, rule=rule, fix="correct train, or leave it out")
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        found = f"{len(messages)} messages, none of them a turn of the assistant that is trained"
        rule = "a conversation must have a turn of the assistant"
        raise DataError(where, found=found, rule=rule, fix="leave the record out")


def _is_train(train: Any, length: int) -> bool:
    if isinstance(train, bool):
        return True
    if not isinstance(train, list) or not all(isinstance(part, list | tuple) and len(part) == 2 for part in train):
        return False
    ends = [end for part in train for end in part]
    whole = all(isinstance(end, int) and 0 <= end <= length for end in ends)
    return whole and ends == sorted(ends)


def _check_unicode(where: str, name: str, value: Any) -> None:
    """Raise DataError for a text that a tokenizer refuses."""
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_unicode(where, name, part)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"{name} with half a surrogate pair, U+{ord(value[error.start]):04X}"
            rule = "texts must consist of whole Unicode characters"
            raise DataError(where, found=found, rule=rule, fix="save the text as UTF-8 again") from None


def check_labels(where: str, records: Sequence[Record], num_labels: int, *, fix: str) -> None:
    """Raise DataError for a record whose label has no output in a head of `num_labels` outputs."""
    for index, record in enumerate(records):
        if not 0 <= record["label"] < num_labels:
            found, rule = f"label={record['label']}, num_labels={num_labels}", "labels must be from 0 to num_labels - 1"
            raise DataError(f"{where}, record {index}", found=found, rule=rule, fix=fix)


def _type_name(kinds: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in kinds) if isinstance(kinds, tuple) else kinds.__name__
