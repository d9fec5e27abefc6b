"""The report on a terminal: the table of stages and the verdict."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.display.format import duration, figure, metric_name, size
from dovetail.runs.report.record import Report, Row


def row_line(row: Row) -> str:
    """One finished row in one line, to be printed while the run goes on."""
    task, scores = next(iter(row.metrics.items()))
    metric, value = next(iter(scores.items()))
    return (
        f"{row.name:<16} {task} {metric_name(metric)} {figure(metric, value):>7}   "
        f"{row.footprint.bits_per_weight:6.2f} bits a weight   {duration(row.seconds)}"
    )


def print_summary(console: Console, report: Report, directory: Path) -> None:
    """Prints the report of a run in that directory."""
    console.print(f"\n[bold]{escape(report.chain)}[/bold]  on {escape(report.model)}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    scored = {report.task.name: report.task.metric}
    scored |= {name: next(iter(scores)) for name, scores in report.stages[0].metrics.items() if name not in scored}
    titles = [f"{name}\n{metric_name(metric)}" for name, metric in scored.items()]
    for title in (*titles, "bits a\nweight", "not\nzero", "model", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in report.stages:
        table.add_row(
            row.name,
            *(figure(metric, row.metrics[name][metric]) for name, metric in scored.items()),
            f"{row.footprint.bits_per_weight:.2f}",
            f"{100 * row.footprint.nonzero_fraction:.0f} %",
            size(row.footprint.nbytes),
            duration(row.seconds),
        )
    console.print(table)
    console.print(escape(report.verdict))
    if report.training:
        trained, peak = report.footprint.trainable_parameters, size(report.peak_memory_nbytes)
        console.print(f"Trained {trained:,} parameters; peak memory while training {peak}.")
    console.print(f"Time {duration(report.seconds)}.")
    console.print(f"[bold]{escape(str(directory / 'report.html'))}[/bold] is the page of this run", soft_wrap=True)
    if report.checkpoint is not None:
        console.print(f"{escape(str(directory / 'model'))} is the model, for any program that reads", end=" ")
        console.print("Hugging Face checkpoints", soft_wrap=True)
    if report.packed is not None:
        console.print(f"{escape(str(directory / 'packed'))} is the same model for Dovetail, in", end=" ")
        taken, bits = size(report.packed.nbytes), report.packed.bits_per_weight
        console.print(f"{taken}, {bits:.2f} bits a weight on disk", soft_wrap=True)
