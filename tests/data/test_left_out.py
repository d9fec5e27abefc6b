"""What a file marks as not to be trained is not trained, however the tool that wrote it says so."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from chat_styles import STYLES, tokenizer_of
from dovetail.errors import DataError
from dovetail.tasks.find import load_data
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, RowMaker


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def counted(task: Task, style: str = "ChatML") -> str:
    """The text of the tokens of the first record that the loss counts."""
    tokenizer = tokenizer_of(STYLES[style])
    (row,) = RowMaker(tokenizer, encoder_decoder=False, max_length=1000).examples("chat", task.split("train")[:1])
    text: str = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
    return text


NO: dict[str, dict[str, Any]] = {
    "OpenAI and Mistral": {"weight": 0}, "a weight that is no integer": {"weight": 0.0}, "axolotl": {"train": False},
    "axolotl, its default name": {"training": False}, "ms-swift": {"loss": False},
    "LLaMA-Factory": {"loss_weight": 0.0},
    "masked": {"masked": True}, "two that agree": {"weight": 0, "train": False},
    "no character": {"train_detail": []},
    "one part": {"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": 0}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", ["messages", "conversations"])
@pytest.mark.parametrize("tool", NO)
def test_a_turn_that_is_not_trained(tool: str, shape: str, tmp_path: Path) -> None:
    keys = {"role": "from", "content": "value"} if shape == "conversations" else {}
    turns = [user("a"), said("b", **NO[tool]), user("c"), said("d")]
    row = {shape: [{keys.get(name, name): value for name, value in turn.items()} for turn in turns]}
    task = load_data(write(tmp_path / "data.jsonl", row))
    assert counted(task) == "d<|im_end|>"


YES = [
    {}, {"weight": 1}, {"weight": 1.0}, {"train": True}, {"training": None}, {"loss": True, "weight": 1},
    {"loss_weight": 1.0}, {"masked": False}, {"train_detail": [{"begin_offset": 0, "end_offset": 9}]},
]  # fmt: skip


@pytest.mark.parametrize("flags", YES, ids=str)
def test_a_turn_that_is_trained(flags: dict[str, Any], tmp_path: Path) -> None:
    task = load_data(write(tmp_path / "data.jsonl", {"messages": [user("a"), said("b", **flags)]}))
    assert task.split("train") == [{"messages": [user("a"), said("b")]}]


BAD: dict[str, dict[str, Any]] = {
    "train='false'": {"train": "false"}, "weight='0'": {"weight": "0"}, "weight=0.5": {"weight": 0.5},
    "loss_weight=2": {"loss_weight": 2}, "loss=nan": {"loss": float("nan")},
    "train: True and weight: 0": {"train": True, "weight": 0},
    "train_detail={}": {"train_detail": {}},
    "train_detail with {'begin_offset': 3}": {"train_detail": [{"begin_offset": 3}]},
    "'end_offset': 1}": {"train_detail": [{"begin_offset": 3, "end_offset": 1}]},
    "a part is trained": {"content": [{"type": "text", "text": "b", "train": "no"}]},
    "reasoning_content with a part": {"reasoning_content": [{"text": "b", "train": False}]},
    "a part of the type reasoning": {"content": [{"type": "reasoning", "text": "b", "weight": 0}]},
    "a part without text": {"content": [{"type": "text", "words": "b"}]},
}  # fmt: skip


@pytest.mark.parametrize("found", BAD)
def test_a_flag_that_says_neither_is_refused(found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"messages": [user("a"), {**said("b"), **BAD[found]}]})
    with pytest.raises(DataError) as refused:
        load_data(path)
    assert found in refused.value.found
    assert refused.value.where == f"{path}, line 1"


TEXT = " Well 🙂, the súm of 2 and 3 is\n\n five — 五.  "


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STYLES)
def test_tokens_of_parts(name: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{name} {seed}")
    cuts = [0, *sorted(draw.sample(range(1, len(TEXT)), 3)), len(TEXT)]
    flags = [bool((at + seed) % 2) for at in range(4)]
    parts = [
        {"type": "text", "text": TEXT[begin:end], "train": flag}
        for begin, end, flag in zip(cuts, cuts[1:], flags, strict=False)
    ]
    details = [
        {"begin_offset": begin, "end_offset": end - 1, "train": flag}
        for begin, end, flag in zip(cuts, cuts[1:], flags, strict=False)
    ]
    first = [user("five?"), said("no"), user("a")]
    rows = [
        {"messages": [*first, said(TEXT, train_detail=details)]},
        {"messages": [*first, {**said(""), "content": parts}]},
    ]
    task = load_data(write(tmp_path / "data.jsonl", *rows))
    assert task.split("train")[0] == task.split("train")[1]

    tokenizer = tokenizer_of(STYLES[name])
    (row, _) = RowMaker(tokenizer, encoder_decoder=False, max_length=1000).examples("chat", task.split("train"))
    plain = Task("plain", "chat", "perplexity", {"train": [{"messages": [*first, said(TEXT)]}]})
    (whole,) = RowMaker(tokenizer, encoder_decoder=False, max_length=1000).examples("chat", plain.split("train"))
    assert row["input_ids"] == whole["input_ids"]

    text = tokenizer.apply_chat_template([*first, said(TEXT)], tokenize=False)
    begin = text.rindex(TEXT.strip()) - (len(TEXT) - len(TEXT.lstrip()))
    trained = {
        begin + at
        for left, right, flag in zip(cuts, cuts[1:], flags, strict=False)
        if flag
        for at in range(left, right)
    }
    content = set(range(text.rindex(TEXT.strip()), text.rindex(TEXT.strip()) + len(TEXT.strip())))
    before = 0
    for token, label, plainly, (left, right) in zip(
        row["input_ids"], row["labels"], whole["labels"],
        tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"], strict=True,
    ):  # fmt: skip
        inside = set(range(left, right)) & content
        if inside - trained:
            assert label == IGNORED
        elif inside and set(range(min(before, left), right)) <= trained:
            assert label == token
        elif not set(range(min(before, left), right)) & set(range(begin, begin + len(TEXT))):
            assert label == plainly
        before = right


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "bad"}),
    "chat": ({"messages": [user("a"), said("b")]}, {"messages": [user("a"), said("bad")]}),
    "sharegpt": ({"conversations": [user("a"), said("b")]}, {"conversations": [user("a"), said("bad")]}),
    "prompt_completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "bad"}),
    "generation": ({"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "bad"}),
}


@pytest.mark.parametrize("column", ["kto_tag", "label"])
@pytest.mark.parametrize("name", SHAPES)
def test_undesired_answers_are_left_out_and_counted(
    name: str, column: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = SHAPES[name]
    rows = [{**bad, column: False}, {**good, column: True}, {**bad, column: False}, {**good, column: None}, good]
    path = write(tmp_path / "data.jsonl", *rows)
    task = load_data(path)
    assert task.splits == load_data(write(tmp_path / "good.jsonl", good, good, good)).splits
    said = capfd.readouterr().err
    assert f"{path}: 2 of 5 rows are marked as undesired answers and are left out" in said
    assert "no field reads" not in said
    assert len(load_data(path, limit={"train": 2}).split("train")) == 2
    with pytest.raises(DataError, match="1 of 1 rows are marked as undesired"):
        load_data(write(tmp_path / "bad.jsonl", {**bad, column: False}))


def test_undesired_answers_in_csv(tmp_path: Path) -> None:
    for yes, no in (("true", "false"), ("True", "False"), ("1", "0")):
        with (tmp_path / "data.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [["prompt", "completion", "kto_tag"], ["a", "b", yes], ["a", "c", no], ["a", "d", ""]]
            )
        answers = [record["messages"][1]["content"] for record in load_data(tmp_path / "data.csv").split("train")]
        assert answers == ["b", "d"]


def test_a_label_that_is_no_mark_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in ("sports", 3, 0)]
    path = write(tmp_path / "data.jsonl", *rows)
    assert len(load_data(path).split("train")) == 3
    assert f"{path}: columns that no field reads: label" in capfd.readouterr().err
    with pytest.raises(DataError, match="kto_tag='maybe', which is not true or false"):
        load_data(write(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b", "kto_tag": "maybe"}))
    rows = [{"prompt": "a", "completion": "b", "good": 1}, {"prompt": "a", "completion": "c", "good": 0}]
    path = write(tmp_path / "data.jsonl", *rows)
    assert len(load_data(path, fields={"desired": "good"}).split("train")) == 1


@pytest.mark.parametrize("column", ["image", "images", "videos", "audios"])
def test_images_and_sounds_are_refused(column: str, tmp_path: Path) -> None:
    row = {"conversations": [user("<image> What is it?"), said("A bee.")]}
    with pytest.raises(DataError, match=rf"{column}=.*, where only texts are trained on"):
        load_data(write(tmp_path / "data.jsonl", {**row, column: ["bee.jpg"]}))
    for empty in ([], None, ""):
        assert len(load_data(write(tmp_path / "data.jsonl", {**row, column: empty})).split("train")) == 1


def test_turns_of_others_that_are_to_be_trained_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "data.jsonl", {"messages": [{**user("a"), "train": True}, said("b", train=True)]})
    assert counted(load_data(path)) == "b<|im_end|>"
    assert "messages.train of the role user (only turns of the assistant are trained)" in capfd.readouterr().err


@pytest.mark.parametrize("train", ["yes", [[0]], [[1, 0]], [[0, 2]], [[0, 1], [0, 1]], [["0", "1"]]], ids=str)
def test_parts_of_a_record_are_checked(train: Any) -> None:
    with pytest.raises(DataError, match=r"message 1[\s\S]*train="):
        Task("data", "chat", "perplexity", {"train": [{"messages": [user("a"), said("b", train=train)]}]})
