"""A study as Markdown, as LaTeX, and as CSV with every number of every run."""

from __future__ import annotations

import csv
import io
from typing import Any

from dovetail.studies.measures import Cell
from dovetail.studies.report import StudyReport
from dovetail.studies.tables import Table, measure_tables, tables

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", ">": r"$>$", "<": r"$<$",
    "\n": " ",
}  # fmt: skip
_NOT_IN_CSV = ("row", "point", "scores")


def markdown(report: StudyReport) -> str:
    """Return table.md: the summary, and every table with its note."""
    seeds = ", ".join(map(str, report.seeds))
    parts = [f"# {report.title}", f"{report.model} on {_tasks(report)}, {report.split} split; seeds {seeds}."]
    if report.summary:
        parts.append("\n".join(f"- {sentence}" for sentence in report.summary))
    for table in [*tables(report), *measure_tables(report)]:
        kinds = ["---"] * table.words + ["---:"] * (len(table.heads) - table.words)
        lines = [f"## {table.title}", "", *map(_line, [table.heads, kinds, *table.texts]), "", table.note]
        parts.append("\n".join([*lines, *(f"- {remark}" for remark in table.remarks)]))
    return "\n\n".join(parts) + "\n"


def _tasks(report: StudyReport) -> str:
    return ", ".join(report.metrics) if len(report.metrics) > 1 else report.task


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def latex(report: StudyReport) -> str:
    """Return table.tex: every table as a `table` environment in the style of the package booktabs."""
    parts = ["% Needs \\usepackage{booktabs} in the preamble."]
    for number, table in enumerate([*tables(report), *measure_tables(report)], 1):
        parts.append(_latex_table(table, f"{report.title}: {table.title}", f"tab:study-{number}"))
    return "\n\n".join(parts) + "\n"


def _latex_table(table: Table, caption: str, name: str) -> str:
    columns = "l" * table.words + "r" * (len(table.heads) - table.words)
    lines = [
        r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_line(table.heads),
        r"\midrule", *map(_latex_line, table.texts), r"\bottomrule", r"\end{tabular}",
        rf"\caption{{{escape(caption)}. {escape(table.note)}}}", rf"\label{{{name}}}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines)


def _latex_line(cells: list[str]) -> str:
    return " & ".join(map(escape, cells)) + r" \\"


def escape(text: str) -> str:
    """Return a text in which LaTeX's special characters stand for themselves."""
    return "".join(_LATEX.get(character, character) for character in text)


def comma_separated(report: StudyReport) -> str:
    """Return table.csv: one line for each run of each line of the study, with exact numbers.

    The state of a run is done, diverged or failed; a run that failed has its reason as `problem`. Scores of further
    tasks and metrics have a column each.
    """
    axes = [axis for axis in report.vary if any(axis in result.point for result in report.results)]
    further = list(dict.fromkeys(name for cell in report.cells for name in cell.scores))
    fields = [name for name in Cell.model_fields if name not in _NOT_IN_CSV and name != "task"]
    first = ["row", *(f"axis {axis}" for axis in axes), "task", "metric", "chain", "state", "problem"]
    written = io.StringIO()
    table = csv.DictWriter(written, [*first, *fields, *further], lineterminator="\n")
    table.writeheader()
    for result in report.results:
        common: dict[str, Any] = {
            "row": result.row, **{f"axis {axis}": result.point.get(axis, "") for axis in axes}, "task": result.task,
            "metric": report.metrics.get(result.task, report.metric), "chain": result.chain,
        }  # fmt: skip
        ended: set[int] = set()
        for cell in report.cells:
            if (cell.row, cell.point, cell.task) == (result.row, result.point, result.task):
                ended.add(cell.seed)
                values = {name: getattr(cell, name) for name in fields}
                state = {"state": "diverged" if cell.diverged else "done"}
                table.writerow({**common, **state, **values, **cell.scores})
        for one in result.failed:
            if one.seed not in ended:
                problem = " ".join(one.problem.split())
                table.writerow({**common, "state": "failed", "seed": one.seed, "problem": problem})
    return written.getvalue()
