"""study.html: the tables and the curve on one page that holds everything it shows. No script, no network."""

from __future__ import annotations

import base64
from html import escape

from dovetail.display.format import duration
from dovetail.display.style import STYLE
from dovetail.studies.report import StudyReport
from dovetail.studies.tables import Table, tables

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: only what is written in it."""
_STYLE = """
main { max-width: 76rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
td.yes { color: var(--accent); font-weight: 600; } td.no { color: var(--constraint); }
ul { margin: .6rem 0 0; padding-left: 1.1rem; color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
"""


def page(report: StudyReport, drawn: bytes | None) -> str:
    """The page as HTML text; `drawn` is the curve as PNG."""
    seeds = f"{len(report.seeds)} seeds" if len(report.seeds) > 1 else f"seed {report.seeds[0]}"
    what = f"{report.model} on {report.task}, {report.split} split, {seeds}"
    quality, *others = tables(report)
    sections = [_section(quality)]
    if drawn is not None:
        text = base64.b64encode(drawn).decode()
        picture = f'<img src="data:image/png;base64,{text}" alt="{escape(quality.title)} against the axis">'
        note = '<p class="note">Mean of the seeds; the band is one standard deviation to each side.</p>'
        sections.append(f"<section>\n<h2>Curve</h2>\n{picture}\n{note}\n</section>")
    sections += [_section(table) for table in others]
    facts = {"time of all runs": duration(report.seconds), **report.environment}
    inside = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    sections += [f"<section>\n<h2>Chains</h2>\n{_chains(report)}\n</section>"]
    sections += [f"<section>\n<h2>Runs</h2>\n<dl>{inside}</dl>\n</section>"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kind">Dovetail study</p>\n<h1>{escape(report.title)}</h1>\n'
        f'<p class="what">{escape(what)}</p>\n</header>\n' + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _section(table: Table) -> str:
    heads = "".join(f"<th{_kind(table, at)}>{escape(head)}</th>" for at, head in enumerate(table.heads))
    rows = "\n".join(
        "<tr>" + "".join(_cell(table, at, text) for at, text in enumerate(row)) + "</tr>" for row in table.rows
    )
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in table.remarks)
    return (
        f'<section>\n<h2>{escape(table.title[0].upper() + table.title[1:])}</h2>\n<div class="wide"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n"
        f'<p class="note">{escape(table.note)}</p>\n' + (f"<ul>{remarks}</ul>\n" if remarks else "") + "</section>"
    )


def _cell(table: Table, at: int, text: str) -> str:
    if at == 0:
        return f"<th>{escape(text)}</th>"
    answer = f' class="{text}"' if table.heads[at] == "mergeable" and text in ("yes", "no") else _kind(table, at)
    return f"<td{answer}>{escape(text)}</td>"


def _kind(table: Table, at: int) -> str:
    return ' class="number"' if at >= table.words else ""


def _chains(report: StudyReport) -> str:
    """What each row runs; at one point of the axes where it has several."""
    chains = {result.row: (result.chain, result.stage) for result in reversed(report.results)}
    rows = "\n".join(
        f"<tr><th>{escape(row)}</th><td>{escape(chains[row][1])}</td><td><code>{escape(chains[row][0])}</code></td></tr>"
        for row in dict.fromkeys(result.row for result in report.results)
    )
    heads = "<tr><th>row</th><th>shown after</th><th>chain</th></tr>"
    return f'<div class="wide"><table>\n<thead>{heads}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'
