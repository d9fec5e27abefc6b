"""Rows of conversations: the tokens of `apply_chat_template`, and a mask of exactly the assistant's turns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chat_styles import REASONING, STYLES, TAGGED, Style, tokenizer_of
from dovetail.errors import DataError
from dovetail.tasks.find import as_task
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, RowMaker
from dovetail.training.train import train
from small_tokenizers import SIZE, TOKENIZERS

CHAT = STYLES["ChatML"]
SYSTEM = {"role": "system", "content": "Be kind 🙂"}
TURNS = [
    ("Which animal lays eggs? 🐔", "é 🐔 a chicken — 鶏"),
    ("日本 and water?", "🙂"),
    ("one\ntwo 🙂", "The sun is a star.\n\n🌞"),
]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "the weather", "parameters": {"type": "object", "properties": {}}},
}


def conversation(style: Style, turns: int = 3) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [SYSTEM] if style.system else []
    for question, answer in TURNS[:turns]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def rows(tokenizer: Any, *records: dict[str, Any], max_length: int = 1000) -> list[dict[str, Any]]:
    return RowMaker(tokenizer, encoder_decoder=False, max_length=max_length).examples("chat", records)


def pieces(tokenizer: Any, row: dict[str, Any]) -> list[tuple[bool, str]]:
    """The texts of the stretches of tokens that count, and of those that do not."""
    found: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORED)
        if not found or found[-1][0] != (label != IGNORED):
            found.append((label != IGNORED, []))
        found[-1][1].append(token)
    return [(counted, tokenizer.decode(ids)) for counted, ids in found]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", STYLES)
def test_tokens_and_mask_of_each_style(name: str, turns: int) -> None:
    style = STYLES[name]
    tokenizer = tokenizer_of(style)
    messages = conversation(style, turns)
    (row,) = rows(tokenizer, {"messages": messages})
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    counted = [text for counts, text in pieces(tokenizer, row) if counts]
    strip = str.strip if style.kind == "pieces" else str  # its decoder drops a leading space
    assert [strip(text) for text in counted] == [strip(style.turn(answer)) for _, answer in TURNS[:turns]]
    if style.kind == "bytes_bpe":
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert "".join(text for _, text in pieces(tokenizer, row)) == whole


def test_tools_and_their_calls() -> None:
    tokenizer = tokenizer_of(STYLES["tools"])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Kyōto"}}}
    messages = [
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "rain ☔"},
        {"role": "assistant", "content": "It rains ☔"},
    ]
    (row,) = rows(tokenizer, {"messages": messages, "tools": [TOOL]})
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, tools=[TOOL])["input_ids"]
    said = '<tool_call>\n{"name": "weather", "arguments": {"place": "Kyōto"}}\n</tool_call><|im_end|>'
    assert [text for counted, text in pieces(tokenizer, row) if counted] == [said, "It rains ☔<|im_end|>"]


def test_what_a_template_leaves_out_is_refused() -> None:
    tokenizer = tokenizer_of(CHAT)
    with pytest.raises(DataError, match="a tool that is not in the text"):
        rows(tokenizer, {"messages": conversation(CHAT), "tools": [TOOL]})
    tokenizer = tokenizer_of(STYLES["Gemma"])
    with pytest.raises(DataError, match="System role not supported") as refused:
        rows(tokenizer, {"messages": conversation(STYLES["Gemma"])}, {"messages": conversation(CHAT)})
    assert refused.value.where == "record 1"
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match="a call of the tool 'weather'"):
        rows(tokenizer, {"messages": messages})
    tokenizer = tokenizer_of(CHAT)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ (m.content[:3] if m.role == 'user' else m.content) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(DataError, match="a text of the role user that is not in the text: 'Which"):
        rows(tokenizer, {"messages": [{"role": "user", "content": TURNS[0][0]}, {"role": "assistant", "content": "a"}]})


def test_a_template_that_changes_earlier_turns() -> None:
    tokenizer = tokenizer_of(CHAT)
    tokenizer.chat_template = REASONING
    (row,) = rows(tokenizer, {"messages": conversation(CHAT, 2)})
    assert [text for counted, text in pieces(tokenizer, row) if counted] == [
        TURNS[0][1] + "<|im_end|>", "<think>\n\n</think>\n\n" + TURNS[1][1] + "<|im_end|>",
    ]  # fmt: skip


def test_generation_tags_decide_where_beginnings_change() -> None:
    tokenizer = tokenizer_of(CHAT)
    tokenizer.chat_template = TAGGED
    (row,) = rows(tokenizer, {"messages": conversation(CHAT, 2)})
    assert [text for counted, text in pieces(tokenizer, row) if counted] == [
        TURNS[0][1] + "<|im_end|>", TURNS[1][1] + "<|im_end|>",
    ]  # fmt: skip
    tokenizer.chat_template = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match="a turn whose text depends on the turns after it"):
        rows(tokenizer, {"messages": conversation(CHAT, 2)})


def test_turns_that_are_not_trained() -> None:
    tokenizer = tokenizer_of(CHAT)
    messages = conversation(CHAT, 2)
    messages[2] = {**messages[2], "train": False}
    (row,) = rows(tokenizer, {"messages": messages})
    assert [text for counted, text in pieces(tokenizer, row) if counted] == [TURNS[1][1] + "<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    tokenizer = tokenizer_of(CHAT)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="end its turn"):
        rows(tokenizer, {"messages": conversation(CHAT)})


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a metal.\n\n### Response:\n"
)


@pytest.mark.parametrize("form", [None, "<s> $A"], ids=["bare", "begin token"])
def test_named_templates(form: str | None) -> None:
    tokenizer = TOKENIZERS["bytes_bpe"](form)
    begin = "" if form is None else "<s>"
    messages = [{"role": "user", "content": "Name a metal."}, {"role": "assistant", "content": "copper 🙂"}]
    for record in ({"messages": messages}, {"messages": messages, "template": "alpaca"}):
        (row,) = rows(tokenizer, record)
        assert pieces(tokenizer, row) == [(False, begin + ALPACA), (True, "copper 🙂</s>")]
    (row,) = rows(tokenizer, {"messages": messages, "template": "plain"})
    assert pieces(tokenizer, row) == [(False, begin + "Name a metal.\n"), (True, "copper 🙂</s>")]
    with pytest.raises(DataError, match="not one token of the tokenizer"):
        rows(tokenizer, {"messages": messages, "template": "chatml"})
    with pytest.raises(DataError, match="must be one of alpaca, chatml, plain"):
        rows(tokenizer, {"messages": messages, "template": "vicuna"})
    tokenizer = tokenizer_of(CHAT)
    (row,) = rows(tokenizer, {"messages": messages, "template": "chatml"})
    assert row == rows(tokenizer, {"messages": messages})[0]


def test_the_context_of_alpaca() -> None:
    tokenizer = TOKENIZERS["bytes_bpe"]()
    user = {"role": "user", "content": "Add.\n1 2", "instruction": "Add.", "input": "1 2"}
    (row,) = rows(tokenizer, {"messages": [user, {"role": "assistant", "content": "3"}]})
    (_, prompt), (_, answer) = pieces(tokenizer, row)
    assert answer == "3</s>"
    assert prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in prompt


def test_long_conversations_are_cut_and_empty_ones_refused() -> None:
    tokenizer = tokenizer_of(CHAT)
    make = RowMaker(tokenizer, encoder_decoder=False, max_length=1000)
    (whole,) = make.chats([{"messages": conversation(CHAT)}])
    first = whole["labels"].index(next(label for label in whole["labels"] if label != IGNORED))
    make = RowMaker(tokenizer, encoder_decoder=False, max_length=first + 2)
    (row,) = make.chats([{"messages": conversation(CHAT)}])
    assert row["input_ids"] == whole["input_ids"][: first + 2]
    assert make.say("chat", shown=False) == {"cut": 1}
    with pytest.raises(DataError, match="none of the assistant's") as refused:
        rows(tokenizer, {"messages": conversation(CHAT, 1)}, max_length=first)
    assert refused.value.where == "record 0"


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "none of them a turn of the assistant"),
        ([{"role": "user", "content": "a"}], "none of them a turn of the assistant"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "content=None"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}], "content=3"),
        (["user: a"], "user: a"),
        ([{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "a"}], "surrogate"),
    ],
)
def test_bad_messages_are_named(messages: list[Any], found: str) -> None:
    with pytest.raises(DataError, match=found):
        Task("t", "chat", "perplexity", {"train": [{"messages": messages}]})


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def test_training_and_scoring() -> None:
    tokenizer = TOKENIZERS["bytes_bpe"]()
    model = decoder()
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in [("a metal", "copper"), ("a star", "the sun"), ("legs", "eight")]
    ]
    task = as_task(records)
    assert (task.kind, task.metric) == ("chat", "perplexity")
    before = evaluate(model, tokenizer, records)["data"]
    assert math.isclose(before["perplexity"], math.exp(before["nats_per_token"]))
    train(model, tokenizer, records, max_steps=100, learning_rate=6e-3, progress=False)
    assert tokenizer.chat_template is not None  # what was trained is stored
    assert evaluate(model, tokenizer, records)["data"]["perplexity"] < before["perplexity"] / 10
    said: list[str] = []
    exact = Task("data", "chat", "exact_match", {"test": records})
    scores = evaluate(model, tokenizer, exact, on_outputs=lambda _, texts: said.extend(texts))["data"]
    assert scores["exact_match"] == 1.0
    assert said == ["copper", "the sun", "eight"]
