"""Reading YAML that comes from outside: bounded in size and depth, no anchors, no tags of Python, no key twice.

And saying in the project's words what `pydantic` objects to in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from dovetail.errors import RecipeError

MAX_NBYTES = 1 << 20
"""The most that a recipe file may hold."""
MAX_DEPTH = 20
"""Levels of nesting that a recipe may have; it needs four."""


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, of plain values only; RecipeError says where it is no recipe."""
    where = f"recipe {path}"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_NBYTES + 1)
    except OSError as error:
        rule, fix = "a recipe is a YAML file", "`dovetail quickstart` needs none; examples are in examples/"
        raise RecipeError(where, found=error.strerror or str(error), rule=rule, fix=fix) from None
    if len(raw) > MAX_NBYTES:
        raise RecipeError(where, found=f"more than {MAX_NBYTES} bytes", rule="a recipe is a short YAML file")
    try:
        text = raw.decode("utf-8")
        _refuse_tricks(where, text)
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise RecipeError(where, found=f"byte {error.start} is no UTF-8", rule="a recipe is a text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(
            where + at, found=str(problem), rule="a recipe is valid YAML", fix="quote special text"
        ) from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that doesn't let a second key of the same name win in silence, and says where a value is none."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:  # a month 13, 5000 digits, a tag that doesn't fit
            text = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a list or mapping as a key", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} a second time", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse_tricks(where: str, text: str) -> None:
    """Anchors and aliases can make a small file expand without bound, and deep nesting overflows the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = f"{where}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            rule = "a recipe holds no anchors (&) and aliases (*)"
            raise RecipeError(line, found=f"{event.anchor!r}", rule=rule, fix="write it out, or quote it")
        if depth > MAX_DEPTH:
            raise RecipeError(line, found=f"{depth} levels of nesting", rule=f"at most {MAX_DEPTH}")


def refusal(
    where: str,
    error: pydantic.ValidationError,
    keys: Callable[[Sequence[int | str]], list[str]],
    hints: Mapping[str, str],
) -> RecipeError:
    """The first thing that pydantic objects to, in the project's form.

    keys   place of a part -> the keys that it knows
    hints  a key that is needed -> how it may look
    """
    errors = error.errors(include_url=False)
    # An unknown key is often the reason why another is missing.
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = keys(first["loc"][:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        inside = " of " + ".".join(place[:-1]) if place[:-1] else ""
        return RecipeError(
            where,
            found=f"key {'.'.join(place)!r}{more}",
            rule=f"keys{inside}: " + ", ".join(known),
            fix=f"did you mean {near[0]}?" if near else f"remove {place[-1]}",
        )
    at = f"{where}, {'.'.join(place)}" if place else where
    if first["type"] == "missing":
        return RecipeError(
            at, found=f"nothing{more}", rule=f"a recipe says its {place[-1]}", fix=hints.get(place[-1], "")
        )
    message = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    found = "" if isinstance(first["input"], Mapping) else f"{first['input']!r}{more}"
    return RecipeError(at, found=found[:300], rule=message[0].lower() + message[1:])


_WORDS = {
    "model_type": "keys and values belong here",
    "dict_type": "keys and values belong here",
    "tuple_type": "a list belongs here: [one, another]",
    "string_type": "a text belongs here",
}
"""What pydantic would say in the words of Python's types."""
