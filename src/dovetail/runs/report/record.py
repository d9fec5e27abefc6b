"""The report of a run as `report.json` holds it."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic
import torch

from dovetail.checkpoint.footprint import Footprint
from dovetail.errors import LoadError
from dovetail.files import read_json, write_whole
from dovetail.tasks.find import number_of_labels
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import last_turn
from dovetail.training.train import StageReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "report.json"
EXAMPLE_CHARACTERS = 500
"""Maximum length of each text of an example."""
MAX_NBYTES = 1 << 28
"""The maximum size of a report.json, which holds the losses of millions of steps."""


def finite(score: float | None) -> float | None:
    """Return a score, or None for one that is infinite or NaN, which JSON cannot hold."""
    return score if score is not None and math.isfinite(score) else None


Score = Annotated[float | None, pydantic.AfterValidator(finite)]


class ReportPart(pydantic.BaseModel):
    """A part of a report; `model_validate` takes it from any object that has its fields."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, from_attributes=True)


class TaskInfo(ReportPart):
    """The task of the run.

    metric      the primary metric of the task
    split       the split that was scored
    chance      the score of an answer that does not depend on the input; None where it is not known
    num_labels  outputs of the head; None for a task without labels
    labels      names of the labels of a classification, in the order of their numbers
    """

    name: str
    kind: str
    metric: str
    split: str
    chance: float | None = None
    num_labels: int | None = None
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: Task, split: str, limit: int | None = None) -> TaskInfo:
        """Describe a task whose first `limit` records of a split are scored."""
        chance = _chance(task, task.split(split)[:limit])
        return cls(
            name=task.name, kind=task.kind, metric=task.metric, split=split, chance=chance,
            num_labels=number_of_labels(task), labels=task.labels,
        )  # fmt: skip


def _chance(task: Task, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the expected score of a guess among choices or pairs, of the most frequent label, or of a constant."""
    if task.metric in ("matthews", "pearson", "spearman"):
        return 0.0
    if task.kind == "choice":
        return sum(1 / len(record["choices"]) for record in records) / len(records)
    if task.kind == "classification":
        return Counter(record["label"] for record in records).most_common(1)[0][1] / len(records)
    return 0.5 if task.kind == "pairs" else None


class Row(ReportPart):
    """The model after one stage.

    name       base; pruned, quantized, tuned, searched, merged where the chain has them
    metrics    task -> metric -> score, with the counts of `dovetail.tasks.task.COUNTS`; None where one is not finite
    footprint  of the model after the stage
    seconds    of the stage, including its evaluation
    """

    name: str
    metrics: dict[str, dict[str, Score]]
    footprint: Footprint
    seconds: float


class Merge(ReportPart):
    """What merging changed (see `dovetail.MergeReport`); logits of the tuned model against those of the merged one."""

    exact: bool
    max_abs_weight_diff: float
    max_abs_logit_diff: float | None
    sparsity_before: float
    sparsity_after: float
    off_grid: int
    given_up: tuple[str, ...] = ()


class Losses(ReportPart):
    """The training of one stage.

    links           trained in the stage
    losses          (step, loss on the batch)
    learning_rates  link -> learning rate
    seconds         of training
    validation      (step, score of the primary metric on the validation split), where the recipe asks for it
    """

    links: list[str]
    losses: list[tuple[int, float]]
    learning_rates: dict[str, float]
    seconds: float
    validation: list[tuple[int, float]] = []

    @classmethod
    def of(cls, stage: StageReport, metric: str) -> Losses:
        """Take the part of a StageReport that a report holds; infinite scores are left out."""
        scores = [(step, found[metric]) for step, found in stage.evaluations]
        return cls(
            links=stage.links, losses=stage.losses, learning_rates=stage.learning_rates, seconds=stage.seconds,
            validation=[(step, score) for step, score in scores if math.isfinite(score)],
        )  # fmt: skip


class Example(ReportPart):
    """A record of the task with the model's output before and after tuning.

    prompt    the text that the model is given
    expected  the record's target
    before    output of the base
    after     output of the last stage
    """

    prompt: str
    expected: str
    before: str
    after: str

    @classmethod
    def of(cls, task: Task, record: Mapping[str, Any], before: str, after: str) -> Example:
        """Show a record of a task."""
        match task.kind:
            case "generation":
                prompt, expected = record["prompt"], record["answer"]
            case "choice":
                prompt, expected = record["prompt"], record["choices"][record["label"]]
            case "chat":
                last = last_turn(record)
                turns = [f"{message['role']}: {message.get('content') or ''}" for message in record["messages"][:last]]
                prompt, expected = "\n".join(turns), record["messages"][last].get("content") or ""
            case "pairs":
                prompt, expected = "", record["good"]
            case _:
                prompt = record["text"]
                expected = task.labels[record["label"]] if task.labels else str(record["label"])
                if "pair" in record:
                    prompt += "\n" + record["pair"]
        texts = {"prompt": prompt, "expected": expected, "before": before, "after": after}
        return cls(**{name: cls.shorten(text) for name, text in texts.items()})

    @staticmethod
    def shorten(text: str) -> str:
        """Return the beginning of a long text."""
        return text if len(text) <= EXAMPLE_CHARACTERS else text[: EXAMPLE_CHARACTERS - 1] + "…"


class Searched(ReportPart):
    """The result of a search over elastic ranks (`dovetail.RankSearch`), scored on a sample of `split`.

    start, best  scores of the reference ranks and of the ranks found; None where not finite
    ranks        group of layers -> rank found
    """

    metric: str
    split: str
    samples: int
    start: Score
    best: Score
    evaluations: int
    ranks: dict[str, int]


class Checkpoint(ReportPart):
    """The checkpoint in model/.

    nbytes               on disk
    max_abs_logit_diff   between the checkpoint as stock transformers loads it and the merged model
    """

    nbytes: int
    max_abs_logit_diff: float | None


class Packed(ReportPart):
    """The packed model in packed/.

    nbytes              of its file of tensors
    bits_per_weight     on disk, of the weights under the chain (`dovetail.PackedSize`)
    max_abs_logit_diff  between the packed model and the merged model
    """

    nbytes: int
    bits_per_weight: float
    max_abs_logit_diff: float


class Exported(ReportPart):
    """An export in export/NAME (`dovetail.ExportReport`).

    claim      "values": same values in `dtype`; "codes": same codes and scales; "adapter": the same change
    differing  of `weights`, the values that differ in `dtype`
    """

    name: str
    format: str
    dtype: str
    decoder: str
    claim: str
    weights: int
    differing: int
    nbytes: int


class Report(ReportPart):
    """The report of a whole run.

    layers              pattern of layers -> their chain, where their links have other arguments
    stages              the model after each stage, `base` first
    merge               None where the base and the adapter were kept apart
    verdict             what merging kept and changed, in words
    footprint           of the last row, with the trainable parameters of training
    peak_memory_nbytes  of training; 0 where nothing was trained
    seconds             of the whole run
    packed              None where nothing was pruned or quantized, or base and adapter were kept apart
    search              where the recipe asks for one
    rendered            the first training row as text: stretches, and whether the loss counts them
    examples            the first records of the scored split, before and after tuning
    identity            digests of the model, the tokenizer and the data; {} in reports of earlier versions
    """

    task: TaskInfo
    chain: str
    layers: dict[str, str] = {}
    model: str
    seed: int
    stages: list[Row]
    merge: Merge | None
    verdict: str
    footprint: Footprint
    peak_memory_nbytes: int
    seconds: float
    training: list[Losses]
    checkpoint: Checkpoint | None
    packed: Packed | None = None
    exports: list[Exported] = []
    environment: dict[str, str]
    search: Searched | None = None
    rendered: list[tuple[str, bool]] = []
    examples: list[Example] = []
    identity: dict[str, str] = {}

    def row(self, name: str) -> Row:
        """Return the row of that name; raise KeyError where the run has none."""
        for row in self.stages:
            if row.name == name:
                return row
        raise KeyError(name)

    def score(self, row: Row) -> float | None:
        """Return the score of a row in the primary metric of the task."""
        return row.metrics[self.task.name][self.task.metric]

    def save(self, directory: Path) -> None:
        """Write report.json atomically."""
        write_whole(directory / REPORT, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> Report:
        """Read the report.json of a run directory; raise LoadError where it is none."""
        path = Path(directory) / REPORT
        rule, fix = "a run directory must contain a report.json that a run wrote", "pass the folder given as --output"
        report = read_json(path, cls, rule=rule, fix=fix, limit=MAX_NBYTES)
        for row in report.stages:
            if report.task.metric not in row.metrics.get(report.task.name, {}):
                raise LoadError(str(path), found=f"row {row.name} without {report.task.metric}", rule=rule, fix=fix)
        return report


def environment(model: PreTrainedModel) -> dict[str, str]:
    """Return what is needed to repeat a run: versions, device, threads and dtype."""
    return host_environment(model.device) | {"dtype": str(model.dtype).removeprefix("torch.")}


def host_environment(device: torch.device) -> dict[str, str]:
    """Return the versions, the device and the number of threads."""
    packages = {name: version(name) for name in ("dovetail", "torch", "transformers")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return packages | {
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
    }
