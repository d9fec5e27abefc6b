"""Reading of untrusted YAML: bounded in size and depth, without anchors, tags of Python and duplicate keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dovetail.errors import RecipeError
from dovetail.files import read_bytes

MAX_DEPTH = 20
"""The limit of nesting; a recipe needs four levels."""


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file; raise RecipeError at the place of a problem."""
    where = f"recipe {path}"
    rule, fix = "a recipe must be a YAML file", "see examples/, or run `dovetail quickstart`, which needs no recipe"
    raw = read_bytes(path, rule=rule, fix=fix, error=RecipeError)
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
    """A SafeLoader that refuses duplicate keys, and names the place of a value that does not fit its tag."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:  # a month 13, 5000 digits, a tag that does not fit
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
