"""The curve of a study with a numeric axis: the figure against the axis, a line a row, with its standard deviation."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dovetail.report.words import figure, metric_name
from dovetail.study.matrix import label
from dovetail.study.record import Result, StudyReport

CURVE = "curve.png"
_COLOURS = ("#2f6f62", "#b4562f", "#4a61a8", "#86681a", "#8a4a7d", "#3d7fa6", "#6b665f", "#a03c48")
"""The first four are those of the pages' links."""
_INK, _SOFT, _LINE = "#22201d", "#6b665f", "#e4e0d9"


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
    drawing = Figure(figsize=(8.4, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    share = figure(report.metric, 0.0).endswith("%")
    for number, (name, results) in enumerate(lines.items()):
        _draw(axes, name, axis, results, number, 100 if share else 1)
    axes.set_xlabel(axis, color=_SOFT)
    axes.set_ylabel(metric_name(report.metric) + (" (%)" if share else ""), color=_SOFT)
    axes.set_xticks([float(value) for value in report.vary[axis]], [str(value) for value in report.vary[axis]])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=_SOFT)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=_INK, fontsize=9)
    written = io.BytesIO()
    drawing.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def _draw(axes: Axes, name: str, axis: str, results: list[Result], number: int, scale: int) -> None:
    colour, dash = _COLOURS[number % len(_COLOURS)], "--" if number >= len(_COLOURS) else "-"
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
