"""The GGUF file of an installed package, which may hold it in parts.

Package indexes limit the size of a file, so large models come as several packages. A package NAME holds its model as

    NAME.gguf                in its folder or in its folder `data`, or
    NAME.gguf.part00, ...    there and in the packages NAME_part1, NAME_part2, ...: the same bytes, cut in order

The parts are joined once, in `$XDG_CACHE_HOME/dovetail/gguf` (`~/.cache` by default), and compared with the package's
SHA256SUMS where there is one. No code of a package is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from itertools import count
from pathlib import Path

from dovetail.errors import LoadError
from dovetail.files import atomic, read_bytes, writing

_PART = re.compile(r"(?P<file>.+\.gguf)\.part(?P<number>\d+)")


def gguf_of_package(where: str, name: str, root: Path) -> Path:
    """Return the GGUF file of the package `name` in the folder `root`; LoadError where it has none or several.

    where   what the package is called in the message
    """
    folders = [folder for place in [root, *_part_packages(name)] for folder in (place, place / "data")]
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    whole = [path for path in files if path.suffix == ".gguf" and path.is_relative_to(root)]
    parts: dict[str, list[tuple[int, Path]]] = {}
    for path in files:
        if match := _PART.fullmatch(path.name):
            parts.setdefault(match["file"], []).append((int(match["number"]), path))
    names = [*(str(path.relative_to(root)) for path in whole), *parts]
    if len(names) != 1:
        rule = "the package must hold one model: a config.json, or one GGUF file, whole or in parts"
        found = ", ".join(names) or "no config.json and no GGUF file"
        fix = f"name the file, as in {where}/{names[0]}" if names else f"name the folder, as in {where}/model"
        raise LoadError(f"model {where}", found=found[:300], rule=rule, fix=fix)
    if whole:
        return whole[0]
    (file, numbered), sums = next(iter(parts.items())), next((p for p in files if p.name == "SHA256SUMS"), None)
    numbered.sort()
    if [number for number, _ in numbered] != list(range(numbered[0][0], numbered[0][0] + len(numbered))):
        found = "parts " + ", ".join(str(number) for number, _ in numbered)
        raise LoadError(f"model {where}", found=found, rule="no part may be missing", fix="install the package again")
    return _joined(where, file, [path for _, path in numbered], _digest(sums, file))


def _part_packages(name: str) -> list[Path]:
    """Return the folders of the packages NAME_part1, NAME_part2, ..., as far as they are installed."""
    found: list[Path] = []
    for number in count(1):
        spec = importlib.util.find_spec(f"{name}_part{number}")
        if spec is None or not spec.submodule_search_locations:
            return found
        found += map(Path, spec.submodule_search_locations)
    return found


def _digest(sums: Path | None, file: str) -> str | None:
    """Return what a SHA256SUMS file says of a file."""
    if sums is None:
        return None
    lines = read_bytes(sums, rule="SHA256SUMS must be a text").decode(errors="replace").splitlines()
    said = (line.split() for line in lines)
    return next(
        (words[0].lower() for words in said if len(words) == 2 and Path(words[1].lstrip("*")).name == file), None
    )


def _joined(where: str, file: str, parts: list[Path], digest: str | None) -> Path:
    """Return the joined file, which an earlier call may have written."""
    sizes = [part.stat().st_size for part in parts]
    said = repr([digest, file, sizes, [part.stat().st_mtime_ns for part in parts]])
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dovetail" / "gguf"
    path = cache / hashlib.sha256(said.encode()).hexdigest()[:16] / file
    if path.is_file() and path.stat().st_size == sum(sizes):
        return path
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, shared=True) as partial:
            found = hashlib.sha256()
            with partial.open("wb") as output:
                for part in parts:
                    with part.open("rb") as source:
                        while block := source.read(1 << 20):
                            output.write(block)
                            found.update(block)
            if digest is not None and found.hexdigest() != digest:
                rule = "the joined parts must have the digest in the package's SHA256SUMS"
                found_text = f"sha256 {found.hexdigest()}"
                raise LoadError(f"model {where}", found=found_text, rule=rule, fix="install the package again")
    return path
