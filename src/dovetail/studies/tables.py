"""The tables of a study: their cells as text, and their form in Markdown and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from dovetail.display.format import duration, format_score, metric_name, size
from dovetail.studies.matrix import Value, label
from dovetail.studies.report import Event, Result, Spread, StudyReport

NOTES = {
    "quality": "Mean ± standard deviation of the sample over n seeds. Zeros: sparsity of the target layers' weights, "
    "counted. Mergeable: merging was done and changed no weight, no logit, no zero and no figure. Merged anyway: the "
    "figure after a lossy merge, which re-imposes zeros and grid.",
    "cost": "First seed. Storage: weights on disk, as shipped. Step: processor seconds of a training step. Speeds: "
    "tokens a second of processor time, one thread, medians of interleaved rounds. Memory: live tensors, the model "
    "included.",
    "compare": "Seeds paired: mean ± standard deviation of the differences.",
}


@dataclass(frozen=True)
class Table:
    """A table of texts; the first `words` columns are words, the others figures. A head may have two lines."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    words: int
    note: str
    remarks: list[str] = field(default_factory=list)


def tables(report: StudyReport) -> list[Table]:
    """The tables that the study has: quality, and cost and differences where it asks for them."""
    found = [_quality(report)]
    if report.cost:
        found.append(_cost(report))
    if report.compare:
        found.append(_compare(report))
    return found


def spread(metric: str, value: Spread, *, signed: bool = False) -> str:
    """97.3 ± 1.7 %: shares in percent, a difference of shares (signed) in points."""
    if value.mean is None:
        return "–"
    share = format_score(metric, 0.0).endswith("%")
    scale, digits = (100, 1) if share else (1, 3)
    text = f"{scale * value.mean:{'+' if signed else ''}.{digits}f}"
    if value.sd is not None:
        text += f" ± {scale * value.sd:.{digits}f}"
    return text + ((" points" if signed else " %") if share else "")


def _axes(report: StudyReport, points: list[dict[str, Value]]) -> tuple[list[str], list[list[str]]]:
    """Titles of the axes, and each line's values on them."""
    axes = [axis for axis in report.vary if any(axis in point for point in points)]
    return axes, [[str(point.get(axis, "–")) for axis in axes] for point in points]


def _quality(report: StudyReport) -> Table:
    axes, values = _axes(report, [result.point for result in report.results])
    lossy = any(result.merged_lossy for result in report.results)
    heads = ["row", *axes, "mergeable", "final\nprecision", "zeros", metric_name(report.metric), "n"]
    rows = []
    for result, at in zip(report.results, values, strict=True):
        mergeable = {True: "yes", False: "no", None: "–"}[result.mergeable]
        zeros = "–" if result.sparsity is None else f"{100 * result.sparsity:.1f} %"
        told = spread(report.metric, result.figure) if result.figure.n or not result.failed else "failed"
        cells = [result.row, *at, mergeable, result.precision or "–", zeros, told, str(result.figure.n)]
        anyway = "" if result.merged_lossy is None else spread(report.metric, result.merged_lossy)
        rows.append([*cells, *([anyway] if lossy else [])])
    return Table(
        f"{metric_name(report.metric)} on {report.task}", [*heads, *(["merged\nanyway"] if lossy else [])], rows,
        3 + len(axes), NOTES["quality"], [remark for result in report.results for remark in _remarks(result)],
    )  # fmt: skip


def _remarks(result: Result) -> list[str]:
    name = label(result.row, result.point)
    remarks = [f"{name}, seed {one.seed} failed: {' '.join(one.problem.split())}" for one in result.failed]
    return [*remarks, *([f"{name} isn't merged: {result.why}."] if result.why else [])]


def _cost(report: StudyReport) -> Table:
    axes, values = _axes(report, [cost.point for cost in report.cost])
    heads = ["row", *axes, "shipped", "storage", "tuning\nstep", "tuning\nmemory", "prefill\ntokens/s",
             "decoding\ntokens/s", "inference\nmemory"]  # fmt: skip
    rows = [
        [
            cost.row, *at, cost.shipped, size(cost.storage_nbytes), f"{1000 * cost.step_seconds:.0f} ms",
            size(cost.tuning_nbytes), f"{cost.prefill_tokens_a_second:,.0f}",
            f"{cost.decode_tokens_a_second:,.0f}" if cost.decode_tokens_a_second is not None else "–",
            size(cost.inference_nbytes),
        ]
        for cost, at in zip(report.cost, values, strict=True)
    ]  # fmt: skip
    return Table("Cost", heads, rows, 2 + len(axes), NOTES["cost"])


def _compare(report: StudyReport) -> Table:
    axes, values = _axes(report, [found.point for found in report.compare])
    heads = ["row", "minus", *axes, "difference", "n"]
    rows = [
        [found.row, found.minus, *at, spread(report.metric, found.figure, signed=True), str(found.figure.n)]
        for found, at in zip(report.compare, values, strict=True)
    ]
    return Table("Differences", heads, rows, 2 + len(axes), NOTES["compare"])


def markdown(report: StudyReport) -> str:
    """table.md: every table with its note."""
    seeds = ", ".join(map(str, report.seeds))
    parts = [f"# {report.title}", f"{report.model} on {report.task}, {report.split} split; seeds {seeds}."]
    for table in tables(report):
        kinds = ["---"] * table.words + ["---:"] * (len(table.heads) - table.words)
        lines = [f"## {table.title}", "", *map(_line, [table.heads, kinds, *table.rows]), "", table.note]
        parts.append("\n".join([*lines, *(f"- {remark}" for remark in table.remarks)]))
    return "\n\n".join(parts) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def event_line(event: Event, elapsed: float) -> str:
    """What the study does now, in one line of a terminal; `elapsed` in seconds since it began."""
    place = f"{f'[{event.number} of {event.total}]':<12} {duration(elapsed):>12}  {event.name}"
    if event.state == "begins":
        return f"{place} ..."
    if event.state == "measures":
        return f"{'':<12} {duration(elapsed):>12}  measures {event.name} ..."
    if event.state == "failed":
        return f"{place} failed: {event.problem}"
    was = ", from an earlier start" if event.state == "kept" else f" in {duration(event.seconds)}"
    return f"{place}: {metric_name(event.metric)} {format_score(event.metric, event.figure)}{was}"


def print_study(console: Console, report: StudyReport) -> None:
    """The tables on a terminal."""
    for table in tables(report):
        console.print(f"\n[bold]{escape(table.title)}[/bold]")
        shown = RichTable(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
        for at, head in enumerate(table.heads):
            words = at < table.words
            shown.add_column(escape(head), justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        for remark in table.remarks:
            console.print(escape(remark), style="dim", soft_wrap=True)
