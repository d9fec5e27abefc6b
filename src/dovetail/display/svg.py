"""Plots as SVG for a page: points that show a text when the pointer rests on them, and lines, in a frame with ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 84, 20, 14, 54
"""The size of a plot, and its margins."""

STYLE = """
.point { fill: var(--soft); opacity: .55; } .point.chosen { fill: var(--accent); opacity: 1; }
.point.reference { fill: var(--quantizer); opacity: 1; } .line { fill: none; stroke: var(--accent); stroke-width: 2; }
"""
"""The style of points and lines, for `dovetail.display.html.html_page`."""


@dataclass(frozen=True)
class Point:
    """A point of a plot.

    title  shown when the pointer rests on it
    style  "", "chosen" or "reference"
    label  drawn beside it
    """

    x: float
    y: float
    title: str
    style: str = ""
    label: str = ""


def scatter(points: Sequence[Point], lines: Sequence[Sequence[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Draw points, and lines through (x, y) in order; "" where there is nothing to draw. Titles are plain text."""
    xs = [point.x for point in points] + [x for line in lines for x, _ in line]
    ys = [point.y for point in points] + [y for line in lines for _, y in line]
    if not xs:
        return ""
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    def text(at: float, height: float, anchor: str, said: str) -> str:
        return f'<text class="tick" x="{at:.1f}" y="{height:.1f}" text-anchor="{anchor}">{escape(said)}</text>'

    label = escape(f"{y_title} against {x_title}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, "end", _number(tick)))
    for tick in x_ticks:
        anchor = "end" if tick == x_ticks[-1] else "middle"
        parts.append(text(x(tick), HEIGHT - 32, anchor, _number(tick)))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle", x_title))
    for line in lines:
        drawn = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line)
        parts.append(f'<polyline class="line" points="{drawn}"/>')
    for point in points:
        style = f"point {point.style}".strip()
        parts.append(
            f'<circle class="{style}" cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="5">'
            f"<title>{escape(point.title)}</title></circle>"
        )
        if point.label:
            parts.append(text(x(point.x) + 8, y(point.y) - 8, "start", point.label))
    legend = f'<div class="legend">{escape(y_title)}</div>\n'
    return legend + "\n".join([*parts, "</svg>"])


def _number(value: float) -> str:
    """Format a tick: large numbers in thousands and millions."""
    for power, unit in ((9, " G"), (6, " M"), (3, " k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:g}{unit}"
    return f"{value:g}"


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first = math.floor(low / step)
    return [round(n * step, 12) for n in range(first, max(math.ceil(high / step), first + 1) + 1)]
