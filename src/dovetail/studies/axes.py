"""Axes of a study: names in braces in a chain, or keys of a recipe; and their values, each with a label.

    vary:
      sparsity: [0.3, 0.5]                                            # {sparsity} in a chain
      adapter: {lora: lora(r=8), rslora: "lora(r=8, scaling=rs)"}     # label: value
      train.max_steps: [100, 200]                                     # a key of a recipe
      data: {words: {task: word_problems}, digits: {task: arithmetic}}

A value of a list is its own label. Labels stand in tables and in the names of folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, StrictFloat, StrictInt, StrictStr

Value = StrictInt | StrictFloat | StrictStr
NONE = "none"
"""The value of an axis that leaves its link out of the chain."""
_BRACES = re.compile(r"\{(\w+)\}")


def _checked(values: Any) -> Any:
    if isinstance(values, Mapping):
        found: Sequence[Any] = [str(label) for label in values]
        values = dict(zip(found, values.values(), strict=True))
    elif isinstance(values, list | tuple):
        for value in values:
            if not isinstance(value, bool | int | float | str):
                raise ValueError("a value that is no number and no text must have a label: {label: value, ...}")
        found = values = tuple(values)
    else:
        raise ValueError("the values of an axis must be a list, or a mapping of labels to values")
    if not found:
        raise ValueError("an axis must have at least one value")
    twice = next((label for at, label in enumerate(found) if label in found[:at]), None)
    if twice is not None:
        raise ValueError(f"the values of an axis must be unique; {twice!r} stands there twice")
    return values


Axis = Annotated[tuple[Any, ...] | dict[str, Any], BeforeValidator(_checked)]
"""The values of an axis, or label -> value."""


def labelled(axis: tuple[Any, ...] | Mapping[str, Any]) -> dict[Value, Any]:
    """Return label -> value."""
    if isinstance(axis, Mapping):
        return {label: value for label, value in axis.items()}  # noqa: C416 the labels are texts
    return {str(value).lower() if isinstance(value, bool) else value: value for value in axis}


def braces(text: str | None) -> list[str]:
    """Return the names in braces in a chain."""
    return _BRACES.findall(text or "")


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Return a chain with values in place of the names in braces; links whose value is none are left out."""
    filled = _BRACES.sub(lambda match: str(values[match[1]]), text)
    links = [link.strip() for link in filled.split(">>")]
    return filled if NONE not in links else " >> ".join(link for link in links if link != NONE)


def has(keys: Mapping[str, Any], path: str) -> bool:
    """Return whether nested mappings have a key; `path` is dotted, as in train.max_steps."""
    first, _, rest = path.partition(".")
    if first not in keys:
        return False
    return not rest or (isinstance(keys[first], Mapping) and has(keys[first], rest))


def get(keys: Mapping[str, Any], path: str) -> Any:
    """Return the value of a key of nested mappings."""
    first, _, rest = path.partition(".")
    return get(keys[first], rest) if rest else keys[first]


def put(keys: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return nested mappings with another value of a key."""
    first, _, rest = path.partition(".")
    if not rest:
        return {**keys, first: value}
    inside = keys.get(first)
    return {**keys, first: put(inside if isinstance(inside, Mapping) else {}, rest, value)}


def without(keys: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return nested mappings without a key."""
    first, _, rest = path.partition(".")
    if not rest:
        return {key: value for key, value in keys.items() if key != first}
    inside = keys.get(first)
    return {**keys, first: without(inside, rest)} if isinstance(inside, Mapping) else dict(keys)


def fits(point: Mapping[str, Value], pattern: Mapping[str, Value | tuple[Value, ...]]) -> bool:
    """Return whether a point has the values of a pattern, axis -> value or values."""
    return all(
        axis in point and point[axis] in (values if isinstance(values, tuple) else (values,))
        for axis, values in pattern.items()
    )


def within(
    pattern: Mapping[str, Value | tuple[Value, ...]], vary: Mapping[str, tuple[Any, ...] | Mapping[str, Any]]
) -> dict[str, Value | tuple[Value, ...]] | None:
    """Return a pattern with the values that the axes have; None where no point fits it."""
    found: dict[str, Value | tuple[Value, ...]] = {}
    for axis, values in pattern.items():
        known = labelled(vary[axis])
        kept = tuple(value for value in (values if isinstance(values, tuple) else (values,)) if value in known)
        if not kept:
            return None
        found[axis] = kept
    return found
