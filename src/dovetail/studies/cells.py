"""Cells: the runs of a study, each in a process of its own, so that its peak of memory is its own.

A cell that runs out of memory or is killed is a row of the table; the other cells go on. The processes come from
`dovetail.studies.server`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import pydantic
import torch

from dovetail import errors
from dovetail.chains.link import Link
from dovetail.chains.notation import chain
from dovetail.errors import DovetailError, OutputError, RecipeError
from dovetail.runs.flow import run
from dovetail.runs.recipe import Recipe
from dovetail.studies.measures import planned
from dovetail.studies.verify import check_mergeable

RUNS, MERGING, SHARED, PLANNED = "runs", "merging", "shared", "planned"
"""Folders of a study: run directories, whether each run is mergeable, the scores that runs share, and counts."""
COMMAND = [sys.executable, "-m", "dovetail.studies.server"]
_END_SECONDS = 20
_WAIT_SECONDS = 1.0
"""Time between two looks at the cells while other processes run all that are left."""
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")


class Outcome(pydantic.BaseModel, extra="forbid"):
    """How a cell ended.

    problem  the error as text; "" for a finished run
    kind     whether it had an error, no memory left, or was killed
    ends     class and parts of an error that ends the study: the folder holds something else, or the disk is full
    """

    slug: str
    problem: str = ""
    kind: Literal["error", "memory", "killed"] = "error"
    ends: dict[str, str] = {}

    def check(self) -> None:
        """Raise the error that ends the study."""
        if self.ends:
            parts = dict(self.ends)
            raise getattr(errors, parts.pop("type"))(parts.pop("where"), **parts)


class Job(pydantic.BaseModel, extra="forbid"):
    """A run of a study, as it is told to another process.

    study     folder of the study
    verify    verify by merging whether the run merges without loss
    count     count what the configuration determines, which holds for all seeds
    threads   that torch may use
    progress  show bars
    """

    slug: str
    recipe: Recipe
    study: Path
    verify: bool
    count: bool = False
    threads: int = 1
    progress: bool = False

    @property
    def links(self) -> set[type[Link]]:
        """The links of its chain."""
        return {type(link) for link in chain(self.recipe.chain)}

    def done(self) -> Outcome:
        """Do the run in this process. It continues where an earlier start of it stopped."""
        place, verdict = self.study / RUNS / self.slug, self.study / MERGING / f"{self.slug}.json"
        verdict.unlink(missing_ok=True)  # of an earlier run of that name
        try:
            run(self.recipe, output=place, progress=self.progress, shared=self.study / SHARED)
            if self.count:
                planned(self.recipe, self.study / PLANNED)
            if self.verify:
                check_mergeable(place, verdict)
        except (RecipeError, OutputError) as error:
            said = {"where": error.where, "found": error.found, "rule": error.rule, "fix": error.fix}
            return Outcome(slug=self.slug, ends={"type": type(error).__name__, **said})
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
                return Outcome(slug=self.slug, problem=problem, kind="memory")
            if not isinstance(error, DovetailError | RuntimeError):
                traceback.print_exc()  # an error of Dovetail's own
            return Outcome(slug=self.slug, problem=problem)
        return Outcome(slug=self.slug)


def lost(slug: str, code: int) -> Outcome:
    """Return the outcome of a cell whose process ended by itself.

    code  its exit code, or minus the number of a signal
    """
    again = "start the study again to repeat it"
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        problem = f"its process was killed ({name}), perhaps for lack of memory; {again}"
        return Outcome(slug=slug, problem=problem, kind="killed")
    return Outcome(slug=slug, problem=f"its process ended with code {code}; {again}")


class Turns(Protocol):
    """Which of the cells that are left this process runs next."""

    def take(self, left: list[Job]) -> Job | Outcome | None:
        """Remove a cell from the list, which is not empty, and return it to be run, or how another process ended it.

        None: other processes run all that are left.
        """
        ...

    def end(self, outcome: Outcome) -> None:
        """Take the outcome of a cell that this process ran."""
        ...


class InOrder(Turns):
    """One process runs all cells in order."""

    def take(self, left: list[Job]) -> Job | Outcome | None:
        return left.pop(0)

    def end(self, outcome: Outcome) -> None:
        pass


def run_cells(cells: Sequence[Job], jobs: int, turns: Turns) -> Generator[Outcome | str, None, None]:
    """Do cells, `jobs` at a time; yield the name of each that begins, and the outcome of each that ends.

    turns   tells which cell is next; those that other processes run are waited for

    Ending the iteration early ends the cells that run; a later start continues them. A cell with a link that the main
    program defines runs in this process, because no other one can import it.
    """
    here = [cell for cell in cells if any(link.__module__ == "__main__" for link in cell.links)]
    left = [cell for cell in cells if cell not in here]
    while here:
        match turns.take(here):
            case Job() as cell:
                yield cell.slug
                outcome = cell.done()
                turns.end(outcome)
                yield outcome
            case None:
                time.sleep(_WAIT_SECONDS)
            case outcome:
                yield outcome
    modules = {link.__module__ for cell in left for link in cell.links}
    while left:
        running: set[str] = set()
        with _Server([name for name in sorted(modules) if not name.startswith("dovetail.")]) as server:
            while left or running:
                while left and len(running) < jobs:
                    found = turns.take(left)
                    if found is None:
                        break
                    if isinstance(found, Outcome):
                        yield found
                        continue
                    running.add(found.slug)
                    yield found.slug
                    server.begin(found)
                if not running:
                    if left:
                        time.sleep(_WAIT_SECONDS)
                    continue
                outcome = server.outcome()
                if outcome is None:
                    break  # the server was killed, and its cells with it
                running.discard(outcome.slug)
                turns.end(outcome)
                yield outcome
        for slug in sorted(running):
            outcome = lost(slug, -signal.SIGKILL)
            turns.end(outcome)
            yield outcome


class _Server:
    """The process that starts cells. Ctrl-C reaches the study alone, which ends the cells by closing the lifeline."""

    def __init__(self, modules: Sequence[str]) -> None:
        lifeline, self._hold = os.pipe()
        command = [*COMMAND, str(lifeline), "", *modules]
        path = os.pathsep.join(filter(None, sys.path))
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lifeline,), start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        os.close(lifeline)

    def __enter__(self) -> _Server:
        return self

    def begin(self, cell: Job) -> None:
        """Start a cell."""
        pipe: Any = self._process.stdin
        with suppress(BrokenPipeError):  # `outcome` tells that the server has ended
            pipe.write(cell.model_dump_json().encode() + b"\n")
            pipe.flush()

    def outcome(self) -> Outcome | None:
        """Return the outcome of the next cell that ends; None where the server was killed."""
        pipe: Any = self._process.stdout
        line = pipe.readline()
        return Outcome.model_validate_json(line) if line.endswith(b"\n") else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._hold)  # ends the cells that run
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        stdout.close()


def threads_of(jobs: int) -> int:
    """Return the threads of a cell: those of this process for one at a time, else one."""
    return torch.get_num_threads() if jobs == 1 else 1
