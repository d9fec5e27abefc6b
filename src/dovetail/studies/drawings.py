"""The plots of a study: the curve against an axis as PNG, scores against size, memory and time, and heat maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from dovetail.display.format import SHARES, metric_name
from dovetail.display.plots import empty, frame_lines, png, score_limits, spaced_ticks
from dovetail.display.style import COLOURS
from dovetail.display.svg import Point, scatter
from dovetail.studies.axes import Value
from dovetail.studies.matrix import label
from dovetail.studies.report import Result, StudyReport
from dovetail.studies.standing import Board, Standing
from dovetail.studies.tables import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGAINST: tuple[tuple[str, str, float], ...] = (
    ("bits_per_weight", "bits per weight of the target layers", 1),
    ("nbytes", "size in memory, MB", 1e-6),
    ("peak_memory_nbytes", "peak memory of training, MB", 1e-6),
    ("training_seconds", "time of training, s", 1),
)
"""Measure, its title, and the factor to the unit of the title."""


def against(board: Board, measure: str, title: str, factor: float) -> str:
    """Draw the scores of a board against a measure as SVG, with a list of its Pareto front.

    A line is on the front where no other one has a better score without being larger in the measure. Returns "" where
    fewer than two values of the measure are known.
    """
    share = 100 if board.metric in SHARES else 1
    known = [line for line in board.scored if line.means[measure] is not None]
    if len({line.means[measure] for line in known}) < 2:
        return ""

    def place(line: Standing) -> tuple[float, float]:
        return factor * (line.means[measure] or 0), share * (line.score or 0)

    front = board.front(measure)
    points = [
        Point(
            *place(line), f"{line.name}\n{spread(board.metric, line.figure)}\n{place(line)[0]:.3g} {title}",
            "chosen" if line in front else "", str(front.index(line) + 1) if line in front else "",
        )
        for line in sorted(known, key=lambda line: line in front)
    ]  # fmt: skip
    corners: list[tuple[float, float]] = []
    for at, line in enumerate(front):
        x, y = place(line)
        corners += [(x, place(front[at - 1])[1]), (x, y)] if at else [(x, y)]
    drawn = scatter(points, [corners], title, board.title + (" (%)" if share == 100 else ""))
    names = "".join(f"<li>{escape(line.name)}: {escape(spread(board.metric, line.figure))}</li>" for line in front)
    return f'{drawn}\n<ol class="front">{names}</ol>'


@dataclass(frozen=True)
class HeatMap:
    """The scores of one row along two axes; `rest` is the point on the other axes."""

    row: str
    rest: dict[str, Value]
    down: str
    across: str
    lines: dict[tuple[Value, Value], Standing]


def heat_maps(board: Board, order: Sequence[str]) -> Iterator[HeatMap]:
    """Yield a map for each row that runs along at least two axes, and for each point on its further axes.

    order   the axes of the study; the first of a row goes down, the second across
    """
    for row in dict.fromkeys(line.row for line in board.lines):
        lines = [line for line in board.lines if line.row == row]
        axes = [axis for axis in order if len({line.point.get(axis) for line in lines if axis in line.point}) > 1]
        if len(axes) < 2:
            continue
        down, across = axes[:2]
        groups: dict[str, HeatMap] = {}
        for line in lines:
            rest = {axis: value for axis, value in line.point.items() if axis not in (down, across)}
            found = groups.setdefault(label(row, rest), HeatMap(row, rest, down, across, {}))
            if down in line.point and across in line.point:
                found.lines[line.point[down], line.point[across]] = line
        yield from groups.values()


def heat_table(board: Board, found: HeatMap) -> str:
    """Return a heat map as an HTML table: better scores have a stronger colour."""
    downs = list(dict.fromkeys(down for down, _ in found.lines))
    acrosses = list(dict.fromkeys(across for _, across in found.lines))
    scores = [board.sign * line.score for line in found.lines.values() if line.score is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 0.0)
    heads = "".join(f'<th class="number">{escape(str(value))}</th>' for value in acrosses)
    rows = []
    for down in downs:
        cells = [f"<th>{escape(str(down))}</th>"]
        for across in acrosses:
            line = found.lines.get((down, across))
            if line is None or line.score is None:
                cells.append(f'<td class="number">{"" if line is None else "–"}</td>')
                continue
            heat = (board.sign * line.score - low) / (high - low) if high > low else 0.5
            told = escape(spread(board.metric, line.figure))
            cells.append(f'<td class="number heat" style="--heat:{60 * heat:.0f}%">{told}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    corner = f"<th>{escape(found.down)} / {escape(found.across)}</th>"
    body = "\n".join(rows)
    return (
        f'<h3>{escape(label(found.row, found.rest))}</h3>\n<div class="wide"><table>\n'
        f"<thead><tr>{corner}{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def curve(report: StudyReport) -> bytes | None:
    """Draw the score against the first axis that has two numbers, as PNG; None where no axis has.

    Rows that do not name the axis are dotted horizontal lines. Points of further axes are lines of their own.
    """
    texts = {name: any(isinstance(value, str) for value in values) for name, values in report.vary.items()}
    axis = next((name for name, values in report.vary.items() if len(values) > 1 and not texts[name]), None)
    if axis is None:
        return None
    lines: dict[str, list[Result]] = {}
    for result in _in_metric(report):
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


def _in_metric(report: StudyReport) -> list[Result]:
    """Return the results on the tasks that are measured as the first one is."""
    return [each for each in report.results if report.metrics.get(each.task, report.metric) == report.metric]


def score_axis(report: StudyReport) -> tuple[float, float] | None:
    """Return the limits of the axis of scores, as they are drawn; None where no run has a score.

    The axis spans at least 10 points of a share, 0.1 of a correlation, and a tenth of the value of another metric.
    """
    share = report.metric in SHARES
    scale = 100 if share else 1
    spreads = [result.figure for result in _in_metric(report)]
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
