"""The files that show a study: table.md, table.tex, table.csv, study.html and curve.png."""

from __future__ import annotations

from pathlib import Path

from dovetail.files import write_whole
from dovetail.studies.drawings import curve
from dovetail.studies.page import page
from dovetail.studies.report import StudyReport
from dovetail.studies.texts import comma_separated, latex, markdown

TABLE, PAGE, CURVE = "table", "study.html", "curve.png"


def write_tables(report: StudyReport, folder: Path) -> None:
    """Write the files into the folder of the study, each atomically."""
    write_whole(folder / f"{TABLE}.md", markdown(report))
    write_whole(folder / f"{TABLE}.tex", latex(report))
    write_whole(folder / f"{TABLE}.csv", comma_separated(report))
    drawn = curve(report)
    if drawn is not None:
        write_whole(folder / CURVE, drawn)
    write_whole(folder / PAGE, page(report, drawn))
