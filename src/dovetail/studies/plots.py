"""The curve of a study with a numeric axis: the figure against the axis, a line a row, with its standard deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.display.format import format_score, metric_name
from dovetail.display.plots import empty, frame_lines, png
from dovetail.display.style import COLOURS
from dovetail.studies.matrix import label
from dovetail.studies.report import Result, StudyReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE = "curve.png"


def curve(report: StudyReport) -> bytes | None:
    """The drawing as PNG; None where no axis has two numbers.

    Drawn is the first such axis. Rows that don't name it are dashed horizontal lines; points of further axes are lines
    of their own.
    """
    axis = next((name for name, values in report.vary.items() if len(values) > 1 and not any(map(_word, values))), None)
    if axis is None:
        return None
    lines: dict[str, list[Result]] = {}
    for result in report.results:
        rest = {name: value for name, value in result.point.items() if name != axis}
        lines.setdefault(label(result.row, rest), []).append(result)
    drawing, axes = empty()
    share = format_score(report.metric, 0.0).endswith("%")
    for number, (name, results) in enumerate(lines.items()):
        _draw(axes, name, axis, results, number, 100 if share else 1)
    axes.set_xticks([float(value) for value in report.vary[axis]], [str(value) for value in report.vary[axis]])
    frame_lines(axes, axis, metric_name(report.metric) + (" (%)" if share else ""))
    return png(drawing)


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


def _word(value: object) -> bool:
    return isinstance(value, str)
