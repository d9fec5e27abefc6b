"""A progress bar for long work, on standard error; work that is soon done, or a log file, sees nothing of it."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.2


class Bar:
    """Context manager; `advance` after each piece of work. No thread of its own: it redraws when advanced.

    description   what is going on, shown left of the bar
    total         pieces of work
    shown         False never shows anything
    delay         seconds that pass before the bar appears
    """

    def __init__(self, description: str, total: int, *, shown: bool = True, delay: float = 3.0) -> None:
        console = Console(stderr=True)
        self._shown = shown and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task(description, total=total, note="")
        self._next = time.monotonic() + delay
        self._started = False

    def __enter__(self) -> Bar:
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done; `note` stands right of the bar."""
        if not self._shown:
            return
        self._progress.update(self._task, advance=steps, note=note)
        now = time.monotonic()
        if now >= self._next:
            if not self._started:
                self._progress.start()
                self._started = True
            self._progress.refresh()
            self._next = now + _REFRESH_SECONDS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            self._progress.stop()
