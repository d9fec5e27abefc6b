"""The registry of links: name of the notation -> class.

Dovetail's own links register when `dovetail.links` is imported, links of other packages when their entry point of the
group "dovetail.links" is loaded; both happen at the first look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TypeVar

from dovetail.chains.link import Link
from dovetail.errors import ChainError

GROUP = "dovetail.links"
"""Entry point group of packages that bring links: each entry names a module whose import registers them."""

_REGISTERED: dict[str, type[Link]] = {}

L = TypeVar("L", bound=type[Link])


def register(name: str) -> Callable[[L], L]:
    """Return a class decorator that makes a link known to the notation under `name`.

    Raises ValueError when another link has that name.
    """

    def add(cls: L) -> L:
        if name in _REGISTERED:
            raise ValueError(f"two links are called {name!r}: {_REGISTERED[name].__name__} and {cls.__name__}")
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return add


def links() -> Mapping[str, type[Link]]:
    """Return all known links by name, read-only; the first call imports Dovetail's and those of installed packages.

    Raises ChainError when the entry point of an installed package cannot be imported.
    """
    _load()
    return MappingProxyType(_REGISTERED)


@cache
def _load() -> None:
    import_module("dovetail.links")
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:
            raise ChainError(
                f"links of {entry.dist.name if entry.dist else entry.name}",
                found=f"{entry.value} cannot be imported: {type(error).__name__}: {error}"[:500],
                rule=f"an entry point of the group {GROUP!r} must name a module that registers links",
                fix=f"repair or uninstall {entry.dist.name if entry.dist else entry.name}",
            ) from error
