"""Files that Dovetail reads and writes: paths are checked early, reads are bounded, writes are atomic."""

from __future__ import annotations

import difflib
import errno
import os
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.errors import DovetailError, InUse, LoadError, OutputError

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")

JSON_NBYTES = 1 << 20
"""The limit of `read_bytes` and `read_json` unless the caller names another one."""


# Writing.


def check_file(path: Path) -> None:
    """Raise DovetailError if no file can be written at this path. Its folder is created when the file is written."""
    if path.is_dir():
        raise DovetailError(
            f"output {path}", found="a folder", rule="the output must be a file", fix=f"pass {path / 'NAME'}"
        )
    _check_parent(path)


def check_folder(path: Path) -> None:
    """Raise DovetailError if no folder can be created at this path, or if a folder there is not empty."""
    rule, fix = "the output must be a new or empty folder", "choose another --output, or remove this one first"
    if path.is_dir() and (names := sorted(each.name for each in path.iterdir())):
        found = f"{len(names)} files or folders, including {names[0]}"
        raise DovetailError(f"output {path}", found=found, rule=rule, fix=fix)
    if path.exists() and not path.is_dir():
        raise DovetailError(f"output {path}", found="a file", rule=rule, fix=fix)
    _check_parent(path)


def _check_parent(path: Path) -> None:
    parent = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    fix = "choose another --output"
    if not parent.is_dir():
        rule = "the output must be inside a folder"
        raise DovetailError(f"output {path}", found=f"{parent} is a file", rule=rule, fix=fix)
    if not os.access(parent, os.W_OK | os.X_OK):
        rule = "the output must be writable"
        raise DovetailError(f"output {path}", found=f"no permission to write to {parent}", rule=rule, fix=fix)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError about writing `path`."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None


@contextmanager
def on_full_disk(path: Path) -> Iterator[None]:
    """Turn an error of the block that comes from a full disk into an OutputError about `path`; others pass."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not _is_full(cause):
            cause = cause.__context__
        if cause is None or isinstance(error, DovetailError):
            raise
        raise _unwritable(path, getattr(cause, "strerror", None) or "the disk did not take a file") from None


def _is_full(error: BaseException) -> bool:
    # safetensors and torch give the reason in the text alone, and torch's writer gives none.
    said = ("No space left", "File too large", "quota exceeded", "inline_container.cc", "iostream error")
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in said)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _unwritable(path: Path, found: str) -> OutputError:
    place = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    free = shutil.disk_usage(place).free / 1e6
    return OutputError(
        f"output {path}",
        found=f"{found[:300]}; {free:,.1f} MB are free there",
        rule="the output must be writable",
        fix="make room or allow writing there, and start the same command again",
    )


@contextmanager
def atomic(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder to, and rename it to `path` when the block succeeds.

    If the block raises, what it wrote is removed and `path` is unchanged.

    shared   several threads or processes may write the same path at the same time
    """
    own = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
    part = path.with_name(f".{path.name}{own}.part")
    _remove(part)  # left behind by a killed process
    try:
        yield part
        part.replace(path)
    finally:
        _remove(part)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock of an output while the block runs; raise InUse where another process holds it.

    The lock is the file `.NAME.lock` beside the output, which says whose it is. It ends with the process.
    """
    import fcntl

    lock = path.with_name(f".{path.name}.lock")
    with writing(path):
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = lock.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    holder = file.read(200) or "another process"
                rule, fix = "an output must have one writer at a time", "wait for it to end, or choose another --output"
                found = f"{holder}, which is writing to it"
                raise InUse(f"output {path}", found=found, rule=rule, fix=fix) from None
            with suppress(FileNotFoundError):  # the holder before has just removed it
                if lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    break
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically; text is encoded as UTF-8."""
    with atomic(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_bytes(path: Path, content: str | bytes) -> None:
    """Write a file atomically, and create its folder; DovetailError if that is not possible."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


# Reading.


def read_bytes(
    path: Path, *, rule: str, fix: str = "", limit: int = JSON_NBYTES, error: type[DovetailError] = LoadError
) -> bytes:
    """Return the content of a file of at most `limit` bytes; raise `error` if the file is missing or too large."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as problem:
        raise error(str(path), found=problem.strerror or str(problem), rule=rule, fix=fix) from None
    if len(content) > limit:
        found = f"more than {limit} bytes"
        raise error(str(path), found=found, rule=f"the file must have at most {limit} bytes", fix=fix)
    return content


def read_json(path: Path, kind: type[T], *, rule: str, fix: str = "", limit: int = JSON_NBYTES) -> T:
    """Return a JSON file as an object of type `kind`; raise LoadError if the file does not hold one."""
    return parse_json(str(path), read_bytes(path, rule=rule, fix=fix, limit=limit), kind, rule=rule, fix=fix)


def parse_json(where: str, text: bytes | str, kind: type[T], *, rule: str, fix: str = "") -> T:
    """Return JSON text as an object of type `kind`: a pydantic model, a dataclass, or dict[str, Any]; else LoadError.

    where   what the text is called in the message
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        raise LoadError(where, found=first_problem(error), rule=rule, fix=fix) from None


@contextmanager
def open_tensors(path: Path, *, owner: str) -> Iterator[Any]:
    """Open a safetensors file, whose tensors are read on demand; raise LoadError if it cannot be read.

    owner   what must contain the file, in the message: "an adapter directory"
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        rule = f"{owner} must contain a whole {path.name}"
        raise LoadError(str(path), found=str(error)[:300], rule=rule, fix="copy the folder again") from None


def first_problem(error: pydantic.ValidationError) -> str:
    """Return the first problem that pydantic found, as "place: message"."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:200] or "the file"
    return f"{place}: {first['msg']}"[:300]


def refusal(
    where: str,
    error: pydantic.ValidationError,
    *,
    kind: type[DovetailError],
    keys: Callable[[Sequence[int | str]], tuple[str, Sequence[str]]],
    hints: Mapping[str, str] | None = None,
) -> DovetailError:
    """Return the first problem that pydantic found in a mapping that a person wrote, as an error of type `kind`.

    keys    place of a part -> what the part is called in the message, and the keys that it knows
    hints   required key -> an example
    """
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")  # often the reason why another key is missing
    place = [str(part) for part in first["loc"]]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        part, known = keys(first["loc"][:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        return kind(
            where,
            found=f"key {'.'.join(place)!r}{more}",
            rule=f"keys of {part}: " + ", ".join(known),
            fix=f"did you mean {near[0]}?" if near else f"remove {place[-1]}",
        )
    at = f"{where}, {'.'.join(place)}" if place else where
    if first["type"] == "missing":
        fix = (hints or {}).get(place[-1], "")
        return kind(at, found=f"nothing{more}", rule=f"the key {place[-1]} is required", fix=fix and f"add {fix}")
    message = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
    found = "" if isinstance(first["input"], Mapping) else f"{first['input']!r}{more}"
    return kind(at, found=found[:300], rule=message[0].lower() + message[1:])


_WORDS = {
    "model_type": "the value must be a mapping of keys to values",
    "model_attributes_type": "the value must be a mapping of keys to values",
    "dict_type": "the value must be a mapping of keys to values",
    "tuple_type": "the value must be a list: [one, another]",
    "string_type": "the value must be a text",
}
"""Messages in place of pydantic's, which name Python types."""
