"""Loops compiled by numba: at the first call, with a cache on disk.

All loops release the interpreter lock, so threads run them in parallel.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numba
from numba.core import config

_config = cast(Any, config)


def compiled(function: Callable[..., Any], *, any_order: bool = False) -> Callable[..., Any]:
    """Return the function, compiled at the first call with arguments of new types, with its cache on disk.

    any_order  whether sums may be taken in another order, and products be rounded once with a sum, as in torch's
               matrix products: such sums run in vector instructions

    numba's cache notices a changed time or size of the function's own file only, and not a change in a file of the
    functions that it calls. The cache therefore lies in a folder named by the contents of all these files: those in
    the function's folder and below it. Division by zero is not an error, as in numpy.
    """
    fast = {"reassoc", "contract", "nsz"} if any_order else False
    folder = _cache_folder(Path(function.__code__.co_filename))
    if folder is None:
        return numba.njit(function, nogil=True, error_model="numpy", fastmath=fast)
    before, _config.CACHE_DIR = _config.CACHE_DIR, str(folder)  # numba reads it while it decorates
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy", fastmath=fast)
    finally:
        _config.CACHE_DIR = before


@lru_cache
def _cache_folder(path: Path) -> Path | None:
    """Return a writable cache folder for the loops in a file, or None.

    The folder is NUMBA_CACHE_DIR, the __pycache__ beside the file or the user's cache. Its name contains a hash of the
    files. In __pycache__, the folders of earlier contents are removed.
    """
    digest = hashlib.sha256()
    for each in sorted({*path.parent.rglob("*.py"), Path(__file__)}):
        digest.update(each.name.encode() + b"\0" + each.read_bytes())
    own = path.parent / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "dovetail"
    for home in [Path(_config.CACHE_DIR)] if _config.CACHE_DIR else [own, user]:
        folder = home / f"{path.stem}-{digest.hexdigest()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            for old in own.glob(f"{path.stem}-*") if home == own else ():
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
            return folder
    return None
