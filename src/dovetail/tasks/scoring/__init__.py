"""Quality of a model on tasks: each kind of task is scored by its own file here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dovetail import processes
from dovetail.errors import DataError
from dovetail.tasks.find import as_task
from dovetail.tasks.holding import holding
from dovetail.tasks.labels import as_model_labels
from dovetail.tasks.lengths import in_evaluation, length_limit
from dovetail.tasks.scoring.chat import score_chat
from dovetail.tasks.scoring.classification import score_labels, score_values
from dovetail.tasks.scoring.generation import score_generation
from dovetail.tasks.scoring.likelihood import score_choices, score_pairs, score_text
from dovetail.tasks.scoring.runner import Runner, Scored
from dovetail.tasks.scoring.shots import with_shots
from dovetail.tasks.task import Record, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS: Mapping[str, Callable[[Runner, Sequence[Record]], Scored]] = {
    "generation": score_generation,
    "choice": score_choices,
    "pairs": score_pairs,
    "text": score_text,
    "chat": score_chat,
    "classification": score_labels,
    "regression": score_values,
}
"""Kind of task -> what scores its records."""
SAMPLES = 3
"""Conversations to which sample answers are generated where only their likelihood is scored."""


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Task | str | Sequence[Task | str] | Sequence[Record],
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 64,
    max_length: int = 1024,
    progress: bool = True,
    on_outputs: Callable[[str, list[str]], None] | None = None,
    in_parts: bool = False,
) -> dict[str, dict[str, float]]:
    """Return the scores of a model on tasks: task name -> metric -> score, with the counts of `COUNTS`.

    tasks        tasks, playground tasks by their names, or records as `dovetail.train` takes them
    split        the split to score
    limit        only the first `limit` records
    batch_size   rows at a time; records are sorted by length, so that little is spent on padding
    max_length   tokens of a row, or fewer where the model's positions end earlier
    progress     a bar for what takes longer than 3 s
    on_outputs   called with the name of each task and the model's output for each record: the continuation, choice,
                 sentence, label or value; for the first conversations only where their likelihood alone is scored, and
                 no outputs for texts
    in_parts     whether each process of this run (torchrun) scores a part of the batches. All must call it, with the
                 same model, and all get the scores that one process computes

    `Task.scoring` adds shots, stop texts, an extractor and more (`dovetail.tasks.rules`). Metrics per kind: generation
    exact_match; choice accuracy, accuracy_norm (lm-eval's acc and acc_norm); pairs accuracy; text perplexity,
    nats_per_token, word_perplexity, byte_perplexity, bits_per_byte, of disjoint windows or of sliding ones; chat the
    first two, of the assistant's tokens, and exact_match of the last turn where that is the task's metric;
    classification accuracy, matthews; regression pearson, spearman.

    Decoder-only and encoder-decoder language models, and models with a classification or regression head, on the
    device where they are. Nothing is drawn by chance, and the model is left in the mode it was in. Raises DataError
    for a missing split, a label without a place in the head, or a task that the model has no head for.
    """
    if in_parts:
        processes.start()
    tasks = _tasks(tasks, split)
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        found, rule = "tasks " + ", ".join(names), "the names of tasks must differ"
        raise DataError("evaluate", found=found, rule=rule, fix="rename one of them")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            rule = f"{name} must be at least 1"
            raise DataError("evaluate", found=f"{name}={value}", rule=rule, fix=f"raise {name}")
    config: Any = model.config
    scores: dict[str, dict[str, float]] = {}
    with in_evaluation(model), _without_router_losses(model), torch.inference_mode(), holding(model):
        for task in tasks:
            task = as_model_labels(task, config)
            records = with_shots(task, split, limit)
            length = length_limit(model, tokenizer, max_length, records)
            samples = 0 if on_outputs is None else SAMPLES
            runner = Runner(
                model, tokenizer, task.name, batch_size, length, progress, task.metric, task.scoring, samples, in_parts
            )  # fmt: skip
            found, outputs = METHODS[task.kind](runner, records)
            scores[task.name] = {**found, "n": len(records), **runner.make.say(task.name, shown=progress)}
            if task.labels:
                outputs = [task.labels[int(number)] for number in outputs]
            if on_outputs is not None:
                on_outputs(task.name, outputs)
    return scores


@contextmanager
def _without_router_losses(model: nn.Module) -> Iterator[None]:
    """Compute no losses of MoE routers while entered: no score needs them, and `generate` cannot compute them."""
    config: Any = model.config
    asked = config.to_dict().get("output_router_logits")
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def _tasks(tasks: Task | str | Sequence[Task | str] | Sequence[Record], split: str) -> list[Task]:
    if isinstance(tasks, Task | str):
        return [as_task(tasks)]
    records = [record for record in tasks if isinstance(record, Mapping)]
    if records and len(records) == len(tasks):
        return [as_task(records, split)]
    if records:
        found, rule = "tasks and records in one list", "the list must contain tasks only, or records only"
        raise DataError("evaluate", found=found, rule=rule, fix="make a dovetail.Task of the records")
    return [as_task(task) for task in tasks if not isinstance(task, Mapping)]
