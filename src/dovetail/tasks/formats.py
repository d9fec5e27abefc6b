"""Formats of data sets: from the columns of a file to records.

A format names the columns that it reads and makes a record of them. A format is found by the columns of the first row:
the one that reads most of them. The shapes are those that LLaMA-Factory (data/README.md), axolotl
(docs/dataset-formats) and TRL (dataset formats) document.

| format | columns | record |
|---|---|---|
| alpaca | instruction, output; input, system, history | chat |
| chat | messages; tools, system | chat |
| sharegpt | conversations; tools, system | chat |
| prompt_completion | a prompt and an answer, by one of the pairs of names in PAIRS; system, context | chat |
| preference | chosen, rejected; prompt or messages, system, input | chat (chosen is trained) |
| generation, pairs, text | the fields of the kind | the kind |
| segments | segments, each with a text and whether it is trained | chat, without a template |
| choice | prompt, choices, label | choice |
| labels | text, label; pair | classification of integers or texts, else regression |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dovetail.errors import DataError
from dovetail.tasks.files import Row, typed
from dovetail.tasks.task import FIELDS, Record
from dovetail.tasks.templates import SEGMENTS

Fields = Mapping[str, Any]
"""Field of the format -> value; fields whose column is missing or null are left out."""

PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("prompt", "output"), ("prompt", "generation"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("input", "output"),
    ("input", "response"), ("article", "summary"), ("message_1", "message_2"),
)  # fmt: skip
"""The columns of a prompt and its answer that `prompt_completion` reads."""

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
"""Other names of roles. `function_call` is a turn of the assistant that calls a tool."""
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Keys of a message that chat templates read."""
_MESSAGE = {"role", "from", "content", "value", "train", "weight", *_KEPT}
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
    """

    kind: str
    fields: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    record: Callable[[Fields], Record]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _alpaca(fields: Fields) -> Record:
    instruction, given = fields["instruction"], _text(fields, "input")
    user: dict[str, Any] = {"role": "user", "content": instruction}
    if given:
        # Both apart too, for the template alpaca.
        instruction = _text(fields, "instruction")
        user |= {"content": f"{instruction}\n{given}", "instruction": instruction, "input": given}
    messages = _system(fields)
    for turn in _parsed(fields.get("history")) or []:
        if not isinstance(turn, Sequence) or len(turn) != 2:
            raise ValueError(f"history with {turn!r} in place of [instruction, answer]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return {"messages": [*messages, user, {"role": "assistant", "content": fields["output"]}]}


def _chat(fields: Fields) -> Record:
    messages = _messages(fields["messages"])
    if messages and messages[0]["role"] == "system":
        return {"messages": messages, **_tools(fields)}
    return {"messages": _system(fields) + messages, **_tools(fields)}


def _prompt_completion(fields: Fields) -> Record:
    prompt, completion = _conversation(fields["prompt"]), _conversation(fields["completion"])
    if isinstance(prompt, str) and (context := _text(fields, "context")):
        prompt = f"{context}\n\n{prompt}"
    return {"messages": _system(fields) + _turns("user", prompt) + _turns("assistant", completion), **_tools(fields)}


def _preference(fields: Fields) -> Record:
    chosen = _turns("assistant", _conversation(fields["chosen"]))
    prompt, given = _conversation(fields.get("prompt")), _text(fields, "input")
    if prompt is None:
        prompt, given = given or None, ""
    if chosen and chosen[0]["role"] != "assistant":  # the whole conversation
        return {"messages": (_system(fields) if chosen[0]["role"] != "system" else []) + chosen, **_tools(fields)}
    if prompt is None:
        messages = _transcript(fields["chosen"])
    else:
        if isinstance(prompt, str) and given:
            prompt = f"{prompt}\n{given}"
        messages = _turns("user", prompt) + chosen
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
    for segment in _parsed(fields["segments"]) or []:
        if not isinstance(segment, Mapping) or not isinstance(segment.get("label"), bool):
            raise ValueError(f"segment {segment!r} in place of {{label: true or false, text: ...}}"[:200])
        messages.append({"role": "assistant" if segment["label"] else "user", "content": segment.get("text")})
    return {"messages": messages, "template": SEGMENTS}


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
    tools = _parsed(fields.get("tools"))
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools={tools!r}"[:200] + ", which is no list of mappings")
    whole = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]
    return {"tools": whole}


def _turns(role: str, value: Any) -> list[dict[str, Any]]:
    """Return a text as one message, a message as a list, and messages as they are."""
    if isinstance(value, Mapping):
        return _messages([value])
    return _messages(value) if isinstance(value, list) else [{"role": role, "content": value}]


def _parsed(value: Any) -> Any:
    """Return a text that is a JSON list or object as that; all else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _conversation(value: Any) -> Any:
    """Return a text that is JSON of one message or of messages as that; another text, also one of JSON, unchanged."""
    found = _parsed(value)
    messages = found if isinstance(found, list) else [found]
    known = all(isinstance(message, Mapping) and ("role" in message or "from" in message) for message in messages)
    return found if messages and known else value


def _messages(value: Any) -> list[dict[str, Any]]:
    """Return messages with the keys `role` and `content`, whatever the file names them, and the roles of templates."""
    value = _parsed(value)
    if not isinstance(value, list):
        raise ValueError(f"messages={value!r}"[:200] + ", which is no list")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message {message!r}"[:200] + ", which is no mapping")
    theirs = _one(message, "role", "from")
    role = ROLES.get(theirs, theirs)
    if role not in _KNOWN_ROLES:
        raise ValueError(f"role {theirs!r}; known are {', '.join((*_KNOWN_ROLES, *ROLES))}")
    content = _content(_one(message, "content", "value"))
    found = {"role": role, **({} if content is None else {"content": content})}
    found |= {name: message[name] for name in _KEPT if message.get(name) is not None}
    if theirs == "function_call":
        call = _parsed(content)
        if not isinstance(call, Mapping) or "name" not in call:
            raise ValueError(f"a function_call {content!r}"[:200] + ", which is no JSON object with a name")
        found |= {"content": "", "tool_calls": [{"type": "function", "function": dict(call)}]}
    if role == "assistant" and (message.get("train") is False or message.get("weight") == 0):
        found["train"] = False
    return found


def _one(message: Mapping[str, Any], *names: str) -> Any:
    found = [message[name] for name in names if message.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"a message with both {' and '.join(names)}")
    return found[0] if found else None


def _content(value: Any) -> Any:
    """Return the texts of a list of parts as one text."""
    if not isinstance(value, list):
        return value
    if others := [part for part in value if not isinstance(part, Mapping) or part.get("type", "text") != "text"]:
        raise ValueError(f"a part of a message that is no text: {others[0]!r}"[:200])
    return "".join(str(part.get("text") or "") for part in value)


_SYSTEM = {"system": ("system", "system_prompt")}
_TOOLS = {"tools": ("tools",)}


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
        _alpaca, {"input": ("input", "context"), **_SYSTEM, "history": ("history",)},
    ),
    "chat": Format("chat", ("messages",), (("messages",),), _chat, {**_SYSTEM, **_TOOLS}),
    "sharegpt": Format("chat", ("messages",), (("conversations",), ("conversation",)), _chat, {**_SYSTEM, **_TOOLS}),
    "prompt_completion": Format(
        "chat", ("prompt", "completion"), PAIRS, _prompt_completion,
        {**_SYSTEM, "context": ("context", "article"), **_TOOLS},
    ),
    "preference": Format(
        "chat", ("chosen", "rejected"), (("chosen", "rejected"), ("chosen_response", "rejected_response")), _preference,
        {
            "prompt": ("prompt", "question", "instruction", "messages", "conversations"), "input": ("input",),
            **_SYSTEM, **_TOOLS,
        },
    ),
    "segments": Format("chat", ("segments",), (("segments",),), _segments),
    "generation": _plain("generation"),
    "choice": Format(
        "choice", ("prompt", "choices", "label"),
        (("prompt", "choices", "label"), ("question", "choices", "label"), ("question", "choices", "answer")), _choice,
    ),
    "pairs": _plain("pairs"),
    "text": _plain("text"),
    "labels": _plain("classification", ("sentence", "label"), ("sentence1", "label"), pair=("pair", "sentence2")),
}  # fmt: skip
"""Name -> format."""


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
    if len(ways) > 1:
        texts = " or ".join("{" + ", ".join(f"{f}: {c}" for f, c in way.items()) + "}" for way in ways)
        raise ValueError(texts)
    (way,) = ways
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
            way = {column: column for column in found if column in known}
        if way is not None:
            read[name] = len(way)
    best = [name for name, number in read.items() if number == max(read.values())]
    if len(best) == 1:
        return best[0]
    known = "; ".join(f"{name}: {', '.join(form.columns[0])}" for name, form in FORMATS.items())
    raise DataError(
        row.where,
        found="columns " + ", ".join(found) + (f", which are those of {' and of '.join(best)}" if best else ""),
        rule=f"the columns must be those of one format ({known})",
        fix=f"name the format: data.format: {best[0]}"
        if best
        else "map columns with data.fields, {FIELD: COLUMN}, and name the format with data.format",
    )


def read_record(name: str, row: Row, named: Mapping[str, str]) -> tuple[Record, list[str]]:
    """Return the record of a row and the columns that it does not hold. Raises DataError that names the row."""
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
        if missing := [f for f in form.fields if f not in fields]:
            raise ValueError(f"null in column {way[missing[0]]!r}")
        record = form.record(fields)
    except ValueError as error:
        raise DataError(
            row.where,
            found=str(error),
            rule=f"a row must have the values of the format {name}",
            fix="correct the record, or leave it out",
        ) from None
    unread = [column for column in found if column not in way.values()]
    for f in _CONVERSATIONS & fields.keys():
        messages = _parsed(fields[f]) if isinstance(fields[f], str) else fields[f]
        for message in messages if isinstance(messages, list) else [messages]:
            if isinstance(message, Mapping):
                unread += [f"{way[f]}.{key}" for key in message if key not in _MESSAGE]
    return record, unread


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
