"""Progress of long work on standard error: a bar on a terminal, else a plain line at least every 30 s."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 25.0
"""Time between plain lines; the next one waits for the next piece of work, so it is below 30."""


class Bar:
    """Progress of one loop, as a context manager: call `advance` after each piece of work.

    It has no thread of its own and redraws when it advances. Work that ends within `delay` shows nothing. A
    KeyboardInterrupt that leaves the block carries the place as its argument: "train sums, 12 of 60".

    description   what is done; shown left of the bar
    total         pieces of work
    shown         False never shows anything
    delay         seconds before the bar appears
    """

    def __init__(self, description: str, total: int, *, shown: bool = True, delay: float = 3.0) -> None:
        self._description, self._total, self._shown = description, total, shown
        self._on_terminal = sys.stderr.isatty()
        self._done = 0
        self._began = time.monotonic()
        self._next = self._began + (delay if self._on_terminal else _LINE_SECONDS)
        self._drawn: _Drawn | None = None

    def __enter__(self) -> Bar:
        return self

    @property
    def place(self) -> str:
        """What is done, and how far: "train sums, 12 of 60"."""
        return f"{self._description}, {self._done} of {self._total}"

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more pieces of work as done; `note` is shown right of the bar."""
        self._done += steps
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        if self._on_terminal:
            self._drawn = self._drawn or _Drawn(self._description, self._total, self._began)
            self._drawn.draw(self._done, note)
            self._next = now + _REFRESH_SECONDS
        else:
            notes = [self.place, f"{now - self._began:.0f} s", *([note] if note else [])]
            print(", ".join(notes), file=sys.stderr, flush=True)
            self._next = now + _LINE_SECONDS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        error = error or sys.exc_info()[1]
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (self.place,)
        if self._drawn is not None:
            self._drawn.progress.stop()


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
        self._task = self.progress.add_task(description, total=total, note="")
        self.progress.tasks[0].start_time = began
        self.progress.start()

    def draw(self, done: int, note: str) -> None:
        self.progress.update(self._task, completed=done, note=note)
        self.progress.refresh()
