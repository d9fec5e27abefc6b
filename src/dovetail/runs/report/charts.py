"""Drawings of the page, as SVG text: the loss curve, and quality against bits. Colours come from the page's style."""

from __future__ import annotations

import math
from html import escape

from dovetail.runs.report.record import Losses

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 240, 56, 16, 14, 34
MOST_POINTS = 400


def loss_curve(training: list[Losses]) -> str:
    """The loss of every step (thin) and its running mean, stage after stage; "" where nothing was trained."""
    stages = [[(step, loss) for step, loss in stage.losses if math.isfinite(loss)] for stage in training]
    stages = [losses for losses in stages if losses]
    if not stages:
        return ""
    total = sum(losses[-1][0] for losses in stages)
    highest = max(loss for losses in stages for _, loss in losses)
    lowest = min(0.0, min(loss for losses in stages for _, loss in losses))
    ticks = _ticks(lowest, highest)
    low, high = min(lowest, ticks[0]), max(highest, ticks[-1])

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, total)

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / max(high - low, 1e-12)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="training loss against steps">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(0, total):
        if tick <= total:
            parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - 14}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">steps</text>')
    begin = 0
    for number, losses in enumerate(stages):
        if number:
            parts.append(
                f'<line class="mark" x1="{x(begin):.1f}" x2="{x(begin):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            )
        for style, points in (("raw", losses), ("mean", _running_mean(losses))):
            thinned = points[:: max(1, len(points) // MOST_POINTS)] + points[-1:]
            path = " ".join(f"{x(begin + step):.1f},{y(loss):.1f}" for step, loss in thinned)
            parts.append(f'<polyline class="{style}" points="{path}"/>')
        begin += losses[-1][0]
    return "\n".join([*parts, "</svg>"])


def _running_mean(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential mean over about a twentieth of the steps, without a start-up bias."""
    weight = 1 / max(1.0, len(losses) / 20)
    mean, seen, found = 0.0, 0.0, []
    for step, loss in losses:
        mean, seen = (1 - weight) * mean + weight * loss, (1 - weight) * seen + weight
        found.append((step, mean / seen))
    return found


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to at least `high`."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first = math.floor(low / step)
    return [round(n * step, 12) for n in range(first, math.ceil(high / step) + 1)]


def bar(share: float, label: str) -> str:
    """A horizontal bar from 0 to 1, for a cell of a table."""
    filled = max(0.0, min(1.0, share))
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<rect class="track" width="100" height="8" rx="2"/>'
        f'<rect class="fill" width="{100 * filled:.1f}" height="8" rx="2"/></svg>'
    )
