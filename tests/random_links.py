"""Links with fields drawn at random from their annotated types."""

from __future__ import annotations

import random
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dovetail.chains.link import Link
from dovetail.chains.registry import links
from dovetail.errors import ChainError

FLOATS = [0.0, 0.5, 1e-07, 0.1 + 0.2, 16.0, 1e16, 123456.789, 5e-324]
INTEGERS = [0, 1, 2, 3, 4, 8, 16, 32, 64, 100, 4096]


def random_value(kind: Any, pick: random.Random) -> Any:
    """A value of an annotated type."""
    if get_origin(kind) is Literal:
        return pick.choice(get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return random_value(pick.choice(get_args(kind)), pick)
    if kind is type(None):
        return None
    if kind is bool:
        return pick.random() < 0.5
    if kind is int:
        return pick.choice(INTEGERS)
    if kind is float:
        return pick.choice(FLOATS)
    if get_origin(kind) is tuple:
        return tuple(random_value(get_args(kind)[0], pick) for _ in range(pick.randint(0, 2)))
    assert kind is str, f"teach this test to draw a {kind}"
    return pick.choice(["row", "tensor", "two words", "none", "x_1"])


def random_link(name: str, pick: random.Random) -> Link:
    """A link whose fields are drawn at random, some left at their defaults; those it refuses are drawn again."""
    cls = links()[name]
    hints = get_type_hints(cls)
    for _ in range(500):
        values = {f.name: random_value(hints[f.name], pick) for f in fields(cls) if pick.random() < 0.7}
        try:
            return cls(**values)
        except ChainError:
            continue
    raise AssertionError(f"{name} refuses every value that was drawn")
