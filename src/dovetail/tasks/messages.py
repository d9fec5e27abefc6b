"""Messages of conversations: from the shapes that files have to what chat templates take.

A message becomes a mapping with `role`, `content` and what else templates read. The shapes are those that OpenAI,
ShareGPT, LLaMA-Factory, axolotl and ms-swift document.

Each of these tools has its own way to say that a turn, or a part of it, is not trained:

| tool | of a turn | of a part |
|---|---|---|
| OpenAI, Mistral | weight: 0 | |
| axolotl | train or training: false | train_detail; a list of parts, each with train or weight |
| ms-swift | loss: false | |
| LLaMA-Factory | loss_weight: 0 | |

All become `train` of the message: false, or the characters of `content` that are trained, as pairs [begin, end).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
"""Other names of roles. `function_call` is a turn of the assistant that calls a tool."""
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Keys of a message that chat templates read."""
_TRAINED = ("train", "training", "weight", "loss", "loss_weight")
"""Keys of a message that say whether it is trained; false or 0 says no."""
_NOT_TRAINED = ("masked",)
_DETAILS = ("train_detail", "training_detail")
_READ = {"role", "from", "content", "value", "function_call", *_KEPT, *_TRAINED, *_NOT_TRAINED, *_DETAILS}
_TEXTS = ("text", "content", "value")
"""Keys of a part that may hold its text."""

Message = dict[str, Any]


def parsed(value: Any) -> Any:
    """Return a text that is a JSON list or object as that; all else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def conversation(value: Any) -> Any:
    """Return a text that is JSON of one message or of messages as that; another text, also one of JSON, unchanged."""
    found = parsed(value)
    messages = found if isinstance(found, list) else [found]
    known = all(isinstance(message, Mapping) and ("role" in message or "from" in message) for message in messages)
    return found if messages and known else value


def turns(role: str, value: Any) -> list[Message]:
    """Return a text as one message of the role, a message as a list, and messages as they are."""
    if isinstance(value, Mapping):
        return read_messages([value])
    return read_messages(value) if isinstance(value, list) else [{"role": role, "content": value}]


def read_messages(value: Any) -> list[Message]:
    """Return messages with the keys `role` and `content`, whatever the file names them, and the roles of templates.

    value    a list, or JSON of one
    Raises ValueError with what was found, for a value that makes no messages.
    """
    value = parsed(value)
    if not isinstance(value, list):
        raise ValueError(f"messages={value!r}"[:200] + ", which is no list")
    return [_message(message) for message in value]


def read_tools(value: Any) -> list[Mapping[str, Any]]:
    """Return the tools of a conversation, each as a function; [] for none. Raises ValueError for what is no list."""
    tools = parsed(value)
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools={tools!r}"[:200] + ", which is no list of mappings")
    whole = [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]
    return [_with_parsed(tool, "parameters") for tool in whole]


def unread_keys(value: Any) -> Iterator[str]:
    """Yield the keys of messages that nothing reads, in words."""
    messages = parsed(value)
    for message in messages if isinstance(messages, list) else [messages]:
        if isinstance(message, Mapping):
            yield from (str(key) for key in message if key not in _READ)
            role = message.get("role", message.get("from"))
            if ROLES.get(str(role), role) != "assistant":
                asked = [key for key in _TRAINED if message.get(key) not in (None, 0)]
                yield from (f"{key} of the role {role} (only turns of the assistant are trained)" for key in asked)


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message {message!r}"[:200] + ", which is no mapping")
    theirs = _one(message, "role", "from")
    role = ROLES.get(theirs, theirs)
    if role not in KNOWN_ROLES:
        raise ValueError(f"role {theirs!r}; known are {', '.join((*KNOWN_ROLES, *ROLES))}")
    trained = _flag(message, "a turn")
    content, details = _one(message, "content", "value"), _one(message, *_DETAILS)
    found: Message = {"role": role}
    marks: list[bool] = []
    if isinstance(content, list):
        content, marks, more = _joined(content)
        found |= more
    if details is not None:
        marks = _marked(content, details)
    found |= {} if content is None else {"content": content}
    found |= {name: message[name] for name in _KEPT if message.get(name) is not None}
    for name in ("reasoning_content", "thinking"):
        if isinstance(found.get(name), list):
            found[name], reasoned, _ = _joined(found[name])
            if not all(reasoned) and trained is not False:
                raise ValueError(f"{name} with a part that is not trained, which is not supported")
    if calls := _calls(theirs, content, message):
        found |= {"tool_calls": calls} | ({"content": ""} if theirs == "function_call" else {})
    if role == "assistant" and (trained is False or not all(marks)):
        found["train"] = (trained is not False and _spans(marks)) or False
    return found


def _flag(values: Mapping[str, Any], what: str) -> bool | None:
    """Return whether a turn or a part of one is trained, as its flags say; None where none says."""
    flags: dict[str, bool] = {}
    for name in (*_TRAINED, *_NOT_TRAINED):
        value = values.get(name)
        if value is not None and (not isinstance(value, int | float) or value not in (0, 1)):
            raise ValueError(f"{name}={value!r}"[:100] + f"; {what} is trained (true or 1) or not (false or 0)")
        if value is not None:
            flags[name] = bool(value) != (name in _NOT_TRAINED)
    if len(set(flags.values())) > 1:
        raise ValueError(f"{what} with " + " and ".join(f"{name}: {values[name]}" for name in flags))
    return next(iter(flags.values()), None)


def _joined(parts: Sequence[Any]) -> tuple[str, list[bool], Message]:
    """Return the texts of parts as one text, whether each character is trained, and what parts of other types hold."""
    text, pieces, more = "", list[bool](), dict[str, Any]()
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind not in ("text", "reasoning", "tool_call"):
            raise ValueError(f"a part of a message that is no text: {part!r}"[:200])
        said = _one(part, *_TEXTS)
        if not isinstance(said, str):
            raise ValueError(f"a part without text: {part!r}"[:200])
        trained = _flag(part, "a part") is not False
        if kind == "text":
            text, pieces = text + said, pieces + [trained] * len(said)
        elif not trained:
            raise ValueError(f"a part of the type {kind} that is not trained, which is not supported")
        elif kind == "reasoning":
            more["reasoning_content"] = more.get("reasoning_content", "") + said
        else:
            more["tool_calls"] = [*more.get("tool_calls", []), {"type": "function", "function": _call(parsed(said))}]
    return text, pieces, more


def _marked(content: Any, details: Any) -> list[bool]:
    """Return whether each character is trained, of details {begin_offset, end_offset, train}; the end is included."""
    if not isinstance(content, str) or not isinstance(details, list):
        raise ValueError(f"train_detail={details!r}"[:200] + " of a message that is no text, or that is no list")
    marks = [False] * len(content)
    wanted = []
    for detail in details:
        ends = (detail.get("begin_offset"), detail.get("end_offset")) if isinstance(detail, Mapping) else (None, None)
        begin, end = (end if isinstance(end, int) and end >= 0 else -1 for end in ends)
        if not 0 <= begin <= end:
            raise ValueError(f"train_detail with {detail!r}"[:200] + ", without offsets that begin before they end")
        wanted.append((_flag(detail, "a part") is not False, begin, min(end + 1, len(content))))
    for trained, begin, end in sorted(wanted, key=lambda each: not each[0]):  # what is not trained last
        marks[begin:end] = [trained] * len(marks[begin:end])
    return marks


def _spans(pieces: Sequence[bool]) -> list[list[int]]:
    """Return the stretches of trained characters, as pairs [begin, end)."""
    at, found = 0, []
    for trained, stretch in groupby(pieces):
        number = len(list(stretch))
        if trained:
            found.append([at, at + number])
        at += number
    return found


def _calls(role: str, content: Any, message: Mapping[str, Any]) -> list[Any]:
    """Return the calls of tools of a message, their arguments as mappings, whatever the file has."""
    if role == "function_call":
        calls = parsed(content)
        return [
            {"type": "function", "function": _call(each)} for each in (calls if isinstance(calls, list) else [calls])
        ]
    if isinstance(message.get("function_call"), Mapping):  # OpenAI's before tool_calls
        return [{"type": "function", "function": _call(message["function_call"])}]
    calls = parsed(message.get("tool_calls"))
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(each, Mapping) for each in calls)):
        raise ValueError(f"tool_calls={calls!r}"[:200] + ", which is no list of mappings")
    return [_with_parsed(each, "arguments") for each in calls or ()]


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or "name" not in call:
        raise ValueError(f"a function_call {call!r}"[:200] + ", which is no JSON object with a name")
    return dict(_with_parsed(call, "arguments"))


def _with_parsed(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a tool or a call whose arguments or parameters are a mapping where the file has JSON of one.

    OpenAI writes arguments as JSON; a chat template that writes them as JSON would write it twice.
    """
    if isinstance(inner := mapping.get("function"), Mapping):
        return mapping if _with_parsed(inner, name) is inner else {**mapping, "function": _with_parsed(inner, name)}
    found = parsed(mapping[name]) if isinstance(mapping.get(name), str) else None
    return {**mapping, name: found} if isinstance(found, Mapping) else mapping


def _one(mapping: Mapping[str, Any], *names: str) -> Any:
    found = [mapping[name] for name in names if mapping.get(name) is not None]
    if len(found) > 1:
        raise ValueError(f"a message with both {' and '.join(name for name in names if mapping.get(name) is not None)}")
    return found[0] if found else None
