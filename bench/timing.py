"""Side-by-side timing: several functions in interleaved rounds, so that a machine whose speed drifts is fair to all."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison: our median over the peer's median, both in milliseconds."""

    name: str
    ours_ms: float
    peer_ms: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.peer_ms


def medians(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median milliseconds of each function over interleaved rounds; the order alternates from round to round.

    clock  seconds; for work on a GPU, one that waits for it first
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    gc.collect()
    for number in range(rounds + warmup):
        for name in names if number % 2 == 0 else reversed(names):
            start = clock()
            functions[name]()
            if number >= warmup:
                times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def show(title: str, rows: list[Row], as_json: bool = False) -> None:
    """Prints a table, or one JSON object a row."""
    if as_json:
        for row in rows:
            print(json.dumps({"table": title, **row.__dict__, "ratio": row.ratio}))
        return
    print(f"\n{title}\n{'':44s} {'ours ms':>9s} {'peer ms':>9s} {'ratio':>7s}  {'target':>7s}")
    for row in rows:
        mark = "" if row.target is None else f"{row.target:7.2f}  " + ("met" if row.ratio <= row.target else "MISSED")
        print(f"{row.name:44s} {row.ours_ms:9.2f} {row.peer_ms:9.2f} {row.ratio:7.3f}  {mark}", flush=True)
