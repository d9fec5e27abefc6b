"""HTML that all pages share. A page holds everything it shows and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape

from dovetail.display.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The content security policy of a page: a browser may load only what is written in it."""


def html_page(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """Return a whole page: `title` is plain text, `body` holds parts in HTML, empty parts are left out.

    script   stands at the end of the page; the policy names its digest, so that no other script runs
    """
    policy, last = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, last = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, body))
        + f"\n</main>\n{last}</body>\n</html>\n"
    )


def section(title: str, inside: str) -> str:
    """Return a section: `title` is plain text, `inside` HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>"


def html_table(head: str, rows: Iterable[str], *, sortable: bool = False) -> str:
    """Return a table that scrolls sideways on a narrow page, of cells in HTML.

    sortable   mark it for the script of a page that sorts tables
    """
    kind = ' class="sortable"' if sortable else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def definitions(facts: Mapping[str, str]) -> str:
    """Return a list of names and values, both plain text."""
    inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{inside}</dl>"
