"""Formats of data sets: from the columns of a file to records.

A format names the columns that it reads and makes a record of them. A format is found by the columns of the first row:
the one that reads most of them. The shapes are those that LLaMA-Factory (data/README.md), axolotl
(docs/dataset-formats) and TRL (dataset formats) document.

| format | columns | record |
|---|---|---|
| alpaca | instruction, output; input, system, history | chat |
| reflection | instruction, output, reflection, corrected; input, system | chat |
| chat | messages; tools, system | chat |
| sharegpt | conversations; tools, system | chat |
| prompt_completion | a prompt and an answer, by one of the pairs of names in PAIRS; system, context | chat |
| preference | chosen, rejected; prompt or messages, system, input | chat (chosen is trained) |
| generation, pairs, text | the fields of the kind | the kind |
| segments | segments, each with a text and whether it is trained | chat, without a template |
| explained_choice | prompt, choices, answer (a text) | chat |
| choice | prompt, choices, label | choice |
| labels | text, label; pair | classification of integers or texts, else regression |

Rows whose answer is marked as undesired (`kto_tag: false`, or a `label` that is false) make no record. Columns that say
that a turn is not trained are those of `dovetail.tasks.messages`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dovetail.errors import DataError
from dovetail.tasks.files import Row, typed
from dovetail.tasks.messages import conversation, parsed, read_messages, read_tools, turns, unread_keys
from dovetail.tasks.task import FIELDS, Record
from dovetail.tasks.templates import SEGMENTS

Fields = Mapping[str, Any]
"""Field of the format -> value; fields whose column is missing or null are left out."""

PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "output"), ("prompt", "generation"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("input", "output"),
    ("question", "completion"), ("input", "response"), ("article", "summary"), ("message_1", "message_2"),
)  # fmt: skip
"""The columns of a prompt and its answer that `prompt_completion` reads."""

_CONVERSATIONS = {"messages", "prompt", "completion", "chosen"}
"""Fields that may hold messages."""


@dataclass(frozen=True)
class Format:
    """A format of a data set.

    kind       of its records; for labels, of integer labels
    fields     the fields that a row must have
    columns    the columns that may hold them, each a tuple in the order of `fields`
    optional   further field -> the columns that may hold it
    record     the values of a row -> the record; raises ValueError with what was found for values that make none
    last       found by its columns only where no other format is; of several columns for a field, it takes the first
    """

    kind: str
    fields: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    record: Callable[[Fields], Record]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    last: bool = False


def _alpaca(fields: Fields) -> Record:
    instruction, given = fields["instruction"], _text(fields, "input")
    user: dict[str, Any] = {"role": "user", "content": instruction}
    if given:
        # Both apart too, for the template alpaca.
        instruction = _text(fields, "instruction")
        user |= {"content": f"{instruction}\n{given}", "instruction": instruction, "input": given}
    messages = _system(fields)
    for turn in parsed(fields.get("history")) or []:
        if not isinstance(turn, Sequence) or len(turn) != 2:
            raise ValueError(f"history with {turn!r} in place of [instruction, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return {"messages": [*messages, user, {"role": "assistant", "content": fields["output"]}]}


def _reflection(fields: Fields) -> Record:
    parts = ("Thought", "output"), ("Agent Reflection", "reflection"), ("Final Response", "corrected")
    answer = "\n\n".join(f"### {head}:\n{_text(fields, name)}" for head, name in parts)
    return _alpaca({**fields, "output": answer})


def _chat(fields: Fields) -> Record:
    messages = read_messages(fields["messages"])
    if messages and messages[0]["role"] == "system":
        return {"messages": messages, **_tools(fields)}
    return {"messages": _system(fields) + messages, **_tools(fields)}


def _prompt_completion(fields: Fields) -> Record:
    prompt, answer = conversation(fields["prompt"]), turns("assistant", conversation(fields["completion"]))
    if isinstance(prompt, str) and (context := _text(fields, "context")):
        prompt = f"{context}\n\n{prompt}"
    if answer and answer[0]["role"] in ("system", "user"):  # the whole conversation
        prompt = []
    system = [] if answer and answer[0]["role"] == "system" else _system(fields)
    return {"messages": system + turns("user", prompt) + answer, **_tools(fields)}


def _preference(fields: Fields) -> Record:
    chosen = turns("assistant", conversation(fields["chosen"]))
    prompt, given = conversation(fields.get("prompt")), _text(fields, "input")
    if prompt is None:
        prompt, given = given or None, ""
    if chosen and chosen[0]["role"] != "assistant":  # the whole conversation
        return {"messages": (_system(fields) if chosen[0]["role"] != "system" else []) + chosen, **_tools(fields)}
    if prompt is None:
        messages = _transcript(fields["chosen"])
    else:
        if isinstance(prompt, str) and given:
            prompt = f"{prompt}\n{given}"
        messages = turns("user", prompt) + chosen
    return {"messages": _system(fields) + messages, **_tools(fields)}


def _transcript(text: Any) -> list[dict[str, Any]]:
    """Return the turns of a text with "Human:" and "Assistant:" at the beginnings of paragraphs (hh-rlhf)."""
    parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + text.strip()) if isinstance(text, str) else []
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        raise ValueError("no prompt, and a chosen answer that is no conversation of Human: and Assistant:")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)]


def _segments(fields: Fields) -> Record:
    messages = []
    for segment in parsed(fields["segments"]) or []:
        if not isinstance(segment, Mapping) or not isinstance(segment.get("label"), bool):
            raise ValueError(f"segment {segment!r} in place of {{label: true or false, text: ...}}"[:200])
        messages.append({"role": "assistant" if segment["label"] else "user", "content": segment.get("text")})
    return {"messages": messages, "template": SEGMENTS}


def _explained_choice(fields: Fields) -> Record:
    choices = parsed(fields["choices"])
    if not isinstance(choices, list):
        raise ValueError(f"choices={choices!r}"[:200] + ", which is no list")
    asked = "\n".join([_text(fields, "prompt"), *(f'- "{choice}"' for choice in choices)])
    return {"messages": _system(fields) + turns("user", asked) + turns("assistant", fields["answer"])}


def _choice(fields: Fields) -> Record:
    prompt, choices = fields["prompt"], fields["choices"]
    texts = isinstance(prompt, str) and isinstance(choices, list) and all(isinstance(c, str) for c in choices)
    if texts and not prompt[-1:].isspace() and not any(choice[:1].isspace() for choice in choices):
        choices = [f" {choice}" for choice in choices]  # what joins a choice to the prompt, as lm-eval does
    return {"prompt": prompt, "choices": choices, "label": fields["label"]}


def _same(fields: Fields) -> Record:
    return dict(fields)


def _text(fields: Fields, name: str) -> str:
    """Return the text of a field, "" where there is none; a number would become a text unseen."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r}"[:200] + ", which is no text")
    return value


def _system(fields: Fields) -> list[dict[str, Any]]:
    system = fields.get("system")
    return [{"role": "system", "content": system}] if system else []


def _tools(fields: Fields) -> dict[str, Any]:
    tools = read_tools(fields.get("tools"))
    return {"tools": tools} if tools else {}


_SYSTEM = {"system": ("system", "system_prompt")}
_TOOLS = {"tools": ("tools",)}
_FUNCTIONS = {"tools": ("tools", "functions")}
_DESIRED = {"desired": ("kto_tag", "label")}
_REFLECTION = ("instruction", "output", "reflection", "corrected")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def _plain(kind: str, *more: tuple[str, ...], **optional: tuple[str, ...]) -> Format:
    names = tuple(FIELDS[kind])
    return Format(kind, names, (names, *more), _same, optional)


FORMATS: Mapping[str, Format] = {
    "alpaca": Format(
        "chat", ("instruction", "output"),
        (
            ("instruction", "output"), ("instruction", "response"), ("instruction", "completion"),
            ("INSTRUCTION", "RESPONSE"),
        ),
        _alpaca, {"input": ("input", "context"), **_SYSTEM, "history": ("history",), **_DESIRED},
    ),
    "chat": Format("chat", ("messages",), (("messages",),), _chat, {**_SYSTEM, **_FUNCTIONS, **_DESIRED}),
    "sharegpt": Format(
        "chat", ("messages",), (("conversations",), ("conversation",)), _chat,
        {**_SYSTEM, **_FUNCTIONS, **_DESIRED},
    ),
    "prompt_completion": Format(
        "chat", ("prompt", "completion"), PAIRS, _prompt_completion,
        {**_SYSTEM, "context": ("context", "article"), **_TOOLS, **_DESIRED},
    ),
    "preference": Format(
        "chat", ("chosen", "rejected"),
        (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages")),
        _preference,
        {
            "prompt": ("prompt", "question", "instruction", "messages", "conversations"), "input": ("input",),
            **_SYSTEM, **_TOOLS,
        },
    ),
    "segments": Format("chat", ("segments",), (("segments",),), _segments),
    "reflection": Format(
        "chat", _REFLECTION, (_REFLECTION,), _reflection, {"input": ("input",), **_SYSTEM, **_DESIRED},
    ),
    "explained_choice": Format(
        "chat", ("prompt", "choices", "answer"),
        (("question", "choices", "solution"), ("question", "choices", "explanation")), _explained_choice, _SYSTEM,
        last=True,
    ),
    "generation": _plain("generation", **_DESIRED),
    "choice": Format(
        "choice", ("prompt", "choices", "label"),
        (("prompt", "choices", "label"), ("question", "choices", "label"), ("question", "choices", "answer")), _choice,
    ),
    "pairs": _plain("pairs"),
    "text": _plain("text"),
    "labels": _plain("classification", ("sentence", "label"), ("sentence1", "label"), pair=("pair", "sentence2")),
}  # fmt: skip
"""Name -> format."""

_ANSWERLESS = "add a column with the answer that the model is to give"
REFUSED: Sequence[tuple[tuple[str, ...], str, str]] = (
    (
        ("input_ids",),
        "rows of tokens, which only the tokenizer that made them can read",
        "give the texts: messages, or segments with a text and a label each",
    ),
    (
        ("prompt", "completions", "labels"),
        "steps with a label each, for a process reward model, which is not trained here",
        "keep the rows whose labels are all true, with their steps joined in a column completion",
    ),
    (
        ("prompt", "answers"),
        "several answers to a prompt, of which the row does not say which one is wanted",
        "write the best answer to a column completion",
    ),
    (("article", "unanswerable_question"), "questions without an answer in the row", _ANSWERLESS),
    (
        ("instruction", "revision"),
        "instructions and revised answers, and no column of a known answer",
        "train on the revised answers: data.format: alpaca, data.fields: {output: revision}",
    ),
    (
        ("scores", "critiques", "instruction", "answer"),
        "critiques, whose prompt is not in the row",
        "write the whole prompt and the critique to the columns prompt and completion",
    ),
    (
        ("completion",),
        "answers, and no column of a known prompt",
        "add the prompts; if the answers are lists of messages: data.format: chat, data.fields: {messages: completion}",
    ),
    (("prompt",), "prompts without answers, as reinforcement learning takes them", _ANSWERLESS),
)
"""Columns of documented formats that cannot be trained on, what they are, and what to do."""


@lru_cache
def columns_of(name: str, found: tuple[str, ...], names: tuple[tuple[str, str], ...]) -> dict[str, str] | None:
    """Return field -> column of a format in a file with these columns; None where a field has none.

    names    pairs of field and column, as the user says
    Raises ValueError where several columns may hold a field.
    """
    form, named = FORMATS[name], dict(names)
    if not set(named) <= {*form.fields, *form.optional} or not set(named.values()) <= set(found):
        return None
    ways: list[dict[str, str]] = []
    for columns in form.columns:
        way = {**dict(zip(form.fields, columns, strict=True)), **{f: c for f, c in named.items() if f in form.fields}}
        if set(way.values()) <= set(found) and way not in ways:
            ways.append(way)
    if not ways:
        return None
    if len(ways) > 1 and not form.last:
        texts = " or ".join("{" + ", ".join(f"{f}: {c}" for f, c in way.items()) + "}" for way in ways)
        raise ValueError(texts)
    way = ways[0]
    for field_, columns in form.optional.items():
        there = [named[field_]] if field_ in named else [c for c in columns if c in found and c not in way.values()]
        if len(there) > 1:
            raise ValueError(" or ".join(f"{{{field_}: {column}}}" for column in there))
        if there:
            way[field_] = there[0]
    return way


def detect(row: Row, named: Mapping[str, str]) -> str:
    """Return the name of the format that reads most columns of a row; DataError where that is none, or several."""
    found = tuple(map(str, row.columns))
    read: dict[str, int] = {}
    for name in FORMATS:
        try:
            way = columns_of(name, tuple(found), tuple(named.items()))
        except ValueError:
            # Several columns may hold a field, which is refused if this format turns out to be the one.
            form = FORMATS[name]
            known = {column for columns in (*form.columns, *form.optional.values()) for column in columns}
            way = {column: column for column in found if column in known - {*_DESIRED["desired"]}}
        if way is not None:
            read[name] = len(way.keys() - _DESIRED)  # a label may be anything
    read = {name: number for name, number in read.items() if not FORMATS[name].last} or read
    best = [name for name, number in read.items() if number == max(read.values())]
    if len(best) == 1:
        return best[0]
    for columns, what, fix in REFUSED:
        if not best and set(columns) <= set(found):
            rule = "a row must have what is learned from it: texts, and the answer to a prompt"
            raise DataError(row.where, found=f"columns {', '.join(found)}: {what}", rule=rule, fix=fix)
    known = "; ".join(f"{name}: {', '.join(form.columns[0])}" for name, form in FORMATS.items())
    raise DataError(
        row.where,
        found="columns " + ", ".join(found) + (f", which are those of {' and of '.join(best)}" if best else ""),
        rule=f"the columns must be those of one format ({known})",
        fix=f"name the format: data.format: {best[0]}"
        if best
        else "map columns with data.fields, {FIELD: COLUMN}, and name the format with data.format",
    )


def read_record(name: str, row: Row, named: Mapping[str, str]) -> tuple[Record | None, list[str]]:
    """Return the record of a row and the columns that it does not hold; None: its answer is marked as undesired.

    Raises DataError that names the row.
    """
    form = FORMATS[name]
    found = list(row.columns)
    try:
        way = columns_of(name, tuple(found), tuple(named.items()))
    except ValueError as error:
        raise DataError(
            row.where,
            found="columns " + ", ".join(map(str, found)),
            rule=f"a field of the format {name} must be in one column; here in {error}",
            fix="name the columns of the fields with data.fields",
        ) from None
    if way is None:
        raise _missing(name, row, named)
    fields = {f: row.columns[column] for f, column in way.items() if row.columns[column] is not None}
    if row.untyped:
        fields = {f: typed(value, FIELDS[form.kind].get(f, str)) for f, value in fields.items()}
        if name == "labels":
            fields["label"] = typed(fields["label"], (int, float))
    try:
        desired = _desired(fields.pop("desired", None), way.get("desired"), "desired" in named)
        if missing := [f for f in form.fields if f not in fields]:
            raise ValueError(f"null in column {way[missing[0]]!r}")
        for column in _MEDIA if form.kind == "chat" else ():
            if parsed(row.columns.get(column)):
                raise ValueError(f"{column}={row.columns[column]!r}"[:200] + ", where only texts are trained on")
        record = form.record(fields)
    except ValueError as error:
        raise DataError(
            row.where,
            found=str(error),
            rule=f"a row must have the values of the format {name}",
            fix="correct the record, or leave it out",
        ) from None
    unread = [column for column in found if column not in way.values()]
    if desired is None and "desired" in way and row.columns[way["desired"]] is not None:
        unread.append(way["desired"])
    for f in _CONVERSATIONS & fields.keys():
        unread += [f"{way[f]}.{key}" for key in unread_keys(fields[f])]
    return (None if desired is False else record), unread


def _desired(value: Any, column: str | None, named: bool) -> bool | None:
    """Return whether the answer of a row is desired; None where nothing says so.

    A column `label` may hold anything, and says so only as true or false; `kto_tag`, or a column that is named, must.
    """
    texts = {"true": True, "false": False}
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str) and value.strip().lower() in texts:
        return texts[value.strip().lower()]
    if column == "label" and not named:
        return None
    if isinstance(value, str) and value.strip() in ("", "0", "1"):  # CSV
        return bool(int(value)) if value.strip() else None
    if value not in (0, 1):
        raise ValueError(f"{column}={value!r}"[:200] + ", which is not true or false")
    return bool(value)


def _missing(name: str, row: Row, named: Mapping[str, str]) -> DataError:
    form = FORMATS[name]
    known = {*form.fields, *form.optional}
    found = "columns " + ", ".join(map(str, row.columns))
    if strange := [f for f in named if f not in known]:
        rule = f"the format {name} has the fields {', '.join((*form.fields, *form.optional))}"
        return DataError(row.where, found=f"data.fields names {strange[0]!r}", rule=rule, fix=f"remove {strange[0]}")
    ways = " or ".join(dict.fromkeys("(" + ", ".join(columns) + ")" for columns in form.columns))
    if gone := [column for column in named.values() if column not in row.columns]:
        ways = f"column {gone[0]!r}, which data.fields names"
    return DataError(
        row.where,
        found=found,
        rule=f"a row of the format {name} must have {ways}",
        fix=f"set data.fields of the recipe: {{{form.fields[0]}: COLUMN, ...}}, or correct the record",
    )
