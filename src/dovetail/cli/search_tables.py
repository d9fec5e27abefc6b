"""What `dovetail search` prints: a line for each trial, the front, and the cost before a search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from dovetail.display.format import duration, size
from dovetail.display.tables import print_table
from dovetail.searches.report import SearchReport, Trial, format_objective

if TYPE_CHECKING:
    from rich.console import Console

    from dovetail.searches.space import Preview


def trial_line(trial: Trial) -> str:
    """Return one line about a finished trial."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in trial.values.items()) or trial.state
    said = ", ".join([f"trial {trial.number}: {values}", *_size_and_steps(trial), duration(trial.seconds)])
    return f"{said}, {trial.summary}" + (f"\n{trial.problem}" if trial.problem else "")


def _size_and_steps(trial: Trial) -> list[str]:
    """Return the bits per weight, and the training steps with the rung, of a trial that has them."""
    found = []
    if "bits_per_weight" in trial.details:
        found.append(f"{trial.details['bits_per_weight']:.3g} bits per weight")
    if "steps" in trial.details:
        found.append(f"{trial.details['steps']} steps" + (f" (rung {trial.rung})" if trial.rung else ""))
    return found


def print_search(console: Console, report: SearchReport, output: Path) -> None:
    """Print the front of a search and where its files are."""
    console.print(f"\n[bold]{escape(report.headline)}[/bold]", soft_wrap=True)
    names, layers = list(report.objectives), report.kind == "layers"
    if layers:
        print(f"chain: {report.trial(report.best).chain}")
    cells = [
        [
            trial.summary,
            f"{trial.number}{', best' if trial.number == report.best else ''}",
            *(format_objective(name, trial.values[name], report.task.metric) for name in names),
            *([f"{trial.details['bits_per_weight']:.3g}", str(trial.details["steps"])] if layers else []),
            duration(trial.seconds),
        ]
        for trial in map(report.trial, report.front)
    ]
    heads = [name.replace("_", "\n") for name in names] + (["bits per\nweight", "steps"] if layers else [])
    print_table(console, ["units with each value" if layers else "chain", "trial", *heads, "time"], cells)
    print(f"\nrun the best one with: dovetail run {output / 'best.yaml'}")
    print(f"the page of this search is {output / 'report.html'}")


def _count(points: int | None) -> str:
    """Return the number of candidates, in powers of ten from a trillion."""
    if points is None:
        return "not counted"
    return f"{points:,}" if points < 10**12 else f"10^{math.log10(points):.0f}"


def print_preview(console: Console, cost: Preview) -> None:
    """Print what a search will cost."""
    seconds = "not predicted" if cost.seconds is None else duration(cost.seconds)
    memory = "not predicted" if cost.peak_memory_nbytes is None else size(cost.peak_memory_nbytes)
    rows = {
        "candidates in the space": _count(cost.points),
        "trials": f"{cost.trials:,}",
        "predicted time, one worker": seconds,
        "predicted peak memory": memory,
        **cost.facts,
    }
    for name, text in rows.items():
        console.print(f"{name}  [bold]{escape(text)}[/bold]", soft_wrap=True)
