"""What a recipe asks for, loaded and checked before a run changes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dovetail.chains.check import check, check_merge
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.load import HEAD_KINDS
from dovetail.compression.calibration import calibration_batches, text_task
from dovetail.errors import RecipeError
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_task
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import length_limit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def legal_chain(recipe: Recipe) -> CheckedChain:
    """Return the chain; raise ChainError or CannotMerge if it cannot run, or cannot be merged as the recipe asks."""
    links = check(recipe.chain)
    if recipe.merge == "exact" or (recipe.merge == "lossy" and any(not link.mergeable for link in links)):
        check_merge(links)
    if recipe.search is not None and not any(link.ranks for link in links.stages[-1].adapters):
        rule = "a search needs elastic ranks in the last stage of the chain"
        fix = "use lora(r=16, elastic=[16, 12, 8]), or remove search"
        raise RecipeError("search", found=f"chain {links}", rule=rule, fix=fix)
    return links


def load_tasks(recipe: Recipe) -> list[Task]:
    """Return the task that is trained and the further tasks to score; each must have the splits that the run reads."""
    first, *others = tasks = [load_task(data) for data in (recipe.data, *recipe.evaluate.tasks)]
    for task in others:
        if task.kind != first.kind and (task.kind in HEAD_KINDS or first.kind in HEAD_KINDS):
            raise RecipeError(
                f"evaluate.tasks: {task.name}", found=f"a {task.kind} task beside {first.name}, a {first.kind} task",
                rule="one model must answer all tasks: with a head, or without", fix=f"remove {task.name}",
            )  # fmt: skip
    for task in tasks:
        task.split(recipe.evaluate.split or "test")
    first.split("train")
    if recipe.search is not None:
        first.split(recipe.search.split)
    return tasks


def calibration(
    recipe: Recipe, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """Return the batches that pruners and quantizers are calibrated on."""
    config: Any = model.config
    if recipe.calibration.text is not None:
        source = text_task(recipe.calibration.text, encoder_decoder=config.is_encoder_decoder)
    else:
        source = Task(task.name, task.kind, task.metric, {"train": task.split(recipe.calibration.split)})
    return calibration_batches(
        source, tokenizer, samples=recipe.calibration.samples,
        seed=recipe.seed, max_length=length_limit(model, tokenizer, recipe.train.max_length),
        decoder_start=config.decoder_start_token_id if config.is_encoder_decoder else None,
    )  # fmt: skip
