"""Packages whose public names are imported on first use, so that nobody waits for what he doesn't use."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Mapping
from typing import Any


class _Package(types.ModuleType):
    """`dovetail.merge` is the function, also after the module of that name has been imported."""

    _home: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self._home:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{self.__name__}.{self._home[name] or name}")
        value = getattr(module, name) if self._home[name] else module
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._home and isinstance(value, types.ModuleType):
            return  # the import system binds a submodule to its name
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._home]


def lazy(package: str, home: Mapping[str, str]) -> None:
    """Makes an imported package give its public names when they are first asked for.

    home  public name -> the module that holds it, in the package; "": the module of that name itself
    """
    module = sys.modules[package]
    vars(module)["_home"] = home
    module.__class__ = _Package
