"""The report of a study, as `study.json` holds it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from dovetail.files import write_whole
from dovetail.runs.report.record import ReportPart
from dovetail.studies.axes import Value
from dovetail.studies.measures import Cell

JSON = "study.json"


@dataclass(frozen=True)
class Event:
    """A change of the state of a study: a run begins, is done, was kept from an earlier start, or failed.

    state          measures: the costs are measured, after all runs
    number, total  of the run, from 1
    score          of the finished run, in the metric of its task
    seconds        of the run
    problem        of a failed run
    left_seconds   until all runs are done, estimated from the finished ones; None before one is
    """

    state: Literal["begins", "done", "kept", "failed", "measures"]
    name: str
    number: int
    total: int
    metric: str = ""
    score: float | None = None
    seconds: float = 0.0
    problem: str = ""
    left_seconds: float | None = None


class Spread(ReportPart):
    """Scores of several seeds: their mean, and the sample standard deviation (None for fewer than two)."""

    values: list[float]
    mean: float | None
    sd: float | None

    @property
    def n(self) -> int:
        """The number of values."""
        return len(self.values)

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize values; with a value that is not finite there is no mean."""
        good = bool(values) and all(map(math.isfinite, values))
        return cls(
            values=list(values) if good else [],
            mean=statistics.mean(values) if good else None,
            sd=statistics.stdev(values) if good and len(values) > 1 else None,
        )


class Failure(ReportPart):
    """A run without a score: its seed, the reason, and whether it had an error, no memory left, or was killed."""

    seed: int
    problem: str
    kind: Literal["error", "memory", "killed"] = "error"


class Illegal(ReportPart):
    """A point of a row that was not run: its chain is illegal, or it cannot be merged as the recipe asks, and why."""

    row: str
    point: dict[str, Value]
    why: str


class Result(ReportPart):
    """A line of the quality table.

    row, point    name of the row; axis -> value
    task          that its runs are trained and scored on
    chain         of its runs
    stage         whose scores these are: merged where merging was verified as exact, else the last one before
    sparsity      fraction of zeros in the weights of the target layers at that stage, mean over the seeds
    mergeable     whether the merge, which was run, changed no weight, no logit, no zero and no score for every seed;
                  None where nothing was tuned
    why           reason where it is not mergeable
    precision     of the weights, and of the adapter beside them: FP32 + FP32, INT4
    figure        scores in the metric of the task, over the seeds
    stable        the same without the runs that diverged (the study's RsLoRA*); None where none did
    merged_lossy  scores after a lossy merge; None where none was done
    failed        runs without a score
    runs          folders
    """

    row: str
    point: dict[str, Value]
    task: str
    chain: str
    stage: str
    sparsity: float | None
    mergeable: bool | None
    why: str
    precision: str
    figure: Spread
    merged_lossy: Spread | None
    failed: list[Failure]
    runs: list[str]
    stable: Spread | None = None


class Cost(ReportPart):
    """A line of the cost table; everything is measured (`dovetail.studies.cost`).

    shipped                  the form of the model for inference
    storage_nbytes           of its weights on disk
    step_seconds             processor seconds of one training step
    tuning_nbytes            peak memory of training, from the report of the run
    prefill_tokens_a_second  of a forward pass over a batch, per second of processor time with one thread
    decode_tokens_a_second   of greedy decoding; None for models that do not generate
    inference_nbytes         peak of live tensors during both, including the model
    """

    row: str
    point: dict[str, Value]
    shipped: str
    storage_nbytes: int
    step_seconds: float
    tuning_nbytes: int
    prefill_tokens_a_second: float
    decode_tokens_a_second: float | None
    inference_nbytes: int


class Difference(ReportPart):
    """The score of one line minus the score of another at the same point, seed by seed (`dovetail.studies.comparison`).

    minus     name of the row that is subtracted, or the axis and its value
    point     "all" on the axes whose points are taken together
    p         of the paired test; None with one seed
    p_holm    corrected for all tests of the study
    interval  of the mean difference, with a confidence of 95 %
    """

    row: str
    minus: str
    task: str
    point: dict[str, Value]
    figure: Spread
    p: float | None = None
    p_holm: float | None = None
    interval: tuple[float, float] | None = None


class StudyReport(ReportPart):
    """The report of a whole study.

    task, metric  of the first line
    metrics  task -> its metric
    summary  what won under which constraint, and what cannot be told apart, in words
    vary     axis -> its values
    illegal  points of rows that were not run
    seconds  of all runs together
    cells    the measures of each run that ended, line by line, seed by seed
    """

    title: str
    task: str
    metric: str
    metrics: dict[str, str] = Field(default={})
    split: str
    model: str
    seeds: list[int]
    vary: dict[str, list[Value]]
    results: list[Result]
    cost: list[Cost]
    compare: list[Difference]
    summary: list[str] = Field(default=[])
    illegal: list[Illegal] = Field(default=[])
    seconds: float
    environment: dict[str, str]
    cells: list[Cell] = Field(default=[])

    def save(self, directory: Path) -> None:
        """Write study.json atomically."""
        write_whole(directory / JSON, self.model_dump_json(indent=2) + "\n")
