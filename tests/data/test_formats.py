"""Files in the shapes that other tools document go in unchanged; what is unknown is refused by name."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import dovetail
from chat_styles import STYLES, tokenizer_of
from dovetail.errors import DataError, RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_data, load_task
from dovetail.tasks.formats import FORMATS, PAIRS
from dovetail.tasks.tokens import encode
from small_tokenizers import TOKENIZERS


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


TOOL: dict[str, Any] = {
    "name": "weather",
    "description": "the weather",
    "parameters": {"type": "object", "properties": {}},
}
WRAPPED = {"type": "function", "function": TOOL}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Kyoto"}}}

DOCUMENTED: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    # row, format, messages
    "LLaMA-Factory: alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be kind.", "history": [["Hi", "Hello"]]},
        "alpaca",
        [system("Be kind."), user("Hi"), said("Hello"),
         {**user("Add.\n1 2"), "instruction": "Add.", "input": "1 2"}, said("3")],
    ),
    "LLaMA-Factory: alpaca, empty fields": (
        {"instruction": "Add.", "input": "", "output": "3", "system": "", "history": []}, "alpaca",
        [user("Add."), said("3")],
    ),
    "LLaMA-Factory: alpaca preference": (
        {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}, "preference",
        [user("Add.\n1 2"), said("3")],
    ),
    "LLaMA-Factory: sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c", "tools": ""},
        "sharegpt", [system("c"), user("a"), said("b")],
    ),
    "LLaMA-Factory: sharegpt with tools": (
        {"conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."},
        ], "tools": json.dumps([TOOL])},
        "sharegpt",
        [user("a"), {**said(""), "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}, said("It rains.")],
    ),
    "LLaMA-Factory: sharegpt preference": (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
         "rejected": {"from": "gpt", "value": "c"}},
        "preference", [user("a"), said("b")],
    ),
    "LLaMA-Factory: openai": (
        {"messages": [system("c"), user("a"), said("b")]}, "chat", [system("c"), user("a"), said("b")],
    ),
    "axolotl: alpaca": ({"instruction": "a", "input": "", "output": "b"}, "alpaca", [user("a"), said("b")]),
    "axolotl: gpteacher": ({"instruction": "a", "input": "", "response": "b"}, "alpaca", [user("a"), said("b")]),
    "axolotl: oasst": ({"INSTRUCTION": "a", "RESPONSE": "b"}, "alpaca", [user("a"), said("b")]),
    "axolotl: jeopardy": (
        {"question": "a", "category": "c", "answer": "b"}, "prompt_completion", [user("a"), said("b")],
    ),
    "axolotl: open_orca": (
        {"system_prompt": "c", "question": "a", "response": "b"}, "prompt_completion",
        [system("c"), user("a"), said("b")],
    ),
    "axolotl: context_qa": (
        {"article": "c", "question": "a", "answer": "b"}, "prompt_completion", [user("c\n\na"), said("b")],
    ),
    "axolotl: summarizetldr": ({"article": "a", "summary": "b"}, "prompt_completion", [user("a"), said("b")]),
    "axolotl: camel_ai": ({"message_1": "a", "message_2": "b"}, "prompt_completion", [user("a"), said("b")]),
    "axolotl: metharme": ({"prompt": "a", "generation": "b"}, "prompt_completion", [user("a"), said("b")]),
    "axolotl: pygmalion": (
        {"conversations": [{"role": "user", "value": "a"}, {"role": "assistant", "value": "b"}]}, "sharegpt",
        [user("a"), said("b")],
    ),
    "axolotl: chat_template": (
        {"conversations": [user("a"), said("b")]}, "sharegpt", [user("a"), said("b")],
    ),
    "axolotl: control over turns": (
        {"conversations": [
            {"from": "system", "value": "You are an AI assistant.", "train": False},
            {"from": "human", "value": "Hello", "train": False},
            {"from": "assistant", "value": "Hello", "train": False},
            {"from": "human", "value": "How are you?", "train": True},
            {"from": "assistant", "value": "Well.", "train_detail": [{"begin_offset": 0, "end_offset": 5}]},
        ]},
        "sharegpt",
        [system("You are an AI assistant."), user("Hello"), {**said("Hello"), "train": False}, user("How are you?"),
         said("Well.")],
    ),
    "axolotl: argilla": (
        {"system": "c", "instruction": "a", "chosen_response": "b", "rejected_response": "d"}, "preference",
        [system("c"), user("a"), said("b")],
    ),
    "axolotl: argilla_chat": (
        {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}, "preference", [user("a"), said("b")],
    ),
    "axolotl: icr": ({"input": "a", "chosen": "b", "rejected": "c"}, "preference", [user("a"), said("b")]),
    "axolotl: intel": (
        {"system": "c", "question": "a", "chosen": "b", "rejected": "d"}, "preference",
        [system("c"), user("a"), said("b")],
    ),
    "axolotl: ultra": (
        {"prompt": "a", "chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}, "preference",
        [user("a"), said("b")],
    ),
    "axolotl: chat_template.default": (
        {"messages": [system("c"), user("a")], "chosen": said("b"), "rejected": said("d")}, "preference",
        [system("c"), user("a"), said("b")],
    ),
    "TRL: conversational prompt and completion": (
        {"prompt": [user("a")], "completion": [said("b")]}, "prompt_completion", [user("a"), said("b")],
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\nd\n\nAssistant: e", "rejected": "..."}, "preference",
        [user("a"), said("b"), user("c\nd"), said("e")],
    ),
    "dolly": (
        {"instruction": "a", "context": "c", "response": "b", "category": "d"}, "alpaca",
        [{**user("a\nc"), "instruction": "a", "input": "c"}, said("b")],
    ),
    "parts of messages": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, said("c"),
        ]},
        "chat", [user("ab"), said("c")],
    ),
    "LLaMA-Factory: sharegpt with parallel calls": (
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)},
            {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."},
        ], "tools": json.dumps([TOOL])},
        "sharegpt",
        [user("a"), {**said(""), "tool_calls": [CALL, CALL]}, {"role": "tool", "content": "rain"}, said("It rains.")],
    ),
    "LLaMA-Factory 1: messages of parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "b"}], "loss_weight": 1.0},
        ]},
        "chat", [user("a"), said("b")],
    ),
    "LLaMA-Factory 1: reasoning": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "a"}]},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "b"}]},
        ]},
        "chat", [user("a"), {**said("b"), "reasoning_content": "r"}],
    ),
    "LLaMA-Factory 1: tools": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "a"}]},
            {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL["function"])}]},
        ], "tools": json.dumps([WRAPPED])},
        "chat", [user("a"), {**said(""), "tool_calls": [CALL]}],
    ),
    "LLaMA-Factory 1: preference": (
        {"chosen_messages": [user("a"), said("b")], "rejected_messages": [user("a"), said("c")]}, "preference",
        [user("a"), said("b")],
    ),
    "axolotl: reflection": (
        {"instruction": "a", "input": "", "output": "b", "reflection": "c", "corrected": "d"}, "reflection",
        [user("a"), said("### Thought:\nb\n\n### Agent Reflection:\nc\n\n### Final Response:\nd")],
    ),
    "axolotl: explainchoice": (
        {"question": "a", "choices": ["b", "c"], "solution": "d", "explanation": "e"}, "explained_choice",
        [user('a\n- "b"\n- "c"'), said("d")],
    ),
    "axolotl: concisechoice": (
        {"question": "a", "choices": ["b", "c"], "explanation": "e"}, "explained_choice",
        [user('a\n- "b"\n- "c"'), said("e")],
    ),
    "axolotl: context_qa.load_v2": (
        {"context": "c", "question": "a", "answer": "b"}, "prompt_completion", [user("c\n\na"), said("b")],
    ),
    "axolotl: kto argilla": (
        {"system": "c", "instruction": "a", "completion": "b"}, "alpaca", [system("c"), user("a"), said("b")],
    ),
    "axolotl: kto intel": (
        {"system": "c", "question": "a", "completion": "b"}, "prompt_completion", [system("c"), user("a"), said("b")],
    ),
    "axolotl: kto ultra": (
        {"system": "c", "prompt": "a", "completion": [user("a"), said("b")]}, "prompt_completion",
        [system("c"), user("a"), said("b")],
    ),
    "axolotl: tools of JSON": (
        {"tools": [{"type": "function", "function": {**TOOL, "parameters": json.dumps(TOOL["parameters"])}}],
         "messages": [
            user("a"),
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {
                "name": "weather", "arguments": json.dumps(CALL["function"]["arguments"]),
            }}]},
            {"role": "tool", "name": "weather", "content": "rain"}, said("b"),
        ]},
        "chat",
        [user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "weather", "content": "rain"},
         said("b")],
    ),
    "OpenAI: functions, with tools left out": (
        {"functions": [TOOL], "messages": [
            user("a"),
            {"role": "assistant", "content": None, "function_call": {
                "name": "weather", "arguments": '{"place": "Kyoto"}',
            }},
            {"role": "function", "name": "weather", "content": "rain"}, said("b"),
        ]},
        "chat",
        [user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "weather", "content": "rain"},
         said("b")],
    ),
    "an answer of JSON": (
        {"prompt": "a", "completion": '[{"name": "b"}]'}, "prompt_completion", [user("a"), said('[{"name": "b"}]')],
    ),
}  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("what", DOCUMENTED)
def test_documented_shapes_go_in_unchanged(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row, name, messages = DOCUMENTED[what]
    path = write(tmp_path / "data.jsonl", row, row)
    task = load_data(path)
    assert task.kind == "chat"
    assert [record["messages"] for record in task.split("train")] == [messages, messages]
    assert f"{path}: the columns are those of the format {name} " in capfd.readouterr().err
    assert load_data(path, name).splits == task.splits
    if "tools" in row or "functions" in row:
        assert task.split("train")[0].get("tools", []) == ([WRAPPED] if row.get("tools", TOOL) else [])
    style = STYLES["tools" if "tools" in task.split("train")[0] else "ChatML"]
    load_data(path, tokenizer=tokenizer_of(style))


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_pairs_of_names(prompt: str, completion: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {prompt: "a", completion: "b"})
    assert load_data(path).split("train") == [{"messages": [user("a"), said("b")]}]


OTHERS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "text": ({"text": "a"}, "text", {"text": "a"}),
    "generation": ({"prompt": "a", "answer": " b"}, "generation", {"prompt": "a", "answer": " b"}),
    "pairs": ({"good": "a", "bad": "b"}, "pairs", {"good": "a", "bad": "b"}),
    "choice": (
        {"question": "a", "choices": ["b", "c"], "answer": 1}, "choice",
        {"prompt": "a", "choices": [" b", " c"], "label": 1},
    ),
    "labels": ({"text": "a", "label": 1}, "classification", {"text": "a", "label": 1}),
    "values": (
        {"sentence1": "a", "sentence2": "b", "label": 0.5}, "regression", {"text": "a", "pair": "b", "label": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds(name: str, ending: str, tmp_path: Path) -> None:
    row, kind, record = OTHERS[name]
    path = tmp_path / f"data.{ending}"
    if ending == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        write(path, row)
    task = load_data(path)
    assert task.kind == kind
    assert task.split("train") == [record]


def test_conversations_in_csv_and_parquet(tmp_path: Path) -> None:
    messages = [user("a"), {**said("b"), "tool_calls": None}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "id"], [json.dumps(messages), "7"]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert load_data(tmp_path / name).split("train") == [{"messages": [user("a"), said("b")]}]


@pytest.mark.parametrize("source", ["a.parquet", "hub"])
def test_calls_have_no_arguments_of_other_tools(source: str, tmp_path: Path) -> None:
    # Arrow gives each mapping of a column the keys of all rows.
    rows = [
        {"messages": [user("a"), {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}],
         "tools": [{"type": "function", "function": {"name": call["name"], "parameters": {"properties": {key: {}}}}}]}
        for call, key in (({"name": "weather", "arguments": {"place": "Kyoto"}}, "place"),
                          ({"name": "root", "arguments": {"number": 2}}, "number"))
    ]  # fmt: skip
    rows[0]["tools"][0]["function"]["parameters"]["properties"]["place"]["type"] = "string"
    rows[1]["tools"][0]["function"]["parameters"]["properties"]["number"]["type"] = "integer"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = load_data(dataset=str(tmp_path)) if source == "hub" else load_data(tmp_path / source)
    assert list(task.split("train")) == rows


REFUSED: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    # rows, format, what the message says
    "unknown columns": ([{"a": 1, "b": 2}], "", "columns a, b"),
    "two formats": ([{"text": "a", "messages": []}], "", "which are those of chat and of text"),
    "two answers": ([{"instruction": "a", "output": "b", "response": "c"}], "", "output: response}"),
    "two contexts": ([{"instruction": "a", "output": "b", "input": "c", "context": "d"}], "", "{input: context}"),
    "another format": ([{"text": "a"}], "alpaca", "must have (instruction, output) or"),
    "a null": ([{"instruction": None, "output": "b"}], "", "null in column 'instruction'"),
    "a number": ([{"instruction": "a", "output": 3}], "", "content=3"),
    "a number as input": ([{"instruction": "a", "output": "b", "input": 3}], "", "input=3, which is no text"),
    "no number as input": ([{"instruction": "a", "output": "b", "input": float("nan")}], "", "input=nan"),
    "a number as context": ([{"prompt": "a", "response": "b", "context": 3}], "", "context=3"),
    "a number to ask": ([{"chosen": "a", "rejected": "b", "prompt": "c", "input": 3}], "", "input=3"),
    "a label as text": ([{"text": "a", "label": "1"}], "", "label='1'"),
    "a list as a text": ([{"messages": "hello"}], "", "which is no list"),
    "an unknown role": ([{"conversations": [{"from": "alien", "value": "a"}]}], "", "role 'alien'; known are"),
    "no role": ([{"messages": [{"content": "a"}]}], "", "role None"),
    "both keys": ([{"messages": [{"role": "user", "from": "human", "content": "a"}]}], "", "both role and from"),
    "an image": ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "", "that is no text"),
    "no answer": ([{"messages": [user("a")]}], "", "none of them a turn of the assistant"),
    "a call in words": ([{"conversations": [{"from": "function_call", "value": "weather"}]}], "", "a function_call"),
    "tools in words": ([{"messages": [user("a"), said("b")], "tools": "weather"}], "", "no list of mappings"),
    "half a transcript": ([{"chosen": "b", "rejected": "c"}], "", "no prompt, and a chosen answer"),
    "tokens": ([{"input_ids": [1], "attention_mask": [1], "labels": [1]}], "", "rows of tokens"),
    "steps with labels": ([{"prompt": "a", "completions": ["b"], "labels": [True]}], "", "a process reward model"),
    "ranked answers": ([{"prompt": "a", "answers": [{"answer": "b", "rank": 1}]}], "", "which one is wanted"),
    "no answer at all": ([{"prompt": [user("a")]}], "", "prompts without answers"),
    "no answer by intent": ([{"article": "a", "unanswerable_question": "b"}], "", "questions without an answer"),
    "a revision": ([{"instruction": "a", "revision": "b"}], "", "revised answers"),
    "a critique": ([{"scores": "1", "critiques": "2", "instruction": "a", "answer": "b"}], "", "critiques, whose"),
    "no prompt": ([{"completion": [user("a"), said("b")]}], "", "no column of a known prompt"),
    "calls in words": ([{"messages": [user("a"), {**said(""), "tool_calls": "weather"}]}], "", "tool_calls='weather'"),
    "half a history": ([{"instruction": "a", "output": "b", "history": [["a"]]}], "", "in place of [instruction"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_rows_are_named(what: str, tmp_path: Path) -> None:
    rows, name, message = REFUSED[what]
    path = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(DataError) as refused:
        load_data(path, name or None)
    assert message in str(refused.value)
    assert refused.value.where.startswith(f"{path}, line 1")
    assert refused.value.fix


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_missing_field_in_the_10000th_record(ending: str, tmp_path: Path) -> None:
    good, bad = {"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}
    path, rows = tmp_path / f"data.{ending}", [good] * 9_999 + [bad, good]
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps([*rows[:-2], {"instruction": "a"}, good]))
    else:
        write(path, *rows[:-2], {"instruction": "a"}, good)
    place = {"jsonl": "line 10000", "json": "record 10000 (line 1)", "parquet": "row 10000"}[ending]
    with pytest.raises(DataError) as refused:
        load_data(path)
    assert refused.value.where == f"{path}, {place}"


def test_an_optional_column_may_begin_later(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", "input": "c"},
    )
    assert load_data(path).split("train")[1]["messages"][0]["content"] == "a\nc"


def test_what_nothing_reads_is_named_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    messages = [{**user("a"), "mood": "good"}, said("b")]
    path = write(tmp_path / "data.jsonl", *[{"messages": messages, "id": 1, "source": "x"}] * 3)
    load_data(path)
    load_data(path)
    lines = [line for line in capfd.readouterr().err.splitlines() if "no field reads" in line]
    assert lines == [f"note: {path}: columns that no field reads: id, source, messages.mood"]


def test_segments_are_joined_as_they_are(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(STYLES["ChatML"])
    parts = [(True, "<|im_start|>Hello\n"), (False, "user: "), (True, "hi ü!<|im_end|>"), (False, " bye")]
    rows = {"segments": [{"label": label, "text": text} for label, text in parts]}
    task = load_data(write(tmp_path / "data.jsonl", rows), tokenizer=tokenizer)
    row = encode("chat", task.split("train"), tokenizer, encoder_decoder=False, max_length=99)[0]
    assert row["input_ids"] == tokenizer("".join(text for _, text in parts), add_special_tokens=False)["input_ids"]
    kept = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(kept) == "".join(text for label, text in parts if label)
    model, own = dovetail.load("playground")
    wanted = [{"label": False, "text": "The sum of 2 and 3 is"}, {"label": True, "text": " five."}]
    whole = load_data(write(tmp_path / "data.jsonl", {"segments": wanted}))
    for metric in ("perplexity", "exact_match"):
        scored = replace(whole, metric=metric)
        assert dovetail.evaluate(model, own, scored, split="train", progress=False)["data"]["perplexity"] > 1
    for bad in ([{"text": "a"}], [{"label": True}], [{"label": False, "text": "a"}], []):
        with pytest.raises(DataError, match=r"data\.jsonl, line 1"):
            load_data(write(tmp_path / "data.jsonl", {"segments": bad}))
    with pytest.raises(DataError, match="without a template"):
        load_data(write(tmp_path / "data.jsonl", rows), template="plain")


def test_renamed_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"ask": "a", "reply": "b", "output": "not this"})
    fields = {"instruction": "ask", "output": "reply"}
    assert load_data(path, "alpaca", fields=fields).split("train") == [{"messages": [user("a"), said("b")]}]
    with pytest.raises(DataError, match="column 'asked', which data"):
        load_data(path, "alpaca", fields={**fields, "instruction": "asked"})
    with pytest.raises(DataError, match="the format alpaca has no field 'ask'"):
        load_data(path, "alpaca", fields={"ask": "ask"})
    with pytest.raises(DataError, match="the format must be one of alpaca"):
        load_data(path, "poems")
    with pytest.raises(DataError, match="did you mean template"):
        load_data(path, templat="plain")


def test_refused_columns_go_in_as_the_message_says(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"instruction": "a", "revision": "b", "answer": "c"})
    assert load_data(path, "alpaca", fields={"output": "revision"}).split("train") == [
        {"messages": [user("a"), said("b")]}
    ]
    path = write(tmp_path / "data.jsonl", {"completion": [user("a"), said("b")], "label": True})
    assert load_data(path, "chat", fields={"messages": "completion"}).split("train") == [
        {"messages": [user("a"), said("b")]}
    ]


def test_new_columns_do_not_change_what_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, dict[str, Any]] = {
        "choice": {"question": "a", "choices": ["b", "c"], "answer": 0, "solution": "b", "explanation": "c"},
        "labels": {"text": "a", "label": 1, "completion": "b"},
        "alpaca": {"instruction": "a", "output": "b", "revision": "c"},
    }
    for name, row in rows.items():
        load_data(write(tmp_path / f"{name}.jsonl", row))
        assert f"the format {name} " in capfd.readouterr().err


@pytest.mark.parametrize("write_arguments", [False, True])
def test_a_template_may_take_arguments_as_json(write_arguments: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(STYLES["tools"])
    shown = "call.function.arguments" if write_arguments else "call.function.arguments | tojson"
    tokenizer.chat_template = tokenizer.chat_template.replace("call.function.arguments | tojson", shown)
    calls = [
        {**CALL, "function": {"name": "weather", "arguments": form({"place": "Kyoto"})}} for form in (dict, json.dumps)
    ]
    rows = [{"messages": [user("a"), {"role": "assistant", "tool_calls": [call]}]} for call in calls]
    task = load_data(write(tmp_path / "data.jsonl", *rows))
    first, second = encode("chat", task.split("train"), tokenizer, encoder_decoder=False, max_length=200)
    assert first == second
    assert '"arguments": {"place": "Kyoto"}' in tokenizer.decode(first["input_ids"])


def test_a_share_becomes_the_validation_split(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *[{"text": f"text {number}"} for number in range(50)])
    task = load_data(path, split=0.1)
    train, validation = task.split("train"), task.split("validation")
    assert (len(train), len(validation)) == (45, 5)
    assert sorted((*train, *validation), key=str) == sorted(load_data(path).split("train"), key=str)
    assert load_data(path, split=0.1).splits == task.splits
    assert load_data(path, split=0.1, seed=1).splits != task.splits
    assert len(load_data(path, split=0.001).split("validation")) == 1
    with pytest.raises(DataError, match="at least two records"):
        load_data(write(tmp_path / "one.jsonl", {"text": "a"}), split=0.5)


def test_a_recipe_names_format_template_and_share(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", *[{"question": "a", "answer": str(number)} for number in range(4)])
    data = {"train": "data.jsonl", "format": "prompt_completion", "template": "plain", "split": 0.25}
    recipe = Recipe.parse({"model": "playground", "chain": "lora(r=4)", "data": data}, folder=tmp_path)
    task = load_task(recipe.data)
    assert (task.kind, task.metric, recipe.evaluate.split) == ("chat", "perplexity", "validation")
    assert all(record["template"] == "plain" for record in task.split("validation"))
    with pytest.raises(RecipeError, match="has no conversations"):
        Recipe.parse({"model": "playground", "chain": "lora(r=4)", "data": data | {"format": "text"}}, folder=tmp_path)
    with pytest.raises(DataError, match="format labels"):
        load_data(tmp_path / "data.jsonl", "labels")


def test_load_data_checks_the_template(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"messages": [system("c"), user("a"), said("b")]})
    load_data(path, tokenizer=tokenizer_of(STYLES["Llama 3"]))
    with pytest.raises(DataError, match="System role not supported"):
        load_data(path, tokenizer=tokenizer_of(STYLES["Gemma"]))
    load_data(path, tokenizer=tokenizer_of(STYLES["Gemma"]), template="plain")
    load_data(path, tokenizer=TOKENIZERS["bytes_bpe"]())
    assert dovetail.load_data is load_data


def test_each_format_has_its_kind() -> None:
    assert {form.kind for form in FORMATS.values()} == {
        "chat", "generation", "choice", "pairs", "text", "classification",
    }  # fmt: skip
