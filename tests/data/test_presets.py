"""Presets: rows as the data sets publish them, read from files, from a data set, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow
import pyarrow.parquet
import pytest

from dovetail.errors import DataError, RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_data, load_task, number_of_labels
from dovetail.tasks.presets import COMMONSENSE, PRESETS
from dovetail.tasks.task import METRICS
from places import ROOT

DATA = ROOT.parent / "shared" / "data"
RECIPE = {"model": "playground", "chain": "lora(r=4)"}


def chat(*texts: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * (len(texts) // 2)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}


def choice(prompt: str, choices: list[str], label: int) -> dict[str, Any]:
    return {"prompt": prompt, "choices": choices, "label": label}


def message(name: str, parent: str | None, role: str, text: str, rank: int | None) -> dict[str, Any]:
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50", "text": text,
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None, "message_tree_id": "a", "tree_state": "ready_for_export",
    }  # fmt: skip


LETTERS = {"text": ["ice", "steam"], "label": ["A", "B"]}
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is ..."},
            {"instruction": "Say hello.", "input": "", "output": "Hello.", "text": "Below is ..."},
        ],
        [
            {
                "messages": [
                    {"role": "user", "content": "Add.\n1 and 2", "instruction": "Add.", "input": "1 and 2"},
                    {"role": "assistant", "content": "3"},
                ]
            },
            chat("Say hello.", "Hello."),
        ],
    ),
    "alpaca-cleaned": ([{"output": "b", "input": "", "instruction": "a"}], [chat("a", "b")]),
    "hc3": (
        [
            {
                "id": "0", "question": "Why?", "human_answers": ["So."], "chatgpt_answers": ["Because.", "Hence."],
                "source": "reddit_eli5",
            },
            {"id": "1", "question": "Who?", "human_answers": ["I."], "chatgpt_answers": [], "source": "finance"},
        ],
        [chat("Why?", "Because."), chat("Why?", "Hence.")],
    ),
    "unnatural-core": (
        [
            {
                "instruction": "Name it.",
                "instances": [
                    {
                        "instruction_with_input": f"Name it. {at}", "input": str(at), "constraints": "None.",
                        "output": f"{at}!",
                    }
                    for at in range(2)
                ],
            }
        ],
        [chat("Name it. 0", "0!"), chat("Name it. 1", "1!")],
    ),
    "oasst1": (
        [
            message("a", None, "prompter", "Hi", None), message("b", "a", "assistant", "worse", 1),
            message("c", "a", "assistant", "better", 0), message("d", "c", "prompter", "And?", None),
            message("e", "d", "assistant", "So.", None), message("f", "e", "prompter", "left out", None),
            message("g", "b", "prompter", "not reached", 0), message("h", None, "prompter", "no reply", None),
        ],
        [chat("Hi", "better", "And?", "So.")],
    ),
    "hh-rlhf": (
        [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}],
        [chat("Hi", "Hello.")],
    ),
    "gsm8k": (
        [{"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}],
        [{"prompt": "Question: 1 + 1?\nAnswer:", "answer": " It is <<1+1=2>>2.\n#### 2"}],
    ),
    "boolq": (
        [{"question": "is ice cold", "answer": True, "passage": "Ice is cold."}],
        [choice("Ice is cold.\nQuestion: is ice cold?\nAnswer:", [" no", " yes"], 1)],
    ),
    "piqa": (
        [{"goal": "Cool a drink.", "sol1": "Add ice.", "sol2": "Boil it.", "label": 0}],
        [choice("Question: Cool a drink.\nAnswer:", [" Add ice.", " Boil it."], 0)],
    ),
    "hellaswag": (
        [
            {
                "ind": 4, "activity_label": "Skating", "ctx_a": "A man [title] stands.", "ctx_b": "he",
                "ctx": "A man stands. he", "endings": ["skates. [step] On.", "flies.", "sinks.", "sits."],
                "source_id": "x", "split": "train", "split_type": "indomain", "label": "2",
            }
        ],
        [choice("Skating: A man.  stands. He".replace("  ", " "), [" skates. On.", " flies.", " sinks.", " sits."], 2)],
    ),
    "winogrande": (
        [{"sentence": "Ann helped Eve because _ was kind.", "option1": "Ann", "option2": "Eve", "answer": "1"}],
        [choice("Ann helped Eve because", [" Ann was kind.", " Eve was kind."], 0)],
    ),
    "arc_easy": (
        [{"id": "M1", "question": "What is cold?", "choices": LETTERS, "answerKey": "A"}],
        [choice("Question: What is cold?\nAnswer:", [" ice", " steam"], 0)],
    ),
    "arc_challenge": (
        [{"id": "M1", "question": "What is hot?", "choices": LETTERS | {"label": ["1", "2"]}, "answerKey": "2"}],
        [choice("Question: What is hot?\nAnswer:", [" ice", " steam"], 1)],
    ),
    "openbookqa": (
        [{"id": "7-980", "question_stem": "Cold is", "choices": LETTERS, "answerKey": "A"}],
        [choice("Cold is", [" ice", " steam"], 0)],
    ),
    "glue/cola": ([{"sentence": "He sing.", "label": 0, "idx": 0}], [{"text": "He sing.", "label": 0}]),
    "glue/sst2": ([{"sentence": "fine", "label": 1, "idx": 0}], [{"text": "fine", "label": 1}]),
    "glue/qqp": (
        [{"question1": "a?", "question2": "b?", "label": 0, "idx": 0}], [{"text": "a?", "pair": "b?", "label": 0}],
    ),
    "glue/stsb": (
        [{"sentence1": "a", "sentence2": "b", "label": 5, "idx": 0}], [{"text": "a", "pair": "b", "label": 5.0}],
    ),
    "glue/mnli": (
        [{"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}], [{"text": "a", "pair": "b", "label": 2}],
    ),
    "glue/qnli": (
        [{"question": "a", "sentence": "b", "label": 1, "idx": 0}], [{"text": "a", "pair": "b", "label": 1}],
    ),
    **{
        name: ([{"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}], [{"text": "a", "pair": "b", "label": 1}])
        for name in ("glue/mrpc", "glue/rte", "glue/wnli")
    },
    "superglue/boolq": (
        [{"question": "a", "passage": "b", "idx": 0, "label": 1}], [{"text": "a", "pair": "b", "label": 1}],
    ),
    **{
        name: ([{"premise": "a", "hypothesis": "b", "idx": 0, "label": 0}], [{"text": "a", "pair": "b", "label": 0}])
        for name in ("superglue/cb", "superglue/rte")
    },
    "superglue/copa": (
        [
            {
                "premise": "It rained.", "choice1": "I got wet.", "choice2": "I won.", "question": "effect", "idx": 0,
                "label": 0,
            }
        ],
        [choice("It rained therefore", [" i got wet.", " i won."], 0)],
    ),
    "superglue/multirc": (
        [{"paragraph": "p", "question": "q?", "answer": "a", "idx": {"paragraph": 0}, "label": 1}],
        [{"text": "p", "pair": "q? a", "label": 1}],
    ),
    "superglue/record": (
        [
            {
                "passage": "Ann met Eve.\n@highlight\nThey met.", "query": "@placeholder was glad.",
                "entities": ["Ann", "Eve", "Ann"], "answers": ["Eve"], "idx": {"passage": 0},
            },
            {"passage": "p", "query": "@placeholder", "entities": ["a"], "answers": [], "idx": {"passage": 1}},
        ],
        [choice("Ann met Eve.\n- They met.\n-", [" Ann was glad.", " Eve was glad."], 1)],
    ),
    "superglue/wic": (
        [
            {
                "word": "bank", "sentence1": "a bank", "sentence2": "the bank", "start1": 2, "start2": 4, "end1": 6,
                "end2": 8, "idx": 0, "label": 0,
            }
        ],
        [{"text": "bank: a bank", "pair": "the bank", "label": 0}],
    ),
    "superglue/wsc": (
        [
            {
                "text": "Ann saw her.", "span1_index": 0, "span2_index": 2, "span1_text": "Ann", "span2_text": "her",
                "idx": 0, "label": 1,
            }
        ],
        [{"text": "Ann saw her.", "pair": "her: Ann", "label": 1}],
    ),
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_preset_has_a_case() -> None:
    assert {*CASES, "commonsense-7"} == {*PRESETS}
    for preset in PRESETS.values():
        assert preset.metric is None or preset.metric in METRICS[preset.kind]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_rows_as_they_are_published(name: str, ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, expected = CASES[name]
    task = load_data(write(tmp_path / f"data.{ending}", rows), preset=name)
    assert list(task.split("train")) == expected
    assert (task.name, task.kind) == (name, PRESETS[name].kind)
    assert "nothing reads" not in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_a_missing_column_is_named(name: str, tmp_path: Path) -> None:
    rows = CASES[name][0]
    names = (
        "instruction", "chosen", "question", "question_stem", "sentence", "sentence1", "premise", "paragraph", "query",
        "goal", "ctx_a", "word", "question1", "instances",
    )  # fmt: skip
    for column in [column for column in names if column in rows[0] and (name, column) != ("unnatural-core", names[0])]:
        broken = [*rows, {key: value for key, value in rows[0].items() if key != column}]
        with pytest.raises(DataError) as refused:
            load_data(write(tmp_path / "data.jsonl", broken), preset=name)
        assert refused.value.where == f"{tmp_path / 'data.jsonl'}, line {len(broken)}"
        assert column.removesuffix("_stem") in refused.value.found


@pytest.mark.parametrize(
    ("name", "column", "value", "found"),
    [
        ("gsm8k", "question", 7, "question=7, which is no text"),
        ("alpaca", "output", None, "null in column 'output'"),
        ("piqa", "label", "one", "label='one', which is no integer"),
        ("hellaswag", "endings", [1, 2, 3, 4], "no list of texts"),
        ("winogrande", "sentence", "no gap", "has no gap _"),
        ("winogrande", "answer", "", "answer='', which is no integer"),
        ("arc_easy", "answerKey", "Z", "answerKey='Z', which is none of ['A', 'B']"),
        ("glue/stsb", "label", "high", "label='high', which is no number"),
        ("superglue/copa", "question", "why", "neither cause nor effect"),
        ("hc3", "chatgpt_answers", "x", "no list of texts"),
    ],
)
def test_a_value_that_makes_no_record_is_refused(
    name: str, column: str, value: Any, found: str, tmp_path: Path
) -> None:
    row = {**CASES[name][0][0], column: value}
    with pytest.raises(DataError) as refused:
        load_data(write(tmp_path / "data.jsonl", [row]), preset=name)
    assert found in refused.value.found
    assert "line 1" in refused.value.where


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("sentence1,sentence2,label,idx\na,b,3.5,0\n")
    assert load_data(path, preset="glue/stsb").split("train")[0] == {"text": "a", "pair": "b", "label": 3.5}
    path.write_text("question,passage,answer\nq,p,true\n")
    assert load_data(path, preset="boolq").split("train")[0]["label"] == 1


def test_all_of_commonsense_take_turns(tmp_path: Path) -> None:
    for part in COMMONSENSE:
        write(tmp_path / "train" / f"{part}.jsonl", CASES[part][0] * 2)
    task = load_data(tmp_path / "train", preset="commonsense-7", limit={"train": 9})
    expected = [CASES[part][1][0] for part in COMMONSENSE]
    assert list(task.split("train")) == [*expected, *expected[:2]]
    (tmp_path / "train" / "piqa.jsonl").unlink()
    with pytest.raises(DataError, match="one file or directory piqa"):
        load_data(tmp_path / "train", preset="commonsense-7")


def test_a_data_set_in_place_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = CASES["glue/cola"][0]
    write(tmp_path / "cola" / "train.jsonl", rows * 4)
    write(tmp_path / "cola" / "validation.jsonl", rows)
    write(tmp_path / "cola" / "test.jsonl", [rows[0] | {"label": -1}])  # as GLUE hides them
    data = {"preset": "glue/cola", "dataset": "cola"}
    task = load_task(Recipe.parse(RECIPE | {"data": data}, folder=tmp_path).data)
    assert {split: len(records) for split, records in task.splits.items()} == {"train": 4, "validation": 1}
    assert (task.name, task.metric) == ("glue/cola", "matthews")
    task = load_task(Recipe.parse(RECIPE | {"data": {**data, "split": 0.25}}, folder=tmp_path).data)
    assert {split: len(records) for split, records in task.splits.items()} == {"train": 3, "validation": 1}


def test_a_recipe_names_the_preset_alone() -> None:
    data = Recipe.parse(RECIPE | {"data": {"preset": "gsm8k"}}).data
    assert (data.name, data.metric, data.files) == ("gsm8k", "exact_match", {})


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ({"preset": "gsm9k"}, "the preset must be one of alpaca"),
        ({"preset": "gsm8k", "format": "alpaca"}, "a preset takes no format"),
        ({"preset": "gsm8k", "fields": {"prompt": "q"}}, "a preset takes no fields"),
        ({"preset": "gsm8k", "template": "plain"}, "no conversations"),
        ({"preset": "gsm8k", "metric": "accuracy"}, "the metric of the preset gsm8k must be exact_match"),
        ({"preset": "commonsense-7", "dataset": "x"}, "leave dataset out"),
    ],
)
def test_what_does_not_fit_a_preset(data: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecipeError, match=rule):
        Recipe.parse(RECIPE | {"data": data})


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "file", "records"),
    [
        ("gsm8k", "gsm8k/test.jsonl", 1319), ("arc_easy", "arc_easy/train.jsonl", 2251),
        ("openbookqa", "openbookqa/test.jsonl", 500), ("glue/cola", "cola/validation.jsonl", 1043),
        ("glue/stsb", "stsb/validation.jsonl", 1500),
    ],
)  # fmt: skip
def test_real_files(name: str, file: str, records: int) -> None:
    task = load_data(DATA / file, preset=name)
    assert len(task.split("train")) == records
    if name == "gsm8k":
        assert task.scoring.extracted(task.split("train")[0]["answer"]) == "18"
    if task.kind == "classification":
        assert number_of_labels(task) == 2
