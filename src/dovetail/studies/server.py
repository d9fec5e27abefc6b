"""The process that starts cells: it imports the libraries once, and forks a process for each cell.

    python -m dovetail.studies.server LIFELINE CELL [MODULE ...] < requests > outcomes

A request is a line of JSON (`dovetail.studies.cells.Job`), and so is an outcome. Importing torch and transformers
takes several seconds; a forked process has them at once. Nothing here runs a kernel, starts a thread or touches a GPU
before it forks, so a cell finds torch as a fresh process does. Where forking is not safe (macOS), a cell is a new
interpreter.

CELL is empty, or the one cell to do. MODULEs register links of other packages.

LIFELINE is a pipe that the study holds open at its other end. A cell ends when the study closes it or is killed, so
that no cell goes on writing into the folder of a study that was stopped.
"""

from __future__ import annotations

import gc
import os
import select
import selectors
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import torch

from dovetail.errors import DovetailError
from dovetail.studies.cells import COMMAND, Job, lost

FORKS = sys.platform == "linux"
_CHUNK = 1 << 16


def serve(lifeline: int, outcomes: int, modules: Sequence[str]) -> None:
    """Start a cell for each request on standard input, and write its outcome when it ends.

    outcomes  the file to write to
    modules   that register links
    """
    running: dict[int, tuple[str, int, bytes]] = {}  # pipe -> name and process of the cell, and what it wrote so far
    unread, ended = b"", False
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        while running or not ended:
            for key, _ in ready.select():
                data = os.read(key.fd, _CHUNK)
                if key.fd != 0:
                    slug, process, written = running[key.fd]
                    running[key.fd] = slug, process, written + data
                    if not data:
                        ready.unregister(key.fd)
                        os.close(key.fd)
                        del running[key.fd]
                        outcome = _outcome(slug, written, os.waitpid(process, 0)[1])
                        with suppress(BrokenPipeError):  # the study was killed
                            os.write(outcomes, outcome + b"\n")
                    continue
                if not data or select.select([lifeline], [], [], 0)[0]:
                    ready.unregister(0)
                    ended = True
                    continue
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    cell = Job.model_validate_json(line)
                    _preload(cell)
                    pipe, process = _start(cell, lifeline, modules)
                    running[pipe] = cell.slug, process, b""
                    ready.register(pipe, selectors.EVENT_READ)


def _outcome(slug: str, written: bytes, status: int) -> bytes:
    """Return what a cell wrote before it ended, or how it ended without."""
    code = os.waitstatus_to_exitcode(status)
    return written if code == 0 and written else lost(slug, code).model_dump_json().encode()


def _start(cell: Job, lifeline: int, modules: Sequence[str]) -> tuple[int, int]:
    """Start the process of a cell; return the pipe that its outcome comes from, and its id."""
    read, write = os.pipe()
    if not FORKS:
        command = [*COMMAND, str(lifeline), cell.model_dump_json(), *modules]
        process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])
        os.close(write)
        return read, process
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # else the collection before each training visits, and copies, the libraries' pages in every cell
    process = os.fork()
    if process:
        os.close(write)
        return read, process
    code = 1
    try:  # whatever happens, the fork must not return into the loop
        os.close(read)
        os.write(write, _done(cell, lifeline))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _done(cell: Job, lifeline: int) -> bytes:
    """Do a cell in this process."""
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where the machine runs out of memory, a cell is to be killed and not the study
    torch.set_num_threads(cell.threads)
    return cell.done().model_dump_json().encode()


def _end_with(lifeline: int) -> None:
    """End this process when the other end of the pipe is closed."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _preload(cell: Job) -> None:
    """Import what a cell needs, and make the records of a task of the playground, which stay for the next cells."""
    from dovetail.checkpoint.config import empty_model, load_config
    from dovetail.tasks.find import load_task

    if not FORKS:
        return
    with suppress(DovetailError):  # the cell tells
        recipe = cell.recipe
        if recipe.data.task is not None:
            load_task(recipe.data)
        empty_model(load_config(recipe.model, trust_remote_code=recipe.trust_remote_code))


def _prepare(modules: Sequence[str]) -> None:
    """Import what cells need, and silence other libraries: several processes share the terminal."""
    import transformers.trainer  # noqa: F401
    from transformers.utils import logging as transformers_logging

    for name in modules:
        import_module(name)
    torch.set_num_threads(1)  # an OpenMP thread pool would not survive the fork
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def main() -> None:
    """Serve requests, or do the one cell that is given as an argument."""
    lifeline, cell, *modules = sys.argv[1:]
    outcomes = os.dup(1)
    os.dup2(2, 1)  # what a cell prints is no outcome
    _prepare(modules)
    if cell:
        os.write(outcomes, _done(Job.model_validate_json(cell), int(lifeline)))
    else:
        serve(int(lifeline), outcomes, modules)


if __name__ == "__main__":
    main()
