"""MMLU (Hendrycks et al. 2021) from local files, in the form in which lm-eval scores it.

Two layouts are read: that of the original archive (dev/SUBJECT_dev.csv and test/SUBJECT_test.csv without a header: the
question, four choices, the letter of the right one), and that of the hub's cais/mmlu (SUBJECT/dev-*.parquet and
SUBJECT/test-*.parquet with the columns question, choices, answer). The prompt lists the choices under their letters,
after the five answered questions of the split dev; the letters are ranked.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.errors import DataError
from dovetail.tasks.files import SUFFIXES, read_rows
from dovetail.tasks.rules import Scoring
from dovetail.tasks.task import Record, Task

LETTERS = ("A", "B", "C", "D")
SHOTS = 5


def mmlu_tasks(folder: str | Path, subjects: Sequence[str] | None = None, *, shots: int = SHOTS) -> list[Task]:
    """Return a task per subject, named mmlu_SUBJECT, in the order of their names.

    folder    of the original archive (with dev/ and test/), or with a folder per subject
    subjects  only these; all of the folder when not given
    shots     answered questions of the split dev before each question

    Raises DataError for a folder of another layout, a subject that it lacks, and a row of another form.
    """
    folder = Path(folder).expanduser()
    files = _original(folder) if (folder / "test").is_dir() else _of_hub(folder)
    if not files:
        raise DataError(
            str(folder),
            found="no file of a subject",
            rule="the folder must contain test/SUBJECT_test.csv, or SUBJECT/test-*.parquet, and the same for dev",
            fix="name the folder of the extracted archive, or of the downloaded data set",
        )
    missing = [subject for subject in subjects or () if subject not in files]
    if missing:
        rule, fix = "the subjects here are " + ", ".join(files), "name some of these"
        raise DataError(str(folder), found=", ".join(missing), rule=rule, fix=fix)
    return [_task(subject, files[subject], shots) for subject in subjects or sorted(files)]


def _original(folder: Path) -> dict[str, dict[str, list[Path]]]:
    return {
        path.name.removesuffix("_test.csv"): {
            "test": [path], "dev": [folder / "dev" / path.name.replace("_test.csv", "_dev.csv")]
        }
        for path in sorted((folder / "test").glob("*_test.csv"))
    }  # fmt: skip


def _of_hub(folder: Path) -> dict[str, dict[str, list[Path]]]:
    found: dict[str, dict[str, list[Path]]] = {}
    for inner in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not inner.is_dir() or inner.name in ("all", "auxiliary_train"):
            continue
        files = [path for path in sorted(inner.iterdir()) if path.suffix in SUFFIXES]
        splits = {split: [path for path in files if path.name.startswith(split)] for split in ("test", "dev")}
        if splits["test"]:
            found[inner.name] = splits
    return found


def _task(subject: str, files: Mapping[str, Sequence[Path]], shots: int) -> Task:
    splits = {split: _records(files[split]) for split in (("test", "dev") if shots else ("test",))}
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    rules = Scoring(shots=shots, shots_split="dev", description=about)
    return Task(f"mmlu_{subject}", "choice", "accuracy", splits, rules)


def _records(files: Sequence[Path]) -> list[Record]:
    found: list[Record] = []
    for path in files:
        for where, question, choices, label in _rows(path):
            if len(choices) != len(LETTERS) or label not in range(len(LETTERS)):
                rule = "a row must be a question, four choices and the letter or the index of the right one"
                raise DataError(where, found=f"{len(choices)} choices, answer {label}", rule=rule, fix="check the file")
            listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
            prompt = f"{question.strip()}{listed}\nAnswer:"
            found.append({"prompt": prompt, "choices": [f" {letter}" for letter in LETTERS], "label": label})
    return found


def _rows(path: Path) -> list[tuple[str, str, list[str], Any]]:
    """Return place, question, choices and the index of the right one of each row."""
    if path.suffix != ".csv":
        rows = ((row.where, row.columns) for row in read_rows(path))
        return [
            (where, str(row.get("question")), list(map(str, row.get("choices") or [])), row.get("answer"))
            for where, row in rows
        ]
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        rule = "each subject must have a file of UTF-8 text in dev/ and test/"
        raise DataError(str(path), found=str(error), rule=rule, fix="extract the archive again") from None
    return [
        (
            f"{path}, line {number}", line[0], line[1:-1],
            LETTERS.index(line[-1].strip()) if line[-1].strip() in LETTERS else line[-1],
        )
        for number, line in enumerate(lines, 1) if line
    ]  # fmt: skip
