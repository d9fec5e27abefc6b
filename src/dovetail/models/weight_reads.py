"""Find the layers whose weight a model reads instead of calling the layer.

`F.linear(x, self.proj.weight)`, or a fused kernel that takes `self.out_proj.weight`, goes past whatever stands in the
layer's place: an adapter there would have no effect, on that device or on another one. The source of the parent's
forward pass says so, whichever path a run takes.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType

from torch import nn

_ABOUT = frozenset({"dtype", "device", "shape", "ndim", "is_meta"})
"""Attributes that tell something of a weight without its values."""


def reads_weight(parent: nn.Module, child: str) -> bool:
    """Return whether the forward pass of `parent` reads the values of `self.<child>.weight`.

    A read in a branch whose condition is about the module's own attributes alone, and is false, does not count (BLOOM
    reads its weights where pretraining_tp > 1). A module without Python source counts as reading none.
    """
    return any(
        not any(_is_false(parent, condition) for condition in conditions)
        for name, conditions in _reads(type(parent))
        if name == child
    )


@cache
def _reads(cls: type[nn.Module]) -> list[tuple[str, tuple[ast.expr, ...]]]:
    """Return the layers whose weights are read from `forward` on, each with the conditions of its branches."""
    return [read for function in _functions(cls) for read in _reads_in(function)]


def _functions(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield `forward` and the methods of the class that it names, directly or through another one."""
    open_, seen = ["forward"], {"forward"}
    while open_:
        found = inspect.getattr_static(cls, open_.pop(), None)
        function = inspect.unwrap(found) if callable(found) else None
        if isinstance(function, FunctionType):
            yield function
            called = set(function.__code__.co_names) - seen
            open_ += called
            seen |= called


def _reads_in(function: FunctionType) -> Iterator[tuple[str, tuple[ast.expr, ...]]]:
    if "weight" not in function.__code__.co_names:
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # no source file, or one that changed
        return
    yield from _visit(tree, None, ())


def _visit(
    node: ast.AST, parent: ast.AST | None, conditions: tuple[ast.expr, ...]
) -> Iterator[tuple[str, tuple[ast.expr, ...]]]:
    match node:
        case ast.Attribute(attr="weight", value=ast.Attribute(attr=child, value=ast.Name(id="self"))):
            asks = isinstance(parent, ast.Attribute) and parent.attr in _ABOUT
            typed = (
                isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
            )
            if not asks and not typed:
                yield child, conditions
        case ast.If(test=test, body=body, orelse=orelse):
            yield from _visit(test, node, conditions)
            for part in body:
                yield from _visit(part, node, (*conditions, test))
            for part in orelse:
                yield from _visit(part, node, (*conditions, ast.UnaryOp(ast.Not(), test)))
        case _:
            for part in ast.iter_child_nodes(node):
                yield from _visit(part, node, conditions)


def _is_false(module: nn.Module, condition: ast.expr) -> bool:
    """Return whether a condition on nothing but the module's attributes is false."""
    if any(isinstance(node, ast.Call) for node in ast.walk(condition)):
        return False
    code = compile(ast.fix_missing_locations(ast.Expression(condition)), "<condition>", "eval")
    try:
        return not eval(code, {"__builtins__": {}, "self": module})
    except (NameError, AttributeError, TypeError):  # it is about the input too
        return False
