"""Files and folders that a command writes: said at once where they can't be, and not after an hour of work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dovetail.errors import DovetailError


def check_file(path: Path) -> None:
    """DovetailError where no file can be written at this path; its folder is made when it is written."""
    if path.is_dir():
        raise DovetailError(f"output {path}", found="a folder", rule="a file is written", fix=f"{path / 'NAME'}")
    _check_home(path)


def check_folder(path: Path) -> None:
    """DovetailError where no folder can be made at this path, or where it holds something already."""
    fix = "another --output, or remove it first"
    if path.is_dir() and (names := sorted(each.name for each in path.iterdir())):
        found = f"{len(names)} files or folders, {names[0]} among them"
        raise DovetailError(f"output {path}", found=found, rule="a folder of its own, new or empty", fix=fix)
    if path.exists() and not path.is_dir():
        raise DovetailError(f"output {path}", found="a file", rule="a folder of its own, new or empty", fix=fix)
    _check_home(path)


def _check_home(path: Path) -> None:
    home = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if not home.is_dir():
        raise DovetailError(f"output {path}", found=f"{home} is a file", rule="it lies in a folder")
    if not os.access(home, os.W_OK | os.X_OK):
        raise DovetailError(f"output {path}", found=f"no permission to write to {home}", rule="it can be written")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing here, as a DovetailError."""
    try:
        yield
    except OSError as error:
        found = error.strerror or str(error)
        raise DovetailError(f"output {path}", found=found[:300], rule="it can be written") from None


def write_bytes(path: Path, content: bytes) -> None:
    """A file, whole or not there, in a folder made if need be; DovetailError where it can't be written."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
