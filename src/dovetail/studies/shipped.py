"""The model of a finished run in each form in which it can be shipped, with its bytes on disk.

base and adapter   the base packed (codes, masks), and the adapter's parameters at the ranks in use
merged, packed     packed/: runs from its codes
merged, stock      model/: values written out, for any program that reads Hugging Face checkpoints
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import extract, groups
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Chain
from dovetail.chains.stages import stages
from dovetail.checkpoint.adapter import load_adapter
from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import merge, to_stock
from dovetail.checkpoint.packed import save_packed
from dovetail.runs import folder as run_folder
from dovetail.runs.folder import ADAPTER, MODEL, RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_task, number_of_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

APART, PACKED, STOCK = "base and adapter", "merged, packed", "merged, stock"


def tuned(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The run's model before merging: its base with its adapter on it."""
    recipe = Recipe.load(folder / RECIPE)
    task = load_task(recipe.data)
    model, tokenizer = load(
        recipe.model, task_kind=task.kind, num_labels=number_of_labels(task, recipe.data.num_labels),
        dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code, seed=recipe.seed,
    )  # fmt: skip
    load_adapter(to_stock(model), folder / ADAPTER)
    return model, tokenizer


def forms(folder: Path, mergeable: bool) -> list[str]:
    """In which a run's model can be shipped; nothing is packed where nothing was pruned or quantized."""
    if not mergeable:
        return [APART]
    return [PACKED, STOCK] if (folder / run_folder.PACKED).is_dir() else [STOCK]


def shipped(folder: Path, form: str, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """The model as it is used for inference, its tokenizer, and the bytes of weights that are shipped for it.

    folder  a run directory
    form    APART, PACKED or STOCK
    kind    of its task
    """
    if form != APART:
        place = folder / (MODEL if form == STOCK else run_folder.PACKED)
        model, tokenizer = load(place, task_kind=kind)
        return model, tokenizer, _nbytes(place)
    model, tokenizer = tuned(folder)
    if groups(model):
        extract(model)
    with tempfile.TemporaryDirectory() as place:
        save_file(_parameters(model), Path(place) / "adapter.safetensors")
        base, _ = tuned(folder)
        _save_base(base, Path(place) / "base")
        return model, tokenizer, _nbytes(Path(place)) + _nbytes(Path(place) / "base")


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """What was trained, and must be there beside the base: links, and a head."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def _save_base(model: PreTrainedModel, place: Path) -> None:
    """Writes what the adapter sits on, packed; a base that no link has changed as it is."""
    record = applied(model)
    last = stages(record.chain)[-1].trained
    links = record.chain.links[: len(record.chain) - len(last)]
    for layer in chain_layers(model).values():
        layer.set_links([])
    record.chain = Chain(links) if links else record.chain
    merge(model, lossy=not links, packed=bool(links))
    if links:
        save_packed(model, place)
    else:
        model.save_pretrained(place)
