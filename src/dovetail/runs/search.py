"""The search over ranks as a step of a run: what it found is remembered in the run's folder until the run is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.chains.layer.elastic import set_ranks
from dovetail.files import read_json, write_whole
from dovetail.runs.folder import RunFolder
from dovetail.runs.recipe import Recipe, Search
from dovetail.runs.report.record import Searched, finite
from dovetail.searches.ranks import search_ranks
from dovetail.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def search_in_run(
    folder: RunFolder,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: Recipe,
    *,
    progress: bool,
) -> Searched:
    """Searches as the recipe says, or takes what an earlier start of this run found; each evaluation is logged.

    The model is left at the best ranks.
    """
    path = folder.training / "ranks.json"
    if path.exists():
        searched = read_json(path, Searched, rule="the file must hold the ranks that an earlier start found")
        set_ranks(model, searched.ranks)
        return searched
    found = search_ranks(
        model, tokenizer, task, batch_size=recipe.evaluate.batch_size, seed=recipe.seed, progress=progress,
        **(recipe.search or Search()).model_dump(),
    )  # fmt: skip
    for turn, ranks, score in found.history:
        folder.log("search", turn=turn, ranks=ranks, **finite({found.metric: score}))
    searched = Searched.of(found)
    write_whole(path, searched.model_dump_json())
    return searched
