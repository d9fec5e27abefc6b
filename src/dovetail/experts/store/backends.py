"""Where a store's experts lie: a folder of .dvt files, or (`http.py`) a server of one, which has an index.json:

    {"format": "dovetail-experts", "version": 1, "experts": {NAME: {"nbytes": 6012345, "sha256": "ab12…" or null}}}

A name is a file's stem, and can't lead out of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic

from dovetail.errors import LoadError
from dovetail.experts import expert as experts
from dovetail.experts.expert import Expert
from dovetail.files import writing

SUFFIX, INDEX = ".dvt", "index.json"
_NAME = re.compile(r"[^./\\:\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]{0,199}")
_CHUNK = 1 << 20
Stamp = tuple[Any, ...]


def good_name(name: str) -> str:
    """The name, if it is one: LoadError for what may lead out of a folder."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        rule = "1 to 200 characters without / \\ : and control characters, the first no dot"
        raise LoadError("expert's name", found=repr(name)[:250], rule=rule)
    return name


class Backend(Protocol):
    """Where a store gets its experts from."""

    def names(self) -> list[str]:
        """All that there are, sorted."""
        ...

    def stamp(self, name: str) -> Stamp:
        """Changes when the expert changes; LoadError where there is none of that name. Cheap."""
        ...

    def read(self, name: str) -> tuple[Expert, int]:
        """The expert, not yet verified, and the bytes of its file."""
        ...

    def refresh(self) -> None:
        """Looks again at what there is."""

    def close(self) -> None:
        """Ends what is under way, as an error there."""


class LocalFolder:
    """A folder of .dvt files; what lies deeper isn't looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise LoadError(str(path), found="no such folder", rule="a store is a folder of .dvt files, or a URL")

    def names(self) -> list[str]:
        found = (path.name.removesuffix(SUFFIX) for path in self.path.glob(f"*{SUFFIX}") if path.is_file())
        return sorted(name for name in found if _NAME.fullmatch(name))

    def stamp(self, name: str) -> Stamp:
        path = self._path(name)
        try:
            said = path.stat()
        except OSError as error:
            raise LoadError(str(path), found=error.strerror or str(error), rule="an expert is a file") from None
        return said.st_mtime_ns, said.st_size, said.st_ino

    def read(self, name: str) -> tuple[Expert, int]:
        return experts.load(self._path(name)), self.stamp(name)[1]

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _path(self, name: str) -> Path:
        return self.path / f"{good_name(name)}{SUFFIX}"


class Entry(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """What an index says of an expert: the size of its file, and its SHA-256 where that is known."""

    nbytes: Annotated[int, pydantic.Field(ge=0, lt=2**62)]
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")] | None = None


class Index(pydantic.BaseModel, extra="forbid", frozen=True, strict=True):
    """What index.json holds."""

    format: Literal["dovetail-experts"] = "dovetail-experts"
    version: Literal[1] = 1
    experts: dict[str, Entry]

    @pydantic.field_validator("experts")
    @classmethod
    def _good_names(cls, experts: dict[str, Entry]) -> dict[str, Entry]:
        if wrong := [name for name in experts if _NAME.fullmatch(name) is None]:
            raise ValueError(f"no name for an expert: {wrong[0]!r}"[:200])
        return experts


def write_index(folder: Path) -> Path:
    """Writes the folder's index.json, atomically: sizes and SHA-256 of all its experts."""
    entries = {}
    for name in LocalFolder(folder).names():
        with open(folder / f"{name}{SUFFIX}", "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            entries[name] = Entry(nbytes=file.tell(), sha256=digest.hexdigest())
    part = folder / f".{INDEX}.{os.getpid()}.{threading.get_ident()}.part"
    with writing(folder / INDEX):
        try:
            part.write_text(json.dumps(Index(experts=entries).model_dump(), indent=1) + "\n", encoding="utf-8")
            os.replace(part, folder / INDEX)
        finally:
            part.unlink(missing_ok=True)
    return folder / INDEX
