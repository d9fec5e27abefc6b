"""Plots as PNG: an empty figure, its frame, and its limits. The same numbers give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dovetail.display.style import INK, LINE, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def empty(width: float = 8.4, height: float = 4.6) -> tuple[Figure, Axes]:
    """Create a figure of this size in inches, and its only axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot()


def frame_lines(axes: Axes, x: str, y: str) -> None:
    """Draw axis titles, frame, grid and legend around lines that have labels."""
    axes.set_xlabel(x, color=SOFT)
    axes.set_ylabel(y, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INK, fontsize=9)


def score_limits(
    low: float, high: float, *, least: float, floor: float | None, ceiling: float | None
) -> tuple[float, float]:
    """Return the limits of an axis of scores from `low` to `high`.

    The axis spans at least `least`, so that noise among nearly equal scores does not fill it, and keeps to `floor` and
    `ceiling`, with a small margin so that lines on a limit can be seen.
    """
    span = max(high - low, least)
    middle = (low + high) / 2
    bottom, top = middle - span / 2, middle + span / 2
    if floor is not None and bottom < floor:
        bottom, top = floor, floor + span
    if ceiling is not None and top > ceiling:
        bottom, top = ceiling - span, ceiling
    return bottom - 0.05 * span, top + 0.05 * span


def spaced_ticks(values: Sequence[float], *, log: bool, least: float = 0.06) -> list[float]:
    """Return the values, in order, whose labels have room: each lies at least `least` of the axis behind the last."""
    at = sorted(set(values))
    places = [math.log(value) for value in at] if log else at
    room = least * (places[-1] - places[0])
    kept = [0]
    for number in range(1, len(at)):
        if places[number] - places[kept[-1]] >= room:
            kept.append(number)
    return [at[number] for number in kept]


def png(drawing: Figure) -> bytes:
    """Return the figure as PNG, without the version of the program that wrote it."""
    written = io.BytesIO()
    drawing.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
