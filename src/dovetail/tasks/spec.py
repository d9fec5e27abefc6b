"""The `data` part of a recipe: where the records of a task come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

from dovetail.tasks.formats import FORMATS
from dovetail.tasks.presets import PRESETS, metric_of
from dovetail.tasks.rules import Scoring
from dovetail.tasks.task import FIELDS, METRICS
from dovetail.tasks.templates import TEMPLATES

Positive = Annotated[int, Field(ge=1)]


class Part(pydantic.BaseModel):
    """A part of a recipe: no unknown keys, no changes."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for the number 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
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

    task                     name of a task of the playground; then nothing else but `limit` and `scoring`
    name                     shown in tables; the folder's name when not given
    train, validation, test  files or folders, relative to the recipe; of a data set, its names of the splits
    dataset, subset          name of a data set of the hub, or a folder of one, and of its configuration
    preset                   name of a data set that papers use (`dovetail.tasks.presets`): its schema, and where no
                             file is named, its place on the hub
    format                   `dovetail.tasks.formats`; found by the columns of the first row when not given
    kind                     in place of a format: the columns are the fields of a record of this kind
    metric                   the kind's first when not given
    template                 of conversations (`dovetail.tasks.templates`); the tokenizer's own when not given
    fields                   the field of the format or kind -> the file's column, where they differ
    split, seed              the share of the train file, drawn by `seed`, that becomes the validation split
    num_labels               of a classification; as many as the records have when not given
    limit                    split -> only its first so many records
    label_words, prompt      of a classification: the words of its labels, which a language model ranks
                             (`dovetail.tasks.rank`), and the prompt before them
    scoring                  shots, stop texts, extractor and more (`dovetail.tasks.rules`)
    """

    task: str | None = None
    name: str | None = None
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    preset: str | None = None
    format: str | None = None
    template: str | None = None
    split: Annotated[float, Field(gt=0, lt=1)] | None = None
    seed: int = 0
    kind: Literal["generation", "choice", "pairs", "text", "classification", "regression"] | None = None
    metric: str | None = None
    fields: dict[str, str] = {}
    num_labels: Annotated[int, Field(ge=2)] | None = None
    limit: Limit = Limit()
    label_words: tuple[str, ...] | None = None
    prompt: str | None = None
    scoring: Scoring = Scoring()

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
            others = [
                name
                for name in self.model_fields_set
                if name not in ("task", "limit", "scoring") and getattr(self, name)
            ]
            if others:
                raise ValueError(f"a playground task takes no {sorted(others)[0]}: name a task, or files")
            return self
        if self.preset is not None:
            self._check_preset(self.preset)
            return self
        if not self.files and self.dataset is None:
            files = "files (train: train.jsonl, ...) or a data set (dataset: NAME)"
            raise ValueError(f"name a playground task (task: word_problems), {files}")
        if self.subset is not None and self.dataset is None:
            raise ValueError("a subset is a part of a data set: name it (dataset: NAME)")
        for name, value, known in (("format", self.format, FORMATS), ("template", self.template, TEMPLATES)):
            if value is not None and value not in known:
                raise ValueError(f"the {name} must be one of " + ", ".join(known))
        if self.split is not None and ((self.train is None and self.dataset is None) or self.validation is not None):
            raise ValueError("split needs a train file and no validation file")
        if self.kind is None:
            self._check_format()
            return self
        if self.format is not None or self.template is not None:
            raise ValueError("a kind takes no format and no template: name a kind or a format")
        if self.metric is not None and self.metric not in METRICS[self.kind]:
            raise ValueError(f"the metric of a {self.kind} task must be " + " or ".join(METRICS[self.kind]))
        known = [*FIELDS[self.kind], *(["pair"] if self.kind in ("classification", "regression") else [])]
        for name in self.fields:
            if name not in known:
                raise ValueError(f"a {self.kind} record has no field {name!r}; it has " + ", ".join(known))
        return self

    def _check_preset(self, name: str) -> None:
        if name not in PRESETS:
            raise ValueError("the preset must be one of " + ", ".join(PRESETS))
        kind = PRESETS[name].kind
        if others := [each for each in ("format", "kind", "fields") if getattr(self, each)]:
            raise ValueError(f"a preset takes no {others[0]}, because it has one")
        if self.template is not None and kind != "chat":
            raise ValueError(f"the preset {name} has no conversations, which a template renders")
        if self.metric is not None and self.metric not in METRICS[kind]:
            raise ValueError(f"the metric of the preset {name} must be " + " or ".join(METRICS[kind]))
        if self.split is not None and (self.validation is not None or (self.files and self.train is None)):
            raise ValueError("split needs a train file and no validation file")
        if PRESETS[name].parts and self.dataset is not None:
            raise ValueError(f"the preset {name} has several data sets: leave dataset out")

    def _check_format(self) -> None:
        if self.format is None:
            return
        form = FORMATS[self.format]
        for name in self.fields:
            if name not in (known := (*form.fields, *form.optional)):
                raise ValueError(f"the format {self.format} has no field {name!r}; it has " + ", ".join(known))
        if self.template is not None and form.kind != "chat":
            raise ValueError(f"the format {self.format} has no conversations, which a template renders")


def at_folder(data: Data, folder: Path) -> Data:
    """Make paths absolute, relative ones from `folder`, and fill in what has a default."""
    if data.task is not None:
        return data
    if data.preset is not None:
        data = data.model_copy(
            update={"name": data.name or data.preset, "metric": data.metric or metric_of(data.preset)}
        )
        if not data.files and data.dataset is None:
            return data
    if data.dataset is not None:
        local = (folder / Path(data.dataset).expanduser()).resolve()
        source = str(local) if local.is_dir() else data.dataset
        return data.model_copy(update={"dataset": source, "name": data.name or Path(data.dataset).name})
    paths = {split: (folder / path.expanduser()).resolve() for split, path in data.files.items()}
    name = data.name or next(iter(paths.values())).parent.name
    update: dict[str, Any] = {"name": name}
    if data.kind is not None:
        update["metric"] = data.metric or METRICS[data.kind][0]
    return data.model_copy(update={**paths, **update})
