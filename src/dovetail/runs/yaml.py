"""YAML files, untrusted: bounded in size and depth, without anchors, tags of Python and duplicate keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import yaml

from dovetail.errors import RecipeError
from dovetail.files import read_bytes, refusal, write_whole
from dovetail.tasks.spec import Part

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_DEPTH = 20
"""The limit of nesting; a recipe needs four levels."""


class YamlFile(Part):
    """A mapping that a person writes as a YAML file: a recipe or a study."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file; relative paths in it start from its folder. Raises RecipeError or ChainError."""
        path = Path(path)
        return cls.parse(read_yaml(path), where=str(path), folder=path.parent)

    @classmethod
    def parse(cls, value: Mapping[str, Any], *, where: str = "", folder: str | Path = ".") -> Self:
        """Check a mapping, in the form that YAML gives. Raises RecipeError or ChainError.

        where   the name of the file in messages
        folder  the start of relative paths
        """
        kind = cls.__name__.lower()
        where, holds = where or kind, f"a {kind} must be a mapping of {_KINDS[kind][1]}"
        if not isinstance(value, Mapping):
            raise RecipeError(where, found=f"a {type(value).__name__}", rule=holds, fix="write one key in a line")
        for other, (key, _, command) in _KINDS.items():
            if key in value and _KINDS[kind][0] not in value:
                fix = f"run the {other}: {command.format(where)}"
                raise RecipeError(where, found=f"a {other}: the key {key}", rule=holds, fix=fix)
        try:
            return cls.model_validate(dict(value))._resolved(where, Path(folder))
        except pydantic.ValidationError as error:
            raise refusal(where, error, kind=RecipeError, keys=cls._keys, hints=_HINTS) from None

    @classmethod
    def read(cls, given: Self | str | Path | Mapping[str, Any]) -> Self:
        """Return what is given: the object itself, or that of a file or of a mapping."""
        if isinstance(given, str | Path):
            return cls.load(given)
        return cls.parse(given) if isinstance(given, Mapping) else given

    def _resolved(self, where: str, folder: Path) -> Self:
        """Return a copy with absolute paths, and with the defaults that depend on other keys."""
        raise NotImplementedError

    @classmethod
    def _keys(cls, place: Sequence[int | str]) -> tuple[str, list[str]]:
        """Return the name of the part at this place, and the keys that it knows."""
        raise NotImplementedError


_KINDS = {
    "recipe": ("chain", "one run: model, chain, data", "dovetail run {}"),
    "study": ("rows", "many runs: title, rows", "dovetail study {} --output DIR"),
}
"""The kind of a file -> its distinctive key, the other keys that it needs, and the command that runs it."""
_HINTS = {"model": "model: playground", "chain": "chain: lora(r=16)", "data": "data: {task: word_problems}"}


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write a YAML file atomically."""
    write_whole(path, yaml_text(values))


def yaml_text(values: Mapping[str, Any]) -> str:
    """Return values as YAML, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


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
        found, fix = f"byte {error.start} is no UTF-8", "save the file as UTF-8"
        raise RecipeError(where, found=found, rule="a recipe must be text in UTF-8", fix=fix) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        fix = "quote special text"
        raise RecipeError(where + at, found=str(problem), rule="a recipe must be valid YAML", fix=fix) from None


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
            rule = "a recipe must hold no anchors (&) and aliases (*)"
            raise RecipeError(line, found=f"{event.anchor!r}", rule=rule, fix="write it out, or quote it")
        if depth > MAX_DEPTH:
            rule = f"a recipe must have at most {MAX_DEPTH} levels"
            raise RecipeError(line, found=f"{depth} levels of nesting", rule=rule, fix="remove brackets")
