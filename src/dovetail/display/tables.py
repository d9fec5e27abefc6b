"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_LONGEST_WORD = 16
"""The width, in characters, below which a text column is not folded."""


def print_table(
    console: Console, heads: Sequence[str], rows: Iterable[Sequence[str | Text]], *, words: int = 1,
    sections: Iterable[int] = (),
) -> None:  # fmt: skip
    """Print a table whose numbers are never cut.

    heads     of the columns; a head may have several lines
    rows      cells; markup in a `str` is printed as it is, a `Text` keeps its style
    words     number of leading columns that hold text, which may be folded; the others hold numbers
    sections  indices of the rows that begin a new section

    Where the console is too narrow for the numbers, each row is printed as a list with one cell in a line.
    """
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    least = _least_width(heads, cells, words)
    if least > console.width:
        _print_lists(console, heads, cells)
        return
    padding = 1 if least + len(heads) <= console.width else 0
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, padding, 0, 0))
    for at, head in enumerate(heads):
        number = at >= words
        table.add_column(Text(head), justify="right" if number else "left", no_wrap=number, overflow="fold")
    starts = set(sections)
    for at, row in enumerate(cells):
        if at in starts:
            table.add_section()
        table.add_row(*row)
    console.print(table)


def _least_width(heads: Sequence[str], rows: list[list[Text]], words: int) -> int:
    """Return the width of a table whose columns are one space apart."""
    total = 1
    for at, head in enumerate(heads):
        texts = [Text(head), *(row[at] for row in rows)]
        width = max((line.cell_len for text in texts for line in text.split()), default=0)
        total += 1 + (min(width, _LONGEST_WORD) if at < words else width)
    return total


def _print_lists(console: Console, heads: Sequence[str], rows: list[list[Text]]) -> None:
    for row in rows:
        console.print()
        for at, (head, cell) in enumerate(zip(heads, row, strict=True)):
            name = Text(head.replace("\n", " ") + "  ", style="dim")
            console.print(name + cell if at else cell, soft_wrap=True)
