"""From a recipe's `data` to a task: the playground's, or records read from files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path

from dovetail.errors import DataError
from dovetail.progress import note
from dovetail.tasks import playground
from dovetail.tasks.files import Row, read_rows, typed
from dovetail.tasks.spec import Data
from dovetail.tasks.task import FIELDS, METRICS, OPTIONAL, Record, Task, check_labels, check_record

MAX_LABELS = 1000
"""The most labels that are taken from the records: a larger one is rather a mistake, unless num_labels says so."""


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
    # A labelled text is also a text. Labels that are not all integers are values.
    if "classification" in kinds:
        whole = all(isinstance(record.get("label"), int) for record in data)
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
        _say(f"data: fields that a {kinds[0]} record does not have, and that nothing reads: {', '.join(unread)}")
    return Task("data", kinds[0], METRICS[kinds[0]][0], {split: data})


def load_task(data: Data) -> Task:
    """Return the task of a recipe's data part, every record checked; DataError names file, line and column."""
    if data.task is not None:
        task = playground.task(data.task)
        splits = {split: records[: data.limit.of(split)] for split, records in task.splits.items()}
        return Task(task.name, task.kind, task.metric, splits)
    assert data.kind is not None
    assert data.metric is not None
    columns = {name: data.fields.get(name, name) for name in (*FIELDS[data.kind], "pair")}
    splits = {
        split: read_records(path, data.kind, columns, pair="pair" in data.fields, limit=data.limit.of(split))
        for split, path in data.files.items()
    }
    return Task(data.name or "data", data.kind, data.metric, splits)


def read_records(
    path: Path, kind: str, columns: Mapping[str, str], *, pair: bool = False, limit: int | None = None
) -> list[Record]:
    """Read the records of a data file, or of a folder of them (`dovetail.tasks.files`).

    columns  field of the record -> column of the file
    pair     the column of "pair" must be there; else it is taken where it is
    limit    only the first so many

    Columns that no field reads are named once, on standard error.
    """
    records: list[Record] = []
    unread: dict[str, None] = {}
    for row in islice(read_rows(path), limit):
        record, others = _record(row, kind, columns, pair)
        records.append(record)
        unread.update(dict.fromkeys(others))
    if not records:
        rule = "a split must contain at least one record"
        found = "no records" + (" in the files of this directory" if path.is_dir() else "")
        raise DataError(str(path), found=found, rule=rule, fix="add records, or remove the split")
    if unread:
        _say(f"{path}: columns that no field reads: {', '.join(unread)}")
    return records


@cache
def _say(text: str) -> None:
    """Print a note, once however often a file is read (a study reads its data for each run)."""
    note(text)


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
    found = stated or min(max(2, max(labels) + 1), MAX_LABELS)
    for split, records in task.splits.items():
        fix = "number the labels from 0, or set data.num_labels"
        check_labels(f"task {task.name}, split {split}", records, found, fix=fix)
    return found
