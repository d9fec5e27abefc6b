"""Operators of torch for the work that `torch.compile` cannot trace, so that it compiles a model with chains whole.

Loops over codes, buffers that layers share and decisions on values are no part of a graph. Each such piece of work is
an operator: the same function runs in eager mode and in a compiled model. An operator takes tensors and numbers only;
a base or a layer has a number, by which the operator finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

Work = TypeVar("Work", bound=Callable[..., Any])

_modules: WeakValueDictionary[int, Numbered] = WeakValueDictionary()
_numbers = itertools.count()


class Numbered(nn.Module):
    """A module that operators find by its number; a copy has another one."""

    def __init__(self) -> None:
        super().__init__()
        self._take_number()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_numbers)
        _modules[self.number] = self


def numbered(number: int) -> Any:
    """Return the module of that number."""
    return _modules[number]


def operator(schema: str, fake: Callable[..., Tensor | list[Tensor]]) -> Callable[[Work], Work]:
    """Make a function the operator torch.ops.dovetail.NAME; what it returns is no view of what it takes.

    schema  its name and types in torch's notation: NAME(Tensor x, int layer) -> Tensor
    fake    takes the same arguments and returns empty tensors of the same shapes and dtypes
    """
    name = "dovetail::" + schema.partition("(")[0]

    def register(work: Work) -> Work:
        torch.library.define(name, schema[schema.index("(") :])
        torch.library.impl(name, "default", work)
        torch.library.register_fake(name, fake)
        return work

    return register
