"""Find the layers whose weight a model reads or changes in its forward pass, instead of calling the layer.

`F.linear(x, self.proj.weight)`, or a fused kernel that takes `self.out_proj.weight`, goes past whatever stands in the
layer's place: an adapter there would have no effect, on that device or on another one. The source of the parent's
forward pass says so, whichever path a run takes.

RWKV divides weights in place in its first forward pass for inference, and multiplies them in the next one for training.
What is saved in between is not what was loaded, and an adapter beside such a weight is not scaled with it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType

from torch import nn

_Found = tuple[str, tuple[ast.expr, ...]]
"""The name of a layer, or what is called, with the conditions of its branches."""
_Use = tuple[ast.Attribute, ast.AST | None, tuple[ast.expr, ...]]
"""`….weight` in a source, what it is in, and the conditions of its branches."""
_ABOUT = frozenset({"dtype", "device", "shape", "ndim", "is_meta"})
"""Attributes that tell something of a weight without its values."""
_HARMLESS = frozenset({"requires_grad_", "detach_"})
"""Methods in place that leave the values as they are."""


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


def changes_weights(model: nn.Module) -> str:
    """Return where the forward pass of a module changes weights in place, and on what condition; "" if none does."""
    for module in model.modules():
        for call, conditions in _changes(type(module)):
            if not any(_is_false(module, condition) for condition in conditions):
                where = f"{type(module).__name__} calls {call} in its forward pass"
                return where + (f", if {ast.unparse(conditions[0])}" if conditions else "")
    return ""


@cache
def _reads(cls: type[nn.Module]) -> list[_Found]:
    """Return the layers whose weights are read from `forward` on, each with the conditions of its branches."""
    found = []
    for weight, parent, conditions in _weights(cls):
        match weight.value:
            case ast.Attribute(attr=child, value=ast.Name(id="self")):
                asks = isinstance(parent, ast.Attribute) and parent.attr in _ABOUT
                typed = isinstance(parent, ast.Call) and ast.unparse(parent.func) == "isinstance"
                if not asks and not typed:
                    found.append((child, conditions))
    return found


@cache
def _changes(cls: type[nn.Module]) -> list[_Found]:
    """Return the methods of weights that change them in place, each with the conditions of its branches."""
    return [
        (f"{ast.unparse(weight)}.{parent.attr}", conditions)
        for weight, parent, conditions in _weights(cls)
        if isinstance(parent, ast.Attribute) and parent.attr.endswith("_") and parent.attr not in _HARMLESS
    ]


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


def _weights(cls: type[nn.Module]) -> Iterator[_Use]:
    for function in _functions(cls):
        if "weight" not in function.__code__.co_names:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # no source file, or one that changed
            continue
        yield from _visit(tree, None, ())


def _visit(node: ast.AST, parent: ast.AST | None, conditions: tuple[ast.expr, ...]) -> Iterator[_Use]:
    match node:
        case ast.Attribute(attr="weight"):
            yield node, parent, conditions
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
