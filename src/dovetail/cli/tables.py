"""Tables of the commands plan, methods and evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dovetail.chains.link import Adapter, Constraint, Link, Pruner, Quantizer
from dovetail.chains.notation import format_value as format_value
from dovetail.chains.registry import links
from dovetail.display.format import format_score, metric_name, size

if TYPE_CHECKING:
    from dovetail.runs.plan import Plan

KINDS = {Pruner: "pruner", Quantizer: "quantizer", Adapter: "adapter", Constraint: "constraint"}
"""The kinds of links, in the order in which chains have them."""


def method_rows() -> list[dict[str, Any]]:
    """What each registered link says of itself, by kind and name."""
    found = []
    for cls, kind in KINDS.items():
        for name in sorted(name for name, link in links().items() if issubclass(link, cls)):
            link = links()[name]
            found.append({
                "name": name,
                "kind": kind,
                "arguments": {f.name: None if f.default is MISSING else f.default for f in fields(link)},
                "notation": _notation(link),
                "keeps_zeros": link.keeps_zeros,
                "keeps_grid": link.keeps_grid,
                "mergeable": link.mergeable,
                "calibrated": link.calibrated,
                "learning_rate": link.learning_rate if issubclass(link, Adapter) else None,
                "summary": link.summary,
                "source": link.source,
            })  # fmt: skip
    return found


def markdown_table() -> str:
    """The table of links as the README has it."""
    lines = ["| link | kind | keeps | what it does |", "|---|---|---|---|"]
    for row in method_rows():
        keeps = ", ".join(what for what in ("zeros", "grid") if row[f"keeps_{what}"]) or "–"
        lines.append(f"| `{row['notation']}` | {row['kind']} | {keeps} | {row['summary']} ({row['source']}) |")
    return "\n".join(lines)


def _notation(link: type[Link]) -> str:
    parts = [
        format_value(f.default) if f.metadata.get("positional") else f"{f.name}={format_value(f.default)}"
        for f in fields(link)
    ]
    return f"{link.name}({', '.join(parts)})" if parts else link.name


def print_methods(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table of links."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    for title in ("link", "kind", "keeps", "merges", "rate"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it does; its arguments and their defaults")
    for number, row in enumerate(rows):
        if number and row["kind"] != rows[number - 1]["kind"]:
            table.add_section()
        keeps = "\n".join(what for what, kept in (("zeros", row["keeps_zeros"]), ("grid", row["keeps_grid"])) if kept)
        rate = f"{row['learning_rate']:g}" if row["learning_rate"] is not None else ""
        about = [
            escape(row["summary"]),
            f"[bold]{escape(row['notation'])}[/bold]",
            f"[dim]{escape(row['source'])}[/dim]",
        ]
        merges = "yes" if row["mergeable"] else "no"
        table.add_row(row["name"], row["kind"], keeps, merges, rate, "\n".join(about))
    console.print(table)


def print_plan(console: Console, plan: Plan) -> None:
    """A legal plan: a row a stage, and whether it merges."""
    console.print(f"\n[bold]{escape(plan.chain)}[/bold]", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    for title in ("stage", "applied once", "trained"):
        table.add_column(title)
    for title in ("bits a\nweight", "bytes\nof the model", "trainable\nparameters", "peak memory\nof training"):
        table.add_column(title, justify="right")
    for number, stage in enumerate(plan.stages, 1):
        table.add_row(
            str(number),
            escape("\n".join(stage.applied)),
            escape("\n".join(stage.trained)),
            f"{stage.bits_per_weight:.4g}",
            f"{stage.nbytes:,}",
            f"{stage.trainable_parameters:,}",
            size(stage.predicted_peak_memory_nbytes) if stage.predicted_peak_memory_nbytes else "",
        )
    console.print(table)
    console.print(f"{plan.layers} layers, {plan.weights:,} weights under the chain")
    told = plan.predicted_peak_memory_nbytes is not None
    batches = f"batches of {plan.batch_size} rows of {plan.length} tokens"
    console.print(f"memory for {batches}" if told else "memory of training not predicted")
    if plan.mergeable:
        console.print(f"merges; {plan.merge_advice}" if plan.merge_advice else "merges without loss")
    else:
        console.print(f"doesn't merge without loss: {escape(plan.merge_advice)}")


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float]]) -> None:
    """A row for each task and metric."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    for title in ("task", "metric", "score", "records"):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right")
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            if metric != "n":
                table.add_row(escape(task), metric_name(metric), format_score(metric, value), f"{metrics['n']:.0f}")
    console.print(table)
