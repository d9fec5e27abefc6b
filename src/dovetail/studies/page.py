"""study.html: one page that loads nothing. A click on a head sorts its table, where scripts run."""

from __future__ import annotations

import base64
from html import escape

from dovetail.display import svg
from dovetail.display.format import duration
from dovetail.display.html import definitions, html_page, html_table, section
from dovetail.studies.drawings import AGAINST, against, heat_maps, heat_table
from dovetail.studies.report import StudyReport
from dovetail.studies.standing import AVERAGE, Board, boards
from dovetail.studies.tables import Shown, Table, measure_tables, tables

_MOST_MAPS = 12
"""The most heat maps that a page shows."""
_STYLE = (
    svg.STYLE
    + """
main { max-width: 76rem; }
img { display: block; width: 100%; min-width: 36rem; height: auto; border-radius: 6px; }
@media (prefers-color-scheme: dark) { img { filter: invert(.88) hue-rotate(180deg); } }
td.yes { color: var(--accent); font-weight: 600; } td.no { color: var(--constraint); }
section > ul, ol.front { margin: .6rem 0 0; padding-left: 1.4rem; color: var(--soft); font-size: .87rem;
  overflow-wrap: anywhere; }
.summary { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; } .summary li { margin: .25rem 0; }
h3 { margin: 1.1rem 0 .4rem; font-size: .95rem; font-weight: 600; } h3:first-of-type { margin-top: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.6rem; }
.plots .tick { font-size: 19px; }
td.heat { background: color-mix(in srgb, var(--accent) var(--heat), transparent); }
th.sorts { cursor: pointer; } th.sorts:hover { color: var(--accent); }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
"""
)
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  [...table.tHead.rows[0].cells].forEach((head, at) => {
    head.className += " sorts"; head.tabIndex = 0;
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
      const rank = row => key(row) === "\u2013" || key(row) === "" ? 1 : 0;
      const order = (a, b) => rank(a) - rank(b) || (down ? -1 : 1) *
        (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
      body.append(...[...body.rows].sort(order));
    };
    head.onclick = sort;
    head.onkeydown = event => { if (event.key === "Enter") sort(); };
  });
"""
"""Sort a table by the column of a head: missing values last, numbers by `data-value`, a second click in reverse."""


def page(report: StudyReport, drawn: bytes | None) -> str:
    """Return the page as text; `drawn` is the curve as PNG."""
    seeds = f"{len(report.seeds)} seeds" if len(report.seeds) > 1 else f"seed {report.seeds[0]}"
    every, made = boards(report), [*tables(report), *measure_tables(report)]
    tasks = ", ".join(report.metrics) if len(report.metrics) > 1 else report.task
    what = escape(f"{report.model} on {tasks}, {report.split} split, {seeds}")
    parts = [
        f'<header>\n<p class="kind">Dovetail study</p>\n<h1>{escape(report.title)}</h1>\n<p class="what">{what}</p>\n'
        "</header>",
        section("Summary", _summary(report)) if report.summary else "",
        *map(_table_section, made[: len(every)]),
        _plots(every),
        _maps(report, every),
    ]
    if drawn is not None:
        text = base64.b64encode(drawn).decode()
        picture = f'<img src="data:image/png;base64,{text}" alt="{escape(made[0].title)} against the axis">'
        note = '<p class="note">Mean over the seeds. The band is one standard deviation to each side.</p>'
        parts.append(section("Curve", f'<div class="wide">{picture}</div>\n{note}'))
    parts += map(_table_section, made[len(every) :])
    parts.append(section("Chains", _chains(report)))
    parts.append(section("Runs", definitions({"time of all runs": duration(report.seconds), **report.environment})))
    return html_page(report.title, parts, style=_STYLE, script=SCRIPT)


def _summary(report: StudyReport) -> str:
    return '<ul class="summary">' + "".join(f"<li>{escape(said)}</li>" for said in report.summary) + "</ul>"


def _plots(every: list[Board]) -> str:
    """Draw the average over tasks, or every task where there is none."""
    shown, parts = [board for board in every if board.task == AVERAGE] or every, []
    for board in shown:
        drawn = [text for text in (against(board, *what) for what in AGAINST) if text]
        if drawn:
            title = f"<h3>{escape(board.task)}</h3>" if len(every) > 1 else ""
            parts.append(title + '<div class="plots">' + "".join(f"<div>{text}</div>" for text in drawn) + "</div>")
    if not parts:
        return ""
    note = (
        "Each point is a line of the tables; its name appears when the pointer rests on it. The numbered points are "
        "the Pareto front: no other line has a better score without being larger. Means over the seeds."
    )
    return section("Score against size, memory and time", "\n".join(parts) + f'\n<p class="note">{note}</p>')


def _maps(report: StudyReport, every: list[Board]) -> str:
    found = [(board, one) for board in reversed(every) for one in heat_maps(board, list(report.vary))]
    if not found:
        return ""
    parts = []
    for board, one in found[:_MOST_MAPS]:
        task = f'<p class="note">{escape(board.task)}</p>' if len(every) > 1 else ""
        parts.append(task + heat_table(board, one))
    note = "Mean ± standard deviation over the seeds; the better the score, the stronger the colour of its cell."
    left = f" {len(found) - _MOST_MAPS} more are left out." if len(found) > _MOST_MAPS else ""
    return section("Heat map", "\n".join(parts) + f'\n<p class="note">{note}{left}</p>')


def _table_section(table: Table) -> str:
    heads = "".join(
        f"<th{_number(table, at)}>{escape(head).replace(chr(10), '<br>')}</th>" for at, head in enumerate(table.heads)
    )
    rows = ["".join(_cell(table, at, shown) for at, shown in enumerate(row)) for row in table.rows]
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in table.remarks)
    inside = f'{html_table(heads, rows, sortable=True)}\n<p class="note">{escape(table.note)}</p>\n'
    return section(table.title[0].upper() + table.title[1:], inside + (f"<ul>{remarks}</ul>\n" if remarks else ""))


def _cell(table: Table, at: int, shown: Shown) -> str:
    value = "" if shown.value is None else f' data-value="{shown.value!r}"'
    if at == 0:
        return f"<th{value}>{escape(shown.text)}</th>"
    answers = table.heads[at] == "mergeable" and shown.text in ("yes", "no")
    answer = f' class="{shown.text}"' if answers else _number(table, at)
    return f"<td{answer}{value}>{escape(shown.text)}</td>"


def _number(table: Table, at: int) -> str:
    return ' class="number"' if at >= table.words else ""


def _chains(report: StudyReport) -> str:
    """Return a table of the chain of each row, at its first point of the axes."""
    chains = {result.row: (result.chain, result.stage) for result in reversed(report.results)}
    rows = [
        f"<th>{escape(row)}</th><td>{escape(chains[row][1])}</td><td><code>{escape(chains[row][0])}</code></td>"
        for row in dict.fromkeys(result.row for result in report.results)
    ]
    return html_table("<th>row</th><th>shown after</th><th>chain</th>", rows)
