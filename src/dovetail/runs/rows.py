"""The rows of a report: the model after each stage, scored; and the first records of the task with its outputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dovetail import processes
from dovetail.chains.check import check
from dovetail.chains.link import Chain
from dovetail.checkpoint.footprint import Footprint, footprint
from dovetail.runs.folder import FinishedRow, RunFolder
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Example, Row
from dovetail.runs.shared import Scored, SharedScores
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = 10
"""Records whose outputs a report shows."""


def row_names(links: Chain, *, head: bool = False) -> list[str]:
    """Return the names of the rows between "base" and "merged", in order: pruned, quantized, tuned.

    Of several rows of one kind, the last has the plain name, and the others name their stage: "tuned, stage 1".

    head   a new task head is trained beside the chain, so that the last stage is tuned in any case
    """
    found: list[tuple[str, int]] = []
    parts = check(links).stages
    for number, stage in enumerate(parts, 1):
        found += [("pruned" if link.kind == "pruner" else "quantized", number) for link in stage.applied]
        last = number == len(parts)
        if (stage.trained and not last) or (last and (head or stage.adapters)):
            found.append(("tuned", number))
    latest = {kind: index for index, (kind, _) in enumerate(found)}
    return [kind if latest[kind] == index else f"{kind}, stage {number}" for index, (kind, number) in enumerate(found)]


class Scores:
    """The scores of the model of a run, which all processes of the run compute together.

    The first one says whether there are any to compute: it may have them from an earlier start.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task], recipe: Recipe, *,
        progress: bool,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.tasks, self.settings = model, tokenizer, tasks, recipe.evaluate
        self.split, self.progress = recipe.evaluate.split or "test", progress

    def compute(self) -> Scored:
        """Return the scores of the model as it is, in the first process."""
        processes.from_first(lambda: True)
        return self._compute()

    def end(self) -> None:
        """Let the other processes go on."""
        processes.from_first(lambda: False)

    def follow(self) -> None:
        """Take part in what the first process computes, until it ends."""
        while processes.from_first(lambda: False):
            self._compute()

    def _compute(self) -> Scored:
        processes.share([*self.model.parameters(), *self.model.buffers()])
        outputs: dict[str, list[str]] = {}
        scores: dict[str, Any] = dict(evaluate(
            self.model, self.tokenizer, self.tasks, split=self.split, limit=self.settings.limit,
            batch_size=self.settings.batch_size, max_length=self.settings.max_length,
            progress=self.progress, on_outputs=outputs.__setitem__, in_parts=True,
        ))  # fmt: skip
        for task in self.tasks:  # the primary metric of a task comes first
            scores[task.name] = {task.metric: scores[task.name][task.metric], **scores[task.name]}
        said = [Example.shorten(text) for text in outputs[self.tasks[0].name][:EXAMPLES]]
        return Scored(metrics=scores, outputs=said)


class Rows:
    """The rows of a run in order; rows that an earlier start finished are not computed again."""

    def __init__(
        self, folder: RunFolder, scores: Scores, *, on_row: Callable[[Row], None] | None, shared: SharedScores | None
    ) -> None:
        self.folder, self.scores, self.on_row, self.shared = folder, scores, on_row, shared
        self.seconds_before = 0.0
        self._finished: list[FinishedRow] = []
        self._started = time.perf_counter()

    @property
    def done(self) -> list[Row]:
        """The rows that are finished."""
        return [finished.row for finished in self._finished]

    def add(self, name: str, taken: Footprint | None = None) -> None:
        """Score the model; `taken` is its footprint if that differs from what `footprint` counts now."""
        finished = self.folder.rows.get(name)
        if finished is None:
            finished = self._score(name, taken)
            self.folder.add(finished)
        else:
            self.seconds_before += finished.row.seconds
        self.scores.end()
        self._finished.append(finished)
        if self.on_row is not None:
            self.on_row(finished.row)
        self._started = time.perf_counter()

    def _score(self, name: str, taken: Footprint | None) -> FinishedRow:
        untuned = name == "base" or name.startswith(("pruned", "quantized"))
        model, compute = self.scores.model, self.scores.compute
        found = self.shared.of(model, compute) if self.shared is not None and untuned else compute()
        seconds = time.perf_counter() - self._started
        row = Row(name=name, metrics=found.metrics, footprint=taken or footprint(model), seconds=seconds)
        return FinishedRow(row=row, outputs=found.outputs)

    def examples(self) -> list[Example]:
        """Return the first records of the first task with the outputs of the base row and of the last row."""
        task, before, after = self.scores.tasks[0], self._finished[0].outputs, self._finished[-1].outputs
        records = task.split(self.scores.split)[: len(before)]
        return [Example.of(task, *shown) for shown in zip(records, before, after, strict=True)]
