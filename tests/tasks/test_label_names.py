"""Labels that are texts: numbered by their names, kept by the model, scored by the model's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail
from dovetail.errors import DataError
from dovetail.runs.result import load_result
from dovetail.tasks.find import as_task, load_data, number_of_labels
from dovetail.tasks.labels import as_model_labels
from dovetail.tasks.rank import rank_classification
from small_models import bert, make_tokenizer
from small_runs import save_model, write_lines

NAMES = ["poor", "fair", "good"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rows(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"one two {'three ' * (n % 4)}", "label": label} for n, label in enumerate(labels)]


def test_labels_are_numbered_by_their_names() -> None:
    task = as_task(rows(NAMES * 2))
    assert task.labels == ("fair", "good", "poor")
    assert [record["label"] for record in task.split("train")] == [2, 0, 1] * 2
    assert number_of_labels(task) == 3
    assert as_task(rows([1, 0])).labels == ()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_label_of_another_type_is_named_by_its_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    if ending == "csv":
        path.write_text("text,label\none,1\ntwo,0\nthree,none\n")
    else:
        write_lines(path, rows([1, 0, "none"]))
    for more in ({}, {"kind": "classification"}):
        with pytest.raises(DataError, match=r"label='none'\n.*all numbers, or all texts") as error:
            load_data(path, **more)
        assert str(error.value).startswith(f"{path}, line {4 if ending == 'csv' else 3}")


def test_refused_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not empty"):
        as_task(rows(["yes", ""]))
    with pytest.raises(DataError, match="write the number without quotes"):
        as_task(rows(["0.5", "1"]))
    with pytest.raises(DataError, match="more than 1000 labels"):
        as_task(rows([f"answer {n}" for n in range(1001)]))
    with pytest.raises(DataError, match="label=True"):
        as_task(rows([True, False]))


def test_a_model_scores_by_its_own_numbers() -> None:
    model = bert(3)
    model.config.id2label = dict(enumerate(NAMES))
    own = as_model_labels(as_task(rows(["poor", "good", "good"]), "test"), model.config)
    assert own.labels == tuple(NAMES)
    assert [record["label"] for record in own.split("test")] == [0, 2, 2]
    named, numbered = (
        dovetail.evaluate(model, make_tokenizer(), rows(labels), progress=False)["data"]
        for labels in (["poor", "good", "good"] * 5, [0, 2, 2] * 5)
    )
    assert named == numbered
    with pytest.raises(DataError, match=r"label 'bad'; the model has poor, fair, good"):
        dovetail.evaluate(model, make_tokenizer(), rows(["bad", "good"]))
    with pytest.raises(DataError, match="no names of labels"):
        dovetail.evaluate(bert(3), make_tokenizer(), rows(["poor", "good"]))


@pytest.mark.parametrize("names", [NAMES, ["poor", "fair"]], ids=["named", "partly named"])
def test_an_answer_that_the_data_lack_is_shown_by_its_name(names: list[str]) -> None:
    model = bert(3)
    model.config.id2label = dict(enumerate(names)) | ({2: "LABEL_2"} if len(names) == 2 else {})
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1e4]))
    said: dict[str, list[str]] = {}
    dovetail.evaluate(
        model, make_tokenizer(), rows(["poor", "fair"]), progress=False, on_outputs=said.__setitem__
    )  # fmt: skip
    assert said["data"] == [model.config.id2label[2]] * 2


def test_labels_of_a_model_are_not_replaced_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    model = bert(2)
    model.config.id2label = {0: "spam", 1: "ham"}
    dovetail.train(model, make_tokenizer(), rows(["good", "poor"] * 4), max_steps=1, batch_size=4, progress=False)
    assert "the model's labels spam, ham are replaced by good, poor" in capfd.readouterr().err
    assert model.config.label2id == {"good": 0, "poor": 1}


@pytest.mark.parametrize("names", [NAMES, [2, 1, 0]], ids=["names", "numbers"])
@pytest.mark.parametrize("merge", ["none", "lossy"])
def test_a_run_of_three_labels_is_loaded_and_scored_again(tmp_path: Path, names: list[Any], merge: str) -> None:
    records = write_lines(tmp_path / "data.jsonl", rows(names * 4))
    data = {"train": str(records), "test": str(records)}
    recipe = {
        "model": str(save_model(tmp_path / "base", labels=3)), "chain": "lora(r=2)", "data": data, "merge": merge,
        "train": {"max_steps": 2, "batch_size": 4},
    }  # fmt: skip
    report = dovetail.run(recipe, output=tmp_path / "run", progress=False)
    model, tokenizer = load_result(tmp_path / "run")
    task = load_data({"test": records}, name=report.task.name)
    again = dovetail.evaluate(model, tokenizer, task, progress=False)[report.task.name]
    assert again["accuracy"] == report.stages[-1].metrics[report.task.name]["accuracy"]
    if names is NAMES:
        assert [model.config.id2label[number] for number in range(3)] == ["fair", "good", "poor"]
        assert [example.expected for example in report.examples[:3]] == NAMES
        assert {example.after for example in report.examples} <= set(NAMES)


def test_label_words_match_names() -> None:
    task = as_task(rows(["no", "yes", "no"]), "test")
    matched = rank_classification(task, ["yes", "no"]).split("test")[0]
    assert matched["choices"][matched["label"]] == " no"
    in_order = rank_classification(task, ["bad", "good"]).split("test")[0]
    assert in_order["choices"][in_order["label"]] == " bad"
