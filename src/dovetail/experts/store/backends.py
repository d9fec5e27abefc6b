"""Backends of a store: a folder of .dvt files, or (`http`) a server of such a folder with an index.json:

    {"format": "dovetail-experts", "version": 1, "experts": {NAME: {"nbytes": 6012345, "sha256": "ab12…" or null}}}

A name is the stem of a file, and cannot refer to another folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic

from dovetail.errors import LoadError
from dovetail.experts import expert as experts
from dovetail.experts.expert import Expert
from dovetail.files import atomic, writing

SUFFIX, INDEX = ".dvt", "index.json"
_NAME = re.compile(r"[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]{0,199}")
_CHUNK = 1 << 20
Stamp = tuple[Any, ...]


def good_name(name: str) -> str:
    """Return a valid name. LoadError for a name that may refer to another folder."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        rule = "a name must have 1 to 200 characters without / \\ : and control characters, and not start with a dot"
        raise LoadError("name of an expert", found=repr(name)[:250], rule=rule)
    return name


class Backend(Protocol):
    """The source of a store's experts."""

    def names(self) -> list[str]:
        """Return all names, sorted."""
        ...

    def stamp(self, name: str) -> Stamp:
        """Return a value that changes with the expert, at low cost. LoadError for an unknown name."""
        ...

    def read(self, name: str) -> tuple[Expert, int]:
        """Return the expert, not yet verified, and the size of its file in bytes."""
        ...

    def refresh(self) -> None:
        """Read the list of experts again."""

    def close(self) -> None:
        """End downloads in progress with an error."""


class LocalFolder(Backend):
    """A folder of .dvt files, without its subfolders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            rule = "a store must be a folder of .dvt files or a URL"
            raise LoadError(str(path), found="no such folder", rule=rule, fix="check the path")

    def names(self) -> list[str]:
        found = (path.name.removesuffix(SUFFIX) for path in self.path.glob(f"*{SUFFIX}") if path.is_file())
        return sorted(name for name in found if _NAME.fullmatch(name))

    def stamp(self, name: str) -> Stamp:
        path = self._path(name)
        try:
            said = path.stat()
        except OSError as error:
            raise LoadError(str(path), found=error.strerror or str(error), rule="an expert must be a file") from None
        return said.st_mtime_ns, said.st_size, said.st_ino

    def read(self, name: str) -> tuple[Expert, int]:
        return experts.load(self._path(name)), self.stamp(name)[1]

    def _path(self, name: str) -> Path:
        return self.path / f"{good_name(name)}{SUFFIX}"


class Entry(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """Index entry of an expert: the size of its file, and its SHA-256 or None."""

    nbytes: Annotated[int, pydantic.Field(ge=0, lt=2**62)]
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")] | None = None


class Index(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """Content of index.json."""

    format: Literal["dovetail-experts"] = "dovetail-experts"
    version: Literal[1] = 1
    experts: dict[str, Entry]

    @pydantic.field_validator("experts")
    @classmethod
    def _good_names(cls, experts: dict[str, Entry]) -> dict[str, Entry]:
        if wrong := [name for name in experts if _NAME.fullmatch(name) is None]:
            raise ValueError(f"not a valid name of an expert: {wrong[0]!r}"[:200])
        return experts


def write_index(folder: Path) -> Path:
    """Write the folder's index.json atomically, with sizes and SHA-256 of all its experts."""
    entries = {}
    for name in LocalFolder(folder).names():
        with open(folder / f"{name}{SUFFIX}", "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            entries[name] = Entry(nbytes=file.tell(), sha256=digest.hexdigest())
    with writing(folder / INDEX), atomic(folder / INDEX, shared=True) as part:
        part.write_text(json.dumps(Index(experts=entries).model_dump(), indent=1) + "\n", encoding="utf-8")
    return folder / INDEX
