"""Data sets by name: of the Hugging Face hub, of its local cache, or of a folder, through the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dovetail.errors import DataError
from dovetail.tasks.files import Row, without_fillers

SPLITS = {split: split for split in ("train", "validation", "test")}


def read_dataset(
    name: str, subset: str | None, wanted: Mapping[str, str], others: Mapping[str, str] = SPLITS
) -> dict[str, Iterator[Row]]:
    """Return split -> rows of a data set; the data stay on disk.

    wanted   split -> the data set's name for it
    others   the same of further splits, which are taken where the data set has them; train is taken in any case
    errors   DataError for a data set that cannot be loaded, such as one that is not in the cache while offline, and for
             a split that it does not have
    """
    import datasets

    where = f"data set {name}" + (f", {subset}" if subset else "")
    try:
        found: Any = datasets.load_dataset(name, subset)
    except Exception as error:
        # The library raises errors of many kinds, of its own and of its readers and of the connection.
        raise DataError(
            where,
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300],
            rule="a data set must be on the hub, in the local cache or in a folder; the hub needs a connection",
            fix="check the name and the connection, or save the data set to a file and name it: train: FILE",
        ) from None
    there = {split: theirs for split, theirs in others.items() if split == "train" or theirs in found}
    splits = {**there, **wanted}
    for theirs in splits.values():
        if theirs not in found:
            rule = "the splits of this data set are " + ", ".join(found)
            raise DataError(where, found=f"split {theirs!r}", rule=rule, fix="name one of these: train: SPLIT")
    return {split: _rows(f"{where}, split {theirs}", found[theirs]) for split, theirs in splits.items()}


def _rows(where: str, rows: Any) -> Iterator[Row]:
    for number, columns in enumerate(rows, 1):
        yield Row(f"{where}, record {number}", without_fillers(columns))
