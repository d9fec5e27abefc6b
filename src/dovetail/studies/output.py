"""The files that show a study: table.md, study.html and curve.png."""

from __future__ import annotations

from pathlib import Path

from dovetail.files import write_whole
from dovetail.studies.report import StudyReport
from dovetail.studies.tables import curve, markdown, page

TABLE, PAGE, CURVE = "table.md", "study.html", "curve.png"


def write_tables(report: StudyReport, folder: Path) -> None:
    """Write the files into the folder of the study, each atomically."""
    write_whole(folder / TABLE, markdown(report))
    drawn = curve(report)
    if drawn is not None:
        write_whole(folder / CURVE, drawn)
    write_whole(folder / PAGE, page(report, drawn))
