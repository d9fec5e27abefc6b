"""What the kinds of search share whose candidates are trained on the recipe's task: its splits, and predictions."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from random import Random
from typing import TYPE_CHECKING

from dovetail.checkpoint.config import empty_model, grid_of, load_config
from dovetail.errors import SearchError
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.runs.search_settings import ChainSettings
from dovetail.searches.space import SearchSpace
from dovetail.tasks.find import load_task, number_of_labels
from dovetail.tasks.stored import select
from dovetail.tasks.task import Task
from dovetail.training.optimizer import check_checkpointing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAIN_SHARE = 0.8
"""The share of the training records that candidates are trained on (CLAM, Table 6), without a validation split."""


class TaskSpace(SearchSpace):
    """A space whose candidates are trained on one task.

    whole_task   of the recipe
    search_task  the same with the splits that candidates are trained and scored on: train and validation
    test         the split that is scored at the end, which no candidate sees
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.whole_task = load_task(recipe.data)
        self.test = recipe.evaluate.split or "test"
        self.whole_task.split(self.test)
        self.search_task = split_task(self.whole_task, self.test, recipe.seed)

    @property
    def steps(self) -> int:
        """Training steps of a candidate that is trained to the end."""
        return self.recipe.train.max_steps or ceil(self.recipe.train.epochs * self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps that see each record once."""
        settings = self.recipe.train
        return ceil(len(self.search_task.split("train")) / (settings.batch_size * settings.gradient_accumulation))

    @property
    def _num_labels(self) -> int | None:
        return number_of_labels(self.whole_task, self.recipe.data.num_labels)

    def empty_model(self) -> PreTrainedModel:
        """Return the model without weights; raise TrainError where it cannot be trained as the recipe asks."""
        recipe = self.recipe
        prefix = recipe.search.prefix if isinstance(recipe.search, ChainSettings) else ""
        grid = grid_of(recipe.chain, prefix)
        config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code, grid=grid)
        empty = empty_model(
            config, task_kind=self.whole_task.kind, num_labels=self._num_labels, dtype=recipe.dtype,
            trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
        check_checkpointing(empty, recipe.train.gradient_checkpointing)
        return empty

    def predicted_peak(self, recipe: Recipe) -> int | None:
        """Return the predicted peak of memory while a candidate trains; None for a chain that is not legal."""
        settings = recipe.train
        return plan(
            recipe.chain, recipe.model, layers=recipe.layers, targets=recipe.targets, task=self.search_task,
            dtype=recipe.dtype, num_labels=self._num_labels, batch_size=settings.batch_size,
            max_length=settings.max_length, packing=settings.packing, bf16=settings.bf16,
            gradient_checkpointing=settings.gradient_checkpointing, trust_remote_code=recipe.trust_remote_code,
            keep_weights=settings.keep_weights is True,  # "auto" would depend on the memory that is free just now
        ).predicted_peak_memory_nbytes  # fmt: skip

    def peak_memory(self, recipe: Recipe) -> float:
        """Return the predicted peak; SearchError for a chain that is not legal."""
        found = self.predicted_peak(recipe)
        if found is None:
            rule = "a chain must be legal on the model, so that its peak of memory can be predicted"
            raise SearchError("search.objectives", found=recipe.chain, rule=rule, fix="look at `dovetail plan` of it")
        return float(found)


def split_task(task: Task, test: str, seed: int) -> Task:
    """Return the task with the splits that candidates are trained and scored on: train and validation.

    A validation split that is not the test split is taken as it is. Else a fifth of the training records is, drawn with
    this seed.

    test   name of the split that the winner is scored on; no candidate sees it
    """
    train_records = task.split("train")
    if "validation" in task.splits and test != "validation":
        return task
    count = round(TRAIN_SHARE * len(train_records))
    if not 0 < count < len(train_records):
        rule = "a training split without a validation split beside it must have at least 3 records"
        raise SearchError(f"task {task.name}", found=f"{len(train_records)}", rule=rule, fix="add records")
    chosen = set(Random(f"{seed} search split").sample(range(len(train_records)), count))
    parts = {
        "train": select(train_records, sorted(chosen)),
        "validation": select(train_records, (place for place in range(len(train_records)) if place not in chosen)),
    }
    return replace(task, splits={**task.splits, **parts})
