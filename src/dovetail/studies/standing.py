"""The lines of a study side by side, on one task or on the average of all: score, size, memory and time of each.

An average over tasks has the lines whose row and point have a run on every task; an axis that names the data is no part
of the point then. Scores are averaged seed by seed, where all tasks are measured in shares or all in one metric.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dovetail.display.format import SHARES, metric_name
from dovetail.studies.axes import Value
from dovetail.studies.measures import Cell
from dovetail.studies.report import Result, Spread, StudyReport
from dovetail.tasks.task import LOWER_IS_BETTER

AVERAGE = "average"
_MEANS = (
    "nbytes_base", "nbytes_untuned", "nbytes", "bits_per_weight", "bit_reduction", "trained_parameters",
    "trained_share", "adapter_nbytes", "adapter_nbytes_16_bit", "peak_memory_nbytes", "planned_memory_nbytes",
    "training_seconds", "step_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """A line on a task, or on the average of all.

    results  those that it shows: one, or one of each task
    scores   seed -> score; empty where a run has none, so that no mean is made of the others
    means    name of a measure of `Cell` -> mean over the runs; None where some run has none
    """

    row: str
    point: dict[str, Value]
    results: tuple[Result, ...]
    cells: tuple[Cell, ...]
    scores: dict[int, float]
    means: dict[str, float | None]

    @property
    def name(self) -> str:
        """The line in words, short: `tuned (nf4, lora)`; axes of numbers are named: `LoRA (sparsity 0.5)`."""
        values = [value if isinstance(value, str) else f"{axis} {value}" for axis, value in self.point.items()]
        return f"{self.row} ({', '.join(values)})" if values else self.row

    @property
    def figure(self) -> Spread:
        """The scores, their mean and their deviation."""
        return Spread.of(list(self.scores.values()))

    @property
    def score(self) -> float | None:
        """The mean score."""
        return self.figure.mean


@dataclass(frozen=True)
class Board:
    """All lines on a task, or on the average of all.

    task    its name, or `AVERAGE`
    metric  of the scores; of an average over metrics that are shares, that of the first task
    title   of the scores in words: "accuracy"; "score" where several metrics are averaged
    """

    task: str
    metric: str
    title: str
    lines: tuple[Standing, ...]

    @property
    def sign(self) -> int:
        """-1 where a smaller score is better, else 1."""
        return -1 if self.metric in LOWER_IS_BETTER else 1

    @property
    def scored(self) -> list[Standing]:
        """The lines with a score, the best first; a line without a finite score is none of them."""
        found = [line for line in self.lines if line.score is not None]
        return sorted(found, key=lambda line: -self.sign * (line.score or 0.0))

    def front(self, measure: str) -> list[Standing]:
        """Return the lines that no other one beats in score without being larger in a measure, the smallest first."""
        found: list[Standing] = []
        known = [line for line in self.scored if line.means[measure] is not None]
        for line in sorted(known, key=lambda line: line.means[measure] or 0.0):  # stable: the best of equal ones first
            if not found or self.sign * (line.score or 0.0) > self.sign * (found[-1].score or 0.0):
                found.append(line)
        return found


def boards(report: StudyReport) -> list[Board]:
    """Return a board for each task, and one for the average where there are several that can be averaged."""
    tasks = list(dict.fromkeys(result.task for result in report.results))
    cells: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in report.cells:
        cells.setdefault((cell.row, _key(cell.point), cell.task), []).append(cell)
    of: dict[str, list[Standing]] = {task: [] for task in tasks}
    for result in report.results:
        mine = cells.get((result.row, _key(result.point), result.task), [])
        of[result.task].append(_standing(result.row, result.point, [result], [mine]))
    found = []
    for task in tasks:
        metric = report.metrics.get(task, report.metric)
        found.append(Board(task, metric, metric_name(metric), tuple(of[task])))
    metrics = {board.metric for board in found}
    if len(tasks) > 1 and (len(metrics) == 1 or metrics <= set(SHARES)):
        lines = tuple(_averaged(found))
        if lines:
            title = found[0].title if len(metrics) == 1 else "score"
            found.append(Board(AVERAGE, found[0].metric, title, lines))
    return found


def _averaged(each: Sequence[Board]) -> Iterator[Standing]:
    groups: dict[tuple[str, str], dict[str, Standing]] = {}
    for board in each:
        for line in board.lines:
            groups.setdefault((line.row, _key(_without_data(line.point))), {})[board.task] = line
    for (row, _), group in groups.items():
        if len(group) == len(each):
            lines = list(group.values())
            point = _without_data(lines[0].point)
            yield _standing(row, point, [line.results[0] for line in lines], [line.cells for line in lines])


def _standing(
    row: str, point: dict[str, Value], results: Sequence[Result], cells: Sequence[Sequence[Cell]]
) -> Standing:
    """Return a line of one result, or the average of several; `cells` are those of each result."""
    whole = all(not result.failed for result in results) and all(cells)
    by_seed = [{cell.seed: cell.score for cell in mine} for mine in cells]
    scores: dict[int, float] = {}
    for seed in by_seed[0]:
        values = [found.get(seed) for found in by_seed]
        scores[seed] = statistics.mean(math.nan if value is None else value for value in values)
    if not whole or not all(map(math.isfinite, scores.values())):
        scores = {}
    flat = [cell for mine in cells for cell in mine]
    return Standing(row, point, tuple(results), tuple(flat), scores, {name: _mean(flat, name) for name in _MEANS})


def _mean(cells: Sequence[Cell], name: str) -> float | None:
    values = [getattr(cell, name) for cell in cells]
    return None if not values or any(value is None for value in values) else statistics.mean(values)


def _without_data(point: Mapping[str, Value]) -> dict[str, Value]:
    return {axis: value for axis, value in point.items() if axis.partition(".")[0] != "data"}


def _key(point: Mapping[str, Value]) -> str:
    return repr(sorted(point.items()))
