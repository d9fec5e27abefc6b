"""From a recipe's `data` to a task: the playground's, or records read from files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pydantic

from dovetail.errors import DataError
from dovetail.files import refusal
from dovetail.progress import note_once
from dovetail.tasks import playground
from dovetail.tasks.files import Row, part_of, read_rows, typed
from dovetail.tasks.formats import FORMATS, detect, read_record
from dovetail.tasks.hub import read_dataset
from dovetail.tasks.presets import PRESETS, metric_of, read_preset
from dovetail.tasks.rank import rank_classification
from dovetail.tasks.rules import Scoring
from dovetail.tasks.spec import Data
from dovetail.tasks.stored import RECORD, gathered, select
from dovetail.tasks.task import (
    FIELDS,
    MAX_LABELS,
    METRICS,
    OPTIONAL,
    LabelTypes,
    Record,
    Task,
    check_labels,
    check_record,
)
from dovetail.tasks.tokens import RowMaker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_task(data: Task | str | Iterable[Record], split: str = "train") -> Task:
    """Return a task unchanged, a playground task by its name, or plain records as the task "data".

    split   the split that plain records become; their kind is the one whose fields they have
    errors  DataError for an unknown name, for no records, or for records of no one kind
    """
    if isinstance(data, Task):
        return data
    if isinstance(data, str):
        return playground.task(data)
    fix = "pass a list of dictionaries, or a dovetail.Task that names its splits"
    # A generator could be read only once, and a Mapping is one record or several splits.
    if isinstance(data, Mapping | Iterator) or not isinstance(data, Iterable):
        raise DataError("data", found=f"a {type(data).__name__}", rule="data must be a list of records", fix=fix)
    data = list(data)
    if not data:
        raise DataError("data", found="no records", rule="data must contain at least one record", fix=fix)
    for index, record in enumerate(data):
        if not isinstance(record, Mapping):
            found, rule = f"a {type(record).__name__}", "records must be dictionaries"
            raise DataError(f"data, record {index}", found=found, rule=rule, fix=fix)
    kinds = [kind for kind, fields in FIELDS.items() if set(fields) <= set(data[0])]
    # A labelled text is also a text. Labels with a float among them are values.
    if "classification" in kinds:
        whole = not any(isinstance(record.get("label"), float) for record in data)
        kinds = ["classification" if whole else "regression"]
    if len(kinds) != 1:
        raise DataError(
            "data, record 0",
            found="fields " + ", ".join(map(str, data[0])),
            rule="a record must have the fields of one kind: "
            + "; ".join(f"{k}: {', '.join(f)}" for k, f in FIELDS.items()),
            fix="rename the fields, or make a dovetail.Task and name its kind",
        )
    known = (*FIELDS[kinds[0]], *OPTIONAL.get(kinds[0], {}), "pair")
    if unread := {str(name): None for record in data for name in record if name not in known}:
        note_once(f"data: fields that a {kinds[0]} record does not have, and that nothing reads: {', '.join(unread)}")
    return Task("data", kinds[0], METRICS[kinds[0]][0], {split: data})


def load_task(data: Data) -> Task:
    """Return the task of a recipe's data part, every record checked; DataError names file, line and column."""
    if data.task is not None:
        task = playground.task(data.task)
        splits = {split: records[: data.limit.of(split)] for split, records in task.splits.items()}
        return Task(task.name, task.kind, task.metric, splits, data.scoring)
    if data.preset is not None:
        kind, splits = PRESETS[data.preset].kind, _preset_splits(data, data.preset)
    elif data.kind is None:
        kind, splits = _formatted(data)
    else:
        kind = data.kind
        columns = {name: data.fields.get(name, name) for name in (*FIELDS[kind], "pair")}
        splits = {
            split: _records(where, islice(rows, data.limit.of(split)), kind, columns, pair="pair" in data.fields)
            for split, (where, rows) in _sources(data).items()
        }
    if data.split is not None:
        splits |= _parted(splits["train"], data.split, data.seed)
    metric, scoring = data.metric or METRICS[kind][0], data.scoring
    if data.preset is not None:
        metric = data.metric or metric_of(data.preset)
        scoring = PRESETS[data.preset].scoring if scoring == Scoring() else scoring
    task = Task(data.name or data.preset or "data", kind, metric, splits, scoring)
    return task if data.label_words is None else rank_classification(task, data.label_words, data.prompt)


def load_data(
    file: str | Path | Mapping[str, str | Path] | None = None,
    format: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **more: Any,
) -> Task:
    """Return the records of a data file as a task, for `dovetail.train` and `dovetail.evaluate`.

    file       of the split "train": JSON Lines, a JSON array, CSV, TSV or Parquet, gzipped text, or a folder of files;
               or split ("train", "validation", "test") -> file; None with dataset=NAME, a data set of the hub
    format     a name of `dovetail.tasks.formats`: alpaca, chat, sharegpt, prompt_completion, preference, text, labels
               and more; by default found by the columns of the first row, and said in one line
    tokenizer  makes the first record of each split into tokens at once, to show that its chat template can render them
    more       further keys of the `data` part of a recipe: preset, template, fields, split=0.1, seed, name, metric,
               limit

    Raises DataError that names the file and the line.
    """
    paths = dict(file) if isinstance(file, Mapping) else {} if file is None else {"train": file}
    settings = {**{split: Path(path) for split, path in paths.items()}, "format": format, **more}
    try:
        data = Data.model_validate(settings)
    except pydantic.ValidationError as error:
        raise refusal(
            "load_data", error, kind=DataError, keys=lambda _: ("load_data", list(Data.model_fields))
        ) from None
    task = load_task(data)
    if tokenizer is not None:
        make = RowMaker(tokenizer, encoder_decoder=False, max_length=1 << 30)
        for records in task.splits.values():
            make.examples(task.kind, records[:1])
    return task


def _sources(data: Data) -> dict[str, tuple[str, Iterator[Row]]]:
    """Return split -> what its records are read from, in words, and the rows."""
    if data.dataset is None:
        return {split: (str(path), read_rows(path)) for split, path in data.files.items()}
    names = {split: str(path) for split, path in data.files.items()}
    found = read_dataset(data.dataset, data.subset, names)
    if data.split is not None:
        found.pop("validation", None)
    return {split: (f"data set {data.dataset}, {split} split", rows) for split, rows in found.items()}


def _preset_splits(data: Data, name: str) -> dict[str, Sequence[Record]]:
    """Return the splits of a preset: of the files that are named, else of its data set on the hub."""
    preset = PRESETS[name]
    found: dict[str, list[Iterator[tuple[str, Record]]]] = {}
    for part in preset.parts or (name,):
        for split, rows in _preset_rows(data, name, part).items():
            found.setdefault(split, []).append(read_preset(part, rows))

    def records(split: str) -> Iterator[Record]:
        # One record of each part in turn, so that the first records are of all of them.
        for where, record in filter(None, chain.from_iterable(zip_longest(*found[split]))):
            if data.template is not None:
                record = {**record, "template": data.template}
            check_record(where, preset.kind, record)
            yield record

    kept = {split: gathered(islice(records(split), data.limit.of(split)), RECORD) for split in found}
    return {split: _finished(f"preset {name}, {split} split", part, {}) for split, part in kept.items()}


def _preset_rows(data: Data, name: str, part: str) -> dict[str, Iterator[Row]]:
    """Return split -> rows of a part of a preset, or of all of it; a part has a file or folder of its name."""
    if data.files and data.dataset is None:
        files = {split: path if part == name else part_of(path, part) for split, path in data.files.items()}
        return {split: read_rows(path) for split, path in files.items()}
    preset, wanted = PRESETS[part], {split: str(path) for split, path in data.files.items()}
    others = {split: theirs for split, theirs in preset.splits.items() if split in PRESETS[name].splits}
    if data.split is not None:
        others.pop("validation", None)
    source = (preset.dataset, data.subset or preset.subset) if data.dataset is None else (data.dataset, data.subset)
    return read_dataset(*source, wanted, others)


def _formatted(data: Data) -> tuple[str, dict[str, Sequence[Record]]]:
    """Return the kind and the splits of files in a format, which the first row tells where no format is named."""
    name, splits = data.format, {}
    labels = LabelTypes()

    def records(where: str, rows: Iterable[Row], unread: dict[str, None], left_out: count[int]) -> Iterator[Record]:
        nonlocal name
        for row in rows:
            if name is None:
                name = detect(row, data.fields)
                more = "; the rejected answers are not used" if name == "preference" else ""
                note_once(f"{where}: the columns are those of the format {name} (`format: {name}` names it){more}")
            record, others = read_record(name, row, data.fields)
            unread.update(dict.fromkeys(others))
            if record is None:
                next(left_out)
                continue
            if data.template is not None and "template" in record:
                rule, fix = "segments are joined as they are, without a template", "remove template"
                raise DataError(row.where, found=f"template {data.template}", rule=rule, fix=fix)
            if data.template is not None:
                record = {**record, "template": data.template}
            kind = FORMATS[name].kind
            if name == "labels" and isinstance(record["label"], float):
                kind = "regression"  # integers are also values; which they are is known after the last row
            check_record(row.where, kind, record)
            if name == "labels":
                labels.add(row.where, record["label"])
            yield record

    for split, (where, rows) in _sources(data).items():
        unread: dict[str, None] = {}
        left_out = count()
        found = gathered(islice(records(where, rows, unread, left_out), data.limit.of(split)), RECORD)
        if number := next(left_out):
            said = f"{number} of {number + len(found)} rows are marked as undesired answers"
            if not found:
                rule = "a split must contain at least one desired answer"
                fix = "add rows whose answers are desired, or remove the split"
                raise DataError(where, found=said, rule=rule, fix=fix)
            note_once(f"{where}: {said} and are left out")
        splits[split] = _finished(where, found, unread)
    assert name is not None
    kind = FORMATS[name].kind
    if name == "labels" and any(isinstance(r["label"], float) for records in splits.values() for r in records):
        kind = "regression"
    return kind, splits


def _parted(records: Sequence[Record], share: float, seed: int) -> dict[str, Sequence[Record]]:
    """Return the train and validation splits of records, each in their order; at least one record in each."""
    number = min(max(1, round(share * len(records))), len(records) - 1)
    if number < 1:
        rule, fix = "a file that is split must have at least two records", "add records, or name a validation file"
        raise DataError(f"split: {share}", found="one record", rule=rule, fix=fix)
    drawn = set(Random(f"split {seed}").sample(range(len(records)), number))
    return {
        "train": select(records, (at for at in range(len(records)) if at not in drawn)),
        "validation": select(records, sorted(drawn)),
    }


def read_records(
    path: Path, kind: str, columns: Mapping[str, str], *, pair: bool = False, limit: int | None = None
) -> Sequence[Record]:
    """Read the records of a data file, or of a folder of them (`dovetail.tasks.files`).

    columns  field of the record -> column of the file
    pair     the column of "pair" must be there; else it is taken where it is
    limit    only the first so many

    Columns that no field reads are named once, on standard error.
    """
    return _records(str(path), islice(read_rows(path), limit), kind, columns, pair=pair)


def _records(where: str, rows: Iterable[Row], kind: str, columns: Mapping[str, str], *, pair: bool) -> Sequence[Record]:
    unread: dict[str, None] = {}
    labels = LabelTypes()

    def records() -> Iterator[Record]:
        for row in rows:
            record, others = _record(row, kind, columns, pair)
            unread.update(dict.fromkeys(others))
            if kind == "classification":
                labels.add(row.where, record["label"])
            yield record

    return _finished(where, gathered(records(), RECORD), unread)


def _finished(where: str, records: Sequence[Record], unread: Mapping[str, None]) -> Sequence[Record]:
    """Return the records of a split; name the columns that were not read, or raise DataError where there are none."""
    if not records:
        rule = "a split must contain at least one record"
        found = "no records" + (" in the files of this directory" if Path(where).is_dir() else "")
        raise DataError(where, found=found, rule=rule, fix="add records, or remove the split")
    if unread:
        note_once(f"{where}: columns that no field reads: {', '.join(unread)}")
    return records


def _record(row: Row, kind: str, columns: Mapping[str, str], pair: bool) -> tuple[Record, list[str]]:
    """Return the record of a row, and the columns that are not part of it."""
    found = row.columns
    wanted = [*FIELDS[kind], *(["pair"] if pair or columns["pair"] in found else [])]
    for name in wanted:
        if columns[name] not in found:
            raise DataError(
                row.where,
                found="columns " + ", ".join(map(str, found)),
                rule=f"a {kind} record must have a field {name!r}, looked for in column {columns[name]!r}",
                fix=f"set data.fields of the recipe: {{{name}: COLUMN}}",
            )
    record = {name: found[columns[name]] for name in wanted}
    if row.untyped:
        record = {name: typed(value, FIELDS[kind].get(name, str)) for name, value in record.items()}
    check_record(row.where, kind, record)
    return record, [column for column in found if column not in {columns[name] for name in wanted}]


def number_of_labels(task: Task, stated: int | None = None) -> int | None:
    """Return the number of outputs of the task's head, as stated or counted; None for a task without labels."""
    if task.kind == "regression":
        return 1
    if task.kind != "classification":
        return None
    labels = [record["label"] for records in task.splits.values() for record in records]
    found = stated or min(max(2, max(labels) + 1, len(task.labels)), MAX_LABELS)
    for split, records in task.splits.items():
        fix = "number the labels from 0, or set data.num_labels"
        check_labels(f"task {task.name}, split {split}", records, found, fix=fix)
    return found
