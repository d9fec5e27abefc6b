"""Progress of a study: a line for each run that ends; on a terminal, a table of those that run stands below them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dovetail.display.format import duration
from dovetail.studies.report import Event
from dovetail.studies.tables import event_line


@contextmanager
def printed_events() -> Iterator[Callable[[Event], None]]:
    """Yield what `study` calls with each event."""
    started = perf_counter()
    if not sys.stderr.isatty():
        yield lambda event: print(event_line(event, perf_counter() - started), file=sys.stderr, flush=True)
        return
    running = Running()
    console = Console(stderr=True, highlight=False)
    with Live(get_renderable=running.table, console=console, refresh_per_second=1, transient=True):

        def show(event: Event) -> None:
            running.add(event)
            if event.state != "begins":
                console.print(escape(event_line(event, perf_counter() - started)), soft_wrap=True)

        yield show


class Running:
    """The runs in progress, with the seconds since each began, how many are done, and the time that is left."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._done = self._failed = self._total = 0
        self._until: float | None = None

    def add(self, event: Event) -> None:
        """Take a change of the state of the study."""
        self._total = event.total
        if event.left_seconds is not None:
            self._until = perf_counter() + event.left_seconds
        if event.state == "begins":
            self._began[event.name] = perf_counter()
            return
        self._began.pop(event.name, None)
        self._done += event.state in ("done", "kept")
        self._failed += event.state == "failed"

    def table(self) -> Table:
        """Return the state as a table."""
        now = perf_counter()
        failed = f", {self._failed} failed" if self._failed else ""
        left = "" if self._until is None else f", about {duration(max(0.0, self._until - now))} left"
        found = Table(f"{self._done} of {self._total} done{failed}{left}", "", box=None, pad_edge=False)
        for name, began in self._began.items():
            found.add_row(escape(name), duration(now - began))
        return found
