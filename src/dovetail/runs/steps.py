"""The steps of a run: what a recipe asks for, loaded and checked; the search over ranks; the merged model on disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.chains.assignment import assign
from dovetail.chains.check import check_merge
from dovetail.chains.layer.elastic import set_ranks
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.config import empty_model, grid_of, held_in, load_config, load_tokenizer
from dovetail.checkpoint.export import export
from dovetail.checkpoint.exportable import ADAPTER as ADAPTER_FORMAT
from dovetail.checkpoint.exportable import check_export
from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import logit_difference, to_stock
from dovetail.checkpoint.packed import save_packed
from dovetail.compression.apply import apply_on_meta
from dovetail.compression.calibration import calibration_batches, text_task
from dovetail.errors import CannotMerge, RecipeError
from dovetail.files import read_json, write_whole
from dovetail.runs.folder import RunFolder
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Checkpoint, Exported, Packed, Searched, finite
from dovetail.runs.search_settings import RankSettings
from dovetail.tasks.find import load_task, number_of_labels
from dovetail.tasks.labels import name_labels
from dovetail.tasks.lengths import length_limit
from dovetail.tasks.packing import check_packing
from dovetail.tasks.task import HEAD_KINDS, Task
from dovetail.tasks.vocabulary import vocabulary_of
from dovetail.training.identity import batches_identity, model_identity, records_identity, tokenizer_identity
from dovetail.training.optimizer import check_checkpointing
from dovetail.training.rank_search import search_ranks
from dovetail.training.train import training_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a model of images and texts, beside its tokenizer, which say how images become inputs."""

PROBE_ROWS, PROBE_LOGITS = 16, 1 << 26
"""Rows, and numbers of logits, that are compared before and after merging and after loading the saved checkpoint."""


def checked_chain(recipe: Recipe) -> CheckedChain:
    """Return the chain of a recipe, checked on what its model holds from earlier rounds. Raises ChainError."""
    return assign(recipe.chain, recipe.layers, held_in(recipe.model, grid_of(recipe.chain))).chain


def legal_chain(recipe: Recipe) -> CheckedChain:
    """Return the chain; raise ChainError or CannotMerge if it cannot run, or cannot be merged as the recipe asks."""
    if not isinstance(recipe.search, RankSettings | None):
        rule = "a run trains one chain; a search of this kind trains many"
        fix = "run it with `dovetail search`, or remove search"
        raise RecipeError("search", found=f"kind {recipe.search.kind}", rule=rule, fix=fix)
    links = checked_chain(recipe)
    if recipe.merge == "exact" or (recipe.merge == "lossy" and any(not link.mergeable for link in links)):
        check_merge(links)
    if recipe.names_exact and links.given_up:
        raise CannotMerge(
            f"{links} on {recipe.model}",
            found=f"a chain that gives up the {' and the '.join(links.given_up)} of the merged base",
            rule="merge: exact must keep the zeros and the quantization grid of the base",
            fix=f"{links.keeping}, or set merge: lossy",
        )
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
    if isinstance(recipe.search, RankSettings):
        first.split(recipe.search.split)
    return tasks


def check_layers(recipe: Recipe, task: Task, links: CheckedChain) -> None:
    """Raise a DovetailError where the chain or the training does not fit the model; only its config is read."""
    grid = grid_of(recipe.chain)
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code, grid=grid)
    labels = number_of_labels(task, recipe.data.num_labels)
    empty = empty_model(config, task_kind=task.kind, num_labels=labels, trust_remote_code=recipe.trust_remote_code)
    check_checkpointing(empty, recipe.train.gradient_checkpointing)
    apply_on_meta(empty, links, recipe.targets, layers=recipe.layers)
    if recipe.export:
        last = empty_model(
            config, task_kind=task.kind, num_labels=labels, dtype=recipe.dtype,
            trust_remote_code=recipe.trust_remote_code,
        )  # fmt: skip
        apply_on_meta(last, links, recipe.targets, len(links.stages) - 1, layers=recipe.layers)
        check_exports(recipe, last)


def check_exports(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise a DovetailError where an export at the end would be refused; the model is on the meta device."""
    for each in recipe.export:
        if (each.to == ADAPTER_FORMAT) != (recipe.merge == "none"):
            found = f"{each.to} with merge: {recipe.merge}"
            rule = "peft holds an adapter that was not merged; the other formats hold merged models"
            fix = f"set merge: none, or remove {each.to}" if each.to == ADAPTER_FORMAT else "set merge: exact"
            raise RecipeError("export", found=found, rule=rule, fix=fix)
        check_export(
            model, each.to, dtype=each.dtype, engine=each.engine, like=each.like,
            tokenizer=lambda: load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code),
        )  # fmt: skip


def load_base(recipe: Recipe, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a recipe, and its tokenizer. Raises TrainError where its rows cannot be packed.

    The model is made of stock modules, except where the chain keeps the grid of a file.
    """
    grid = grid_of(recipe.chain)
    model, tokenizer = load(
        recipe.model, task_kind=task.kind, num_labels=number_of_labels(task, recipe.data.num_labels),
        dtype=recipe.dtype, grid=grid, trust_remote_code=recipe.trust_remote_code, seed=recipe.seed,
    )  # fmt: skip
    if grid is None:
        to_stock(model)
    name_labels(model.config, task.labels)
    if recipe.train.packing:
        rows, _ = training_rows(model, tokenizer, task, "train", recipe.train, limit=3)
        check_packing(model, task.kind, rows)
    return model, tokenizer


def calibration(
    recipe: Recipe, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
    """Return the batches that pruners and quantizers are calibrated on."""
    config: Any = model.config
    if recipe.calibration.text is not None:
        source = text_task(recipe.calibration.text, encoder_decoder=config.is_encoder_decoder)
    else:
        source = replace(task, splits={"train": task.split(recipe.calibration.split)})
    return calibration_batches(
        source, tokenizer, samples=recipe.calibration.samples,
        seed=recipe.seed,
        max_length=length_limit(model, tokenizer, recipe.train.max_length, source.split("train")),
        decoder_start=config.decoder_start_token_id if config.is_encoder_decoder else None,
        vocabulary=vocabulary_of(model),
    )  # fmt: skip


def identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], batches: list[dict[str, Tensor]]
) -> dict[str, str]:
    """Return what a resumed run must share with its start beside the recipe: names of parts -> digests."""
    return {
        **_base_identity(model, tokenizer),
        **{data_of(task): records_identity(task.splits) for task in tasks},
        "calibration": batches_identity(batches),
    }


def base_now(recipe: Recipe, task: Task) -> dict[str, str]:
    """Load the base of a recipe, and return the parts of `identity` that do not depend on data. Raises LoadError."""
    return _base_identity(*load_base(recipe, task))


def _base_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {**model_identity(model), "tokenizer": tokenizer_identity(tokenizer)}


def data_of(task: Task) -> str:
    """Return the name of a task's records in the identity of a run."""
    return f"data of {task.name}"


def search(
    folder: RunFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, recipe: Recipe, *,
    progress: bool,
) -> Searched:  # fmt: skip
    """Search ranks as the recipe says, log each evaluation, and leave the model at the best ranks.

    A result of an earlier start of this run is read from its folder.
    """
    settings = recipe.search
    assert isinstance(settings, RankSettings)
    path = folder.training / "ranks.json"
    if path.exists():
        rule, fix = "the file must hold the ranks that an earlier start found", "pass --no-resume to start again"
        searched = read_json(path, Searched, rule=rule, fix=fix)
        set_ranks(model, searched.ranks)
        return searched
    found = search_ranks(
        model, tokenizer, task, batch_size=recipe.evaluate.batch_size, seed=recipe.seed, progress=progress,
        **settings.model_dump(exclude={"kind"}),
    )  # fmt: skip
    for turn, ranks, score in found.history:
        folder.log("search", turn=turn, ranks=ranks, **{found.metric: finite(score)})
    searched = Searched.model_validate(found)
    write_whole(path, searched.model_dump_json())
    return searched


def probe_of(batch: dict[str, Tensor], model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """Return what logits are compared on: the first rows of a batch (rows, tokens), at most PROBE_ROWS.

    Of a large vocabulary it is fewer rows, and shorter ones, so that their logits are at most PROBE_LOGITS numbers.
    """
    rows, tokens = PROBE_ROWS, max(tensor.shape[1] for tensor in batch.values())
    vocabulary = vocabulary_of(model)
    if kind not in HEAD_KINDS and vocabulary is not None:
        room = PROBE_LOGITS // vocabulary[1]
        tokens = min(tokens, max(1, room))
        rows = min(rows, max(1, room // tokens))
    return {name: tensor[:rows, :tokens] for name, tensor in batch.items()}


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


def write_exports(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> list[Exported]:
    """Write what the recipe exports: the merged model while it is packed, or the adapter of a model under its chain."""
    shutil.rmtree(directory, ignore_errors=True)
    written = []
    for each in recipe.export:
        report = export(
            model, each.to, directory / each.name, tokenizer=tokenizer, dtype=each.dtype, engine=each.engine,
            like=each.like,
        )  # fmt: skip
        written.append(
            Exported(
                name=each.name,
                format=report.format,
                dtype=report.dtype,
                decoder=report.decoder,
                claim=report.claim,
                weights=report.weights,
                differing=report.differing,
                nbytes=report.nbytes,
            )
        )
    return written


def write_stock(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: dict[str, Tensor]
) -> Checkpoint:
    """Write the standard checkpoint, and load it with stock transformers to compare the logits."""
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _copy_processor(model, directory)
    again = type(model).from_pretrained(directory, dtype="auto").eval()
    return Checkpoint(nbytes=stored_nbytes(directory), max_abs_logit_diff=_difference(again, model, probe))


def _copy_processor(model: PreTrainedModel, directory: Path) -> None:
    """Copy the files that say how images become inputs, where the model was loaded with such files beside it."""
    from huggingface_hub import try_to_load_from_cache

    source = model.name_or_path
    if not source:
        return
    for name in _PROCESSOR:
        local = Path(source) / name
        if local.is_file():
            shutil.copyfile(local, directory / name)
        elif source.count("/") == 1 and not Path(source).exists():
            cached = try_to_load_from_cache(source, name)
            if isinstance(cached, str):
                shutil.copyfile(cached, directory / name)


def _difference(one: PreTrainedModel, other: PreTrainedModel, probe: dict[str, Tensor]) -> float:
    """Return the largest difference of a logit, on the device of `other`."""
    moved: Any = torch.nn.Module.to(one, other.device)
    probe = {name: tensor.to(other.device) for name, tensor in probe.items()}
    with torch.inference_mode():
        return logit_difference(moved(**probe).logits, other(**probe).logits)


def stored_nbytes(directory: Path) -> int:
    """Return the bytes of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
