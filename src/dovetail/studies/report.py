"""What a study found, as `study.json` holds it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from dovetail.runs.folder import write_whole
from dovetail.studies.matrix import Value

JSON = "study.json"


@dataclass(frozen=True)
class Event:
    """What a study is doing: a run begins, is done (or was before: kept), or failed; or the costs are measured.

    number, total  of the run, from 1
    figure         of the finished run, in its task's metric
    seconds        that the run took
    problem        of a failed one
    """

    state: Literal["begins", "done", "kept", "failed", "measures"]
    name: str
    number: int
    total: int
    metric: str = ""
    figure: float | None = None
    seconds: float = 0.0
    problem: str = ""


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """Figures of several seeds: their mean, and the standard deviation of the sample (None for fewer than two)."""

    values: list[float]
    mean: float | None
    sd: float | None

    @property
    def n(self) -> int:
        """How many."""
        return len(self.values)

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of these values; an infinite one has no mean."""
        good = bool(values) and all(map(math.isfinite, values))
        return cls(
            values=list(values) if good else [],
            mean=statistics.mean(values) if good else None,
            sd=statistics.stdev(values) if good and len(values) > 1 else None,
        )


class Failure(_Record):
    """A run that ended in an error: its seed and what it said."""

    seed: int
    problem: str


class Result(_Record):
    """A line of the quality table.

    row, point   the row's name; axis -> value
    chain        of its runs
    stage        whose figures these are: merged, where merging was verified as exact, else the last one before
    sparsity     share of zeros in the target layers' weights at that stage, mean over the seeds
    mergeable    whether merging, really done, changed no weight, no logit, no zero and no figure, with every seed;
                 None where nothing was tuned
    why          what merging said where it isn't
    precision    of the weights, and of the adapter beside them: FP32 + FP32, INT4
    figure       of the task's metric, over the seeds
    merged_lossy what it is after a lossy merge; None where none was done
    failed       runs without a figure
    runs         folders
    """

    row: str
    point: dict[str, Value]
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


class Cost(_Record):
    """A line of the cost table; every figure is measured (`dovetail.studies.cost`).

    shipped                   what is used for inference (`dovetail.studies.shipped`)
    storage_nbytes            of its weights on disk
    step_seconds              processor seconds of one training step
    tuning_nbytes             peak memory of training, as the run's report says
    prefill_tokens_a_second   of a forward pass over a batch; per second of processor time, one thread
    decode_tokens_a_second    of greedy decoding; None for models that don't generate
    inference_nbytes          peak of live tensors during both, the model included
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


class Difference(_Record):
    """The figure of one row minus another's, at the same point, seed by seed."""

    row: str
    minus: str
    point: dict[str, Value]
    figure: Spread


class StudyReport(_Record):
    """A whole study.

    metric   what `figure` measures
    vary     axis -> its values
    seconds  of all runs together
    """

    title: str
    task: str
    metric: str
    split: str
    model: str
    seeds: list[int]
    vary: dict[str, list[Value]]
    results: list[Result]
    cost: list[Cost]
    compare: list[Difference]
    seconds: float
    environment: dict[str, str]

    def save(self, directory: Path) -> None:
        """Writes study.json, atomically."""
        write_whole(directory / JSON, self.model_dump_json(indent=2) + "\n")
