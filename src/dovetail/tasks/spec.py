"""The `data` part of a recipe: where the records of a task come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from dovetail.tasks.task import FIELDS, METRICS

Positive = Annotated[int, Field(ge=1)]


class Part(pydantic.BaseModel):
    """A part of a recipe: no unknown keys, no changes."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for the number 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"true and false (yes, no, on, off) are no value of {info.field_name}")
        return value


class Limit(Part):
    """Only the first so many records of a split."""

    train: Positive | None = None
    validation: Positive | None = None
    test: Positive | None = None

    def of(self, split: str) -> int | None:
        """Return the limit of a split, or None."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


class Data(Part):
    """Where a task's records come from: the playground (`task`), or files (`dovetail.tasks.files`).

    task                     name of a task of the playground; then nothing else but `limit`
    name                     shown in tables; the folder's name when not given
    train, validation, test  files, relative to the recipe
    kind, metric             `dovetail.tasks`; metric: the kind's first when not given
    fields                   the task's field -> the file's column, where they differ
    num_labels               of a classification; as many as the records have when not given
    limit                    split -> only its first so many records
    """

    task: str | None = None
    name: str | None = None
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    kind: Literal["generation", "choice", "pairs", "text", "classification", "regression"] | None = None
    metric: str | None = None
    fields: dict[str, str] = {}
    num_labels: Annotated[int, Field(ge=2)] | None = None
    limit: Limit = Limit()

    @property
    def files(self) -> dict[str, Path]:
        """Split -> file, of those that are named."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: path for split, path in named.items() if path is not None}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> Data:
        if self.task is not None:
            others = [name for name in self.model_fields_set if name not in ("task", "limit") and getattr(self, name)]
            if others:
                raise ValueError(f"a playground task takes no {sorted(others)[0]}: name a task, or files")
            return self
        if not self.files:
            raise ValueError("name a playground task (task: word_problems), or files (train: train.jsonl, ...)")
        if self.kind is None:
            raise ValueError("files need a kind: " + ", ".join(FIELDS))
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            raise ValueError(f"the metric of a {self.kind} task must be " + " or ".join(METRICS[self.kind]))
        known = [*FIELDS[self.kind], *(["pair"] if self.kind in ("classification", "regression") else [])]
        for name in self.fields:
            if name not in known:
                raise ValueError(f"a {self.kind} record has no field {name!r}; it has " + ", ".join(known))
        return self


def at_folder(data: Data, folder: Path) -> Data:
    """Make paths absolute, relative ones from `folder`, and fill in what has a default."""
    if data.task is not None or data.kind is None:
        return data
    paths = {split: (folder / path.expanduser()).resolve() for split, path in data.files.items()}
    update = {
        "name": data.name or next(iter(paths.values())).parent.name,
        "metric": data.metric or METRICS[data.kind][0],
    }
    return data.model_copy(update={**paths, **update})
