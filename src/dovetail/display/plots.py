"""The look that all pictures share: an empty drawing, its frame, and its PNG, the same for the same figures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from dovetail.display.style import INK, LINE, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def empty(width: float = 8.4, height: float = 4.6) -> tuple[Figure, Axes]:
    """A drawing of this size in inches, and its only axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing, drawing.add_subplot()


def frame_lines(axes: Axes, x: str, y: str) -> None:
    """Names, frame, grid and legend of a drawing of lines that are labelled already."""
    axes.set_xlabel(x, color=SOFT)
    axes.set_ylabel(y, color=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INK, fontsize=9)


def png(drawing: Figure) -> bytes:
    """The drawing as PNG, without a note of the program's version."""
    written = io.BytesIO()
    drawing.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()
