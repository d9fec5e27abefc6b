"""Steps of a run whose results are kept or verified: the search over ranks, and the merged model on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.chains.layer.elastic import set_ranks
from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import to_stock
from dovetail.checkpoint.packed import save_packed
from dovetail.files import read_json, write_whole
from dovetail.runs.folder import RunFolder
from dovetail.runs.recipe import Recipe, Search
from dovetail.runs.report.record import Checkpoint, Packed, Searched, finite
from dovetail.searches.ranks import search_ranks
from dovetail.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def search(
    folder: RunFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, recipe: Recipe, *,
    progress: bool,
) -> Searched:  # fmt: skip
    """Search ranks as the recipe says, log each evaluation, and leave the model at the best ranks.

    A result of an earlier start of this run is read from its folder.
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


def write_packed(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: dict[str, Tensor], kind: str
) -> Packed:
    """Write the packed model, turn the one in memory into stock modules, and compare it with the one on disk.

    kind   of the run's task, which determines the head of the model
    """
    shutil.rmtree(directory, ignore_errors=True)  # left behind by a killed run
    size = save_packed(model, directory, tokenizer=tokenizer)
    to_stock(model)
    again, _ = load(directory, task_kind=kind)
    return Packed(
        nbytes=size.nbytes, bits_per_weight=size.bits_per_weight, max_abs_logit_diff=_difference(again, model, probe)
    )


def write_stock(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: dict[str, Tensor]
) -> Checkpoint:
    """Write the standard checkpoint, and load it with stock transformers to compare the logits."""
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    again = type(model).from_pretrained(directory, dtype="auto").eval()
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return Checkpoint(nbytes=nbytes, max_abs_logit_diff=_difference(again, model, probe))


def _difference(one: PreTrainedModel, other: PreTrainedModel, probe: dict[str, Tensor]) -> float:
    """Return the largest difference of a logit, on the device of `other`."""
    moved: Any = torch.nn.Module.to(one, other.device)
    probe = {name: tensor.to(other.device) for name, tensor in probe.items()}
    with torch.inference_mode():
        return float((moved(**probe).logits - other(**probe).logits).abs().max())
