"""Tasks: records checked one by one, and made from what a caller has."""

import pytest

from dovetail.errors import DataError
from dovetail.tasks.find import as_task
from dovetail.tasks.task import FIELDS, Task

RECORDS = {
    "generation": {"prompt": "1 + 1 =", "answer": " 2"},
    "choice": {"prompt": "The sky is", "choices": [" blue", " a fish"], "label": 0},
    "pairs": {"good": "He sings.", "bad": "He sing."},
    "text": {"text": "Once."},
    "classification": {"text": "fine", "label": 1},
    "regression": {"text": "fine", "pair": "good", "label": 0.5},
    "chat": {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]},
}


def test_every_kind_is_told_by_its_fields():
    assert set(RECORDS) == set(FIELDS)
    for kind, record in RECORDS.items():
        assert as_task([record]).kind == kind


def test_a_name_is_a_playground_task():
    assert as_task("word_problems").kind == "generation"
    task = as_task([RECORDS["text"]])
    assert as_task(task) is task


@pytest.mark.parametrize("data", [[], [{"question": "?"}], "no such task"])
def test_other_data_is_refused(data):
    with pytest.raises(DataError):
        as_task(data)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("generation", {"answer": 2}),
        ("choice", {"label": 2}),
        ("choice", {"label": -1}),
        ("classification", {"label": True}),
        ("text", {"text": None}),
        ("text", {"text": "a\ud83d"}),
        ("choice", {"choices": [" blue", " \udc00"]}),
        ("regression", {"label": 1e300}),
        ("regression", {"label": 10**400}),
        ("regression", {"label": float("nan")}),
    ],
)
def test_bad_records_are_named(kind, change):
    with pytest.raises(DataError, match="split train, record 0"):
        Task("t", kind, as_task([RECORDS[kind]]).metric, {"train": [RECORDS[kind] | change]})


def test_bad_tasks_are_named():
    with pytest.raises(DataError, match="kind=poem"):
        Task("t", "poem", "accuracy", {})
    with pytest.raises(DataError, match="the metric of a text task must be"):
        Task("t", "text", "accuracy", {})
    with pytest.raises(DataError, match="splits of this task are train"):
        as_task([RECORDS["text"]]).split("test")
