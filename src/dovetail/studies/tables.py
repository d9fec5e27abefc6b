"""The tables and the curve of a study: as Markdown, on a terminal, as a page and as PNG."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape as html
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from dovetail.display.format import SHARES, duration, format_score, metric_name, percent, size
from dovetail.display.html import definitions, html_page, html_table, section
from dovetail.display.plots import empty, frame_lines, png, score_limits, spaced_ticks
from dovetail.display.style import COLOURS
from dovetail.display.tables import print_table
from dovetail.studies.axes import Value
from dovetail.studies.matrix import label
from dovetail.studies.report import Event, Result, Spread, StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTES = {
    "quality": "Mean ± sample standard deviation over n seeds. Zeros: measured sparsity of the weights of the target "
    "layers. Mergeable: the merge was run, and it changed no weight, no logit, no zero and no score. Merged anyway: "
    "the score after a lossy merge, which re-imposes zeros and grid.",
    "cost": "First seed. Storage: weights on disk, as shipped. Step: processor seconds of a training step. Speeds: "
    "tokens per second of processor time with one thread, medians of interleaved rounds. Memory: peak of live "
    "tensors, including the model.",
    "compare": "Seeds are paired: mean ± standard deviation of the differences.",
}
_STYLE = """
main { max-width: 76rem; }
img { display: block; width: 100%; min-width: 36rem; height: auto; border-radius: 6px; }
@media (prefers-color-scheme: dark) { img { filter: invert(.88) hue-rotate(180deg); } }
td.yes { color: var(--accent); font-weight: 600; } td.no { color: var(--constraint); }
ul { margin: .6rem 0 0; padding-left: 1.1rem; color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Table:
    """A table of texts. The first `words` columns hold text, the others numbers. A head may have two lines."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    words: int
    note: str
    remarks: list[str] = field(default_factory=list)


def tables(report: StudyReport) -> list[Table]:
    """Return the tables of a study: quality, and cost and differences where the study file asks for them."""
    found = [_quality(report)]
    if report.cost:
        found.append(_cost(report))
    if report.compare:
        found.append(_compare(report))
    return found


def spread(metric: str, value: Spread, *, signed: bool = False) -> str:
    """Format a mean and its deviation, 97.3 ± 1.7 %: shares in percent, differences of shares (signed) in points."""
    if value.mean is None:
        return "–"
    share = metric in SHARES
    scale, digits = (100, 1) if share else (1, 3)
    text = f"{scale * value.mean:{'+' if signed else ''}.{digits}f}"
    if value.sd is not None:
        text += f" ± {scale * value.sd:.{digits}f}"
    return text + ((" points" if signed else " %") if share else "")


def _axes(report: StudyReport, points: list[dict[str, Value]]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the axes, and the values of each line on them."""
    axes = [axis for axis in report.vary if any(axis in point for point in points)]
    return axes, [[str(point.get(axis, "–")) for axis in axes] for point in points]


def _quality(report: StudyReport) -> Table:
    axes, values = _axes(report, [result.point for result in report.results])
    lossy = any(result.merged_lossy for result in report.results)
    heads = ["row", *axes, "mergeable", "final\nprecision", "zeros", metric_name(report.metric), "n"]
    rows = []
    for result, at in zip(report.results, values, strict=True):
        mergeable = {True: "yes", False: "no", None: "–"}[result.mergeable]
        zeros = "–" if result.sparsity is None else percent(result.sparsity)
        told = spread(report.metric, result.figure) if result.figure.n or not result.failed else "failed"
        cells = [result.row, *at, mergeable, result.precision or "–", zeros, told, str(result.figure.n)]
        anyway = "" if result.merged_lossy is None else spread(report.metric, result.merged_lossy)
        rows.append([*cells, *([anyway] if lossy else [])])
    return Table(
        f"{metric_name(report.metric)} on {report.task}", [*heads, *(["merged\nanyway"] if lossy else [])], rows,
        3 + len(axes), NOTES["quality"],
        [*(remark for result in report.results for remark in _remarks(result)), *_illegal(report)],
    )  # fmt: skip


def _illegal(report: StudyReport) -> list[str]:
    """Return a line for each point that was not run."""
    return [f"{label(one.row, one.point)} was not run, because it is illegal: {one.why}" for one in report.illegal]


def _remarks(result: Result) -> list[str]:
    name = label(result.row, result.point)
    remarks = [f"{name}, seed {one.seed} failed: {' '.join(one.problem.split())}" for one in result.failed]
    return [*remarks, *([f"{name} is not mergeable: {result.why}."] if result.why else [])]


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
    """Return table.md: every table with its note."""
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
    """Return the current state of the study as one line; `elapsed` in seconds since its start."""
    place = f"{f'[{event.number} of {event.total}]':<12} {duration(elapsed):>12}  {event.name}"
    if event.state == "begins":
        return f"{place} ..."
    if event.state == "measures":
        return f"{'':<12} {duration(elapsed):>12}  measures {event.name} ..."
    left = f", about {duration(event.left_seconds)} left" if event.left_seconds and event.state != "kept" else ""
    if event.state == "failed":
        return f"{place} failed: {event.problem}{left}"
    was = ", from an earlier start" if event.state == "kept" else f" in {duration(event.seconds)}"
    return f"{place}: {metric_name(event.metric)} {format_score(event.metric, event.score)}{was}{left}"


def print_study(console: Console, report: StudyReport) -> None:
    """Print the tables of a study."""
    for table in tables(report):
        console.print(f"\n[bold]{escape(table.title)}[/bold]")
        print_table(console, table.heads, table.rows, words=table.words)
        for remark in table.remarks:
            console.print(escape(remark), style="dim", soft_wrap=True)


def page(report: StudyReport, drawn: bytes | None) -> str:
    """Return study.html as text; `drawn` is the curve as PNG."""
    seeds = f"{len(report.seeds)} seeds" if len(report.seeds) > 1 else f"seed {report.seeds[0]}"
    what = html(f"{report.model} on {report.task}, {report.split} split, {seeds}")
    quality, *others = tables(report)
    parts = [
        f'<header>\n<p class="kind">Dovetail study</p>\n<h1>{html(report.title)}</h1>\n<p class="what">{what}</p>\n'
        "</header>",
        _table_section(quality),
    ]
    if drawn is not None:
        text = base64.b64encode(drawn).decode()
        picture = f'<img src="data:image/png;base64,{text}" alt="{html(quality.title)} against the axis">'
        note = '<p class="note">Mean over the seeds. The band is one standard deviation to each side.</p>'
        parts.append(section("Curve", f'<div class="wide">{picture}</div>\n{note}'))
    parts += [_table_section(table) for table in others]
    parts.append(section("Chains", _chains(report)))
    parts.append(section("Runs", definitions({"time of all runs": duration(report.seconds), **report.environment})))
    return html_page(report.title, parts, style=_STYLE)


def _table_section(table: Table) -> str:
    heads = "".join(
        f"<th{_number(table, at)}>{html(head).replace(chr(10), '<br>')}</th>" for at, head in enumerate(table.heads)
    )
    rows = ["".join(_cell(table, at, text) for at, text in enumerate(row)) for row in table.rows]
    remarks = "".join(f"<li>{html(remark)}</li>" for remark in table.remarks)
    inside = f'{html_table(heads, rows)}\n<p class="note">{html(table.note)}</p>\n'
    return section(table.title[0].upper() + table.title[1:], inside + (f"<ul>{remarks}</ul>\n" if remarks else ""))


def _cell(table: Table, at: int, text: str) -> str:
    if at == 0:
        return f"<th>{html(text)}</th>"
    answer = f' class="{text}"' if table.heads[at] == "mergeable" and text in ("yes", "no") else _number(table, at)
    return f"<td{answer}>{html(text)}</td>"


def _number(table: Table, at: int) -> str:
    return ' class="number"' if at >= table.words else ""


def _chains(report: StudyReport) -> str:
    """Return a table of the chain of each row, at its first point of the axes."""
    chains = {result.row: (result.chain, result.stage) for result in reversed(report.results)}
    rows = [
        f"<th>{html(row)}</th><td>{html(chains[row][1])}</td><td><code>{html(chains[row][0])}</code></td>"
        for row in dict.fromkeys(result.row for result in report.results)
    ]
    return html_table("<th>row</th><th>shown after</th><th>chain</th>", rows)


def curve(report: StudyReport) -> bytes | None:
    """Draw the score against the first axis that has two numbers, as PNG; None where no axis has.

    Rows that do not name the axis are dotted horizontal lines. Points of further axes are lines of their own.
    """
    texts = {name: any(isinstance(value, str) for value in values) for name, values in report.vary.items()}
    axis = next((name for name, values in report.vary.items() if len(values) > 1 and not texts[name]), None)
    if axis is None:
        return None
    lines: dict[str, list[Result]] = {}
    for result in report.results:
        rest = {name: value for name, value in result.point.items() if name != axis}
        lines.setdefault(label(result.row, rest), []).append(result)
    drawing, axes = empty()
    share = report.metric in SHARES
    for number, (name, results) in enumerate(lines.items()):
        _draw(axes, name, axis, results, number, 100 if share else 1)
    values = {float(value): str(value) for value in report.vary[axis]}
    log = min(values) > 0 and max(values) >= 10 * min(values)
    if log:
        axes.set_xscale("log")
    shown = spaced_ticks(list(values), log=log)
    axes.set_xticks(shown, [values[value] for value in shown])
    axes.set_xticks([], minor=True)
    if (limits := score_axis(report)) is not None:
        axes.set_ylim(*limits)
    frame_lines(axes, axis, metric_name(report.metric) + (" (%)" if share else ""))
    return png(drawing)


def score_axis(report: StudyReport) -> tuple[float, float] | None:
    """Return the limits of the axis of scores, as they are drawn; None where no run has a score.

    The axis spans at least 10 points of a share, 0.1 of a correlation, and a tenth of the value of another metric.
    """
    share = report.metric in SHARES
    scale = 100 if share else 1
    spreads = [result.figure for result in report.results]
    told = [(scale * s.mean, scale * (s.sd or 0)) for s in spreads if s.mean is not None]
    if not told:
        return None
    low, high = min(mean - sd for mean, sd in told), max(mean + sd for mean, sd in told)
    if share:
        return score_limits(low, high, least=10, floor=0, ceiling=100)
    if report.metric in ("matthews", "pearson", "spearman"):
        return score_limits(low, high, least=0.1, floor=-1, ceiling=1)
    return score_limits(low, high, least=0.1 * abs(high), floor=0, ceiling=None)


def _draw(axes: Axes, name: str, axis: str, results: list[Result], number: int, scale: int) -> None:
    colour, dash = COLOURS[number % len(COLOURS)], "--" if number >= len(COLOURS) else "-"
    flat = [result for result in results if axis not in result.point and result.figure.mean is not None]
    if flat:
        axes.axhline(scale * (flat[0].figure.mean or 0), color=colour, linestyle=":", linewidth=1.6, label=name)
        return
    told = sorted((r for r in results if r.figure.mean is not None), key=lambda r: float(r.point[axis]))
    x = [float(result.point[axis]) for result in told]
    y = [scale * (result.figure.mean or 0) for result in told]
    sd = [scale * (result.figure.sd or 0) for result in told]
    axes.plot(x, y, dash, color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
    low, high = [a - b for a, b in zip(y, sd, strict=True)], [a + b for a, b in zip(y, sd, strict=True)]
    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
