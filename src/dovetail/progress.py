"""Progress of long work on standard error: a bar on a terminal, else a plain line at least every 30 s."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from functools import cache
from types import TracebackType

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 25.0
"""Time between plain lines: below 30, whatever delays a thread."""


def note(text: str, *, shown: bool = True) -> None:
    """Print one line "note: ..." on standard error: what a user must know about a result that is not an error."""
    if shown:
        print(f"note: {text}", file=sys.stderr, flush=True)


@cache
def note_once(text: str) -> None:
    """Print a note, once in a process however often it is called for (a study reads its data for each run)."""
    note(text)


class Bar:
    """Progress of one piece of work, as a context manager: a loop calls `advance` after each round.

    On a terminal, the bar is drawn when it advances. Elsewhere a thread prints the place of the innermost bar at
    intervals, so that a long step without rounds, such as loading a model, prints lines too. Work that ends within
    `delay` shows nothing. A KeyboardInterrupt that leaves the block carries the place as its argument:
    "train sums, 12 of 60".

    description   what is done; shown left of the bar
    total         number of rounds; 0 for work without rounds
    shown         False never shows anything
    delay         seconds before the bar appears
    """

    def __init__(self, description: str, total: int = 0, *, shown: bool = True, delay: float = 3.0) -> None:
        self._description, self._total, self._shown = description, total, shown
        self._done, self._note = 0, ""
        self._began = time.monotonic()
        self._next = self._began + delay
        self._drawn: _Drawn | None = None
        self._lined = shown and not sys.stderr.isatty()

    def __enter__(self) -> Bar:
        if self._lined:
            _lines.open(self)
        return self

    @property
    def place(self) -> str:
        """What is done, and how far: "train sums, 12 of 60"."""
        return f"{self._description}, {self._done} of {self._total}" if self._total else self._description

    @property
    def line(self) -> str:
        """The place, the seconds since the start, and the note."""
        return ", ".join(filter(None, [self.place, f"{time.monotonic() - self._began:.0f} s", self._note]))

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more rounds as done; `note` is shown right of the bar."""
        self._done += steps
        self._note = note
        now = time.monotonic()
        if self._shown and not self._lined and now >= self._next:
            self._drawn = self._drawn or _Drawn(self._description, self._total, self._began)
            self._drawn.draw(self._done, note)
            self._next = now + _REFRESH_SECONDS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lined:
            _lines.close(self)
        error = error or sys.exc_info()[1]
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (self.place,)
        if self._drawn is not None:
            self._drawn.progress.stop()


class _Lines:
    """The bars that are open where standard error is not a terminal, and the thread that prints their lines."""

    def __init__(self) -> None:
        self._bars: list[Bar] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def open(self, bar: Bar) -> None:
        with self._lock:
            self._bars.append(bar)
            if len(self._bars) == 1:
                self._ended = threading.Event()
                threading.Thread(target=self._print, args=(self._ended,), daemon=True).start()

    def close(self, bar: Bar) -> None:
        with self._lock:
            self._bars.remove(bar)
            if not self._bars:
                self._ended.set()

    def _print(self, ended: threading.Event) -> None:
        while not ended.wait(_LINE_SECONDS):
            with self._lock:
                if not self._bars:
                    return
                line = self._bars[-1].line
            with suppress(OSError):  # the reader of a pipe has gone
                print(line, file=sys.stderr, flush=True)


_lines = _Lines()


class _Drawn:
    """The bar on a terminal. Rich is imported here: most bars never appear."""

    def __init__(self, description: str, total: int, began: float) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._task = self.progress.add_task(description, total=total or None, note="")
        self.progress.tasks[0].start_time = began
        self.progress.start()

    def draw(self, done: int, note: str) -> None:
        self.progress.update(self._task, completed=done, note=note)
        self.progress.refresh()
