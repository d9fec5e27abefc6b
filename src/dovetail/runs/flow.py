"""The whole library in one function: load, evaluate, prune, quantize, train, merge, save, report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.chains.check import check, check_merge
from dovetail.chains.link import Chain
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.adapter import save_adapter
from dovetail.checkpoint.footprint import Footprint, footprint
from dovetail.checkpoint.load import HEAD_KINDS, best_device, empty_model, load, load_config
from dovetail.checkpoint.merge import MergeReport, merge, to_stock
from dovetail.compression.apply import apply, stages_left
from dovetail.compression.calibration import calibration_batches, text_task
from dovetail.errors import RecipeError
from dovetail.files import write_whole
from dovetail.runs.export import deliver_packed, deliver_stock
from dovetail.runs.folder import (
    ADAPTER,
    MODEL,
    PACKED,
    PAGE,
    RunFolder,
    check_free,
    choose_output,
    run_folder,
)
from dovetail.runs.plan import apply_on_meta
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.page import page
from dovetail.runs.report.record import Losses, Merge, Report, Row, TaskInfo
from dovetail.runs.report.summary import verdict
from dovetail.runs.search import search_in_run
from dovetail.tasks.find import load_task, number_of_labels
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import length_limit
from dovetail.training.optimizer import trained_parts
from dovetail.training.train import TrainReport, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_ROWS = 16
"""Rows on which the logits before and after merging, and after loading the saved checkpoint, are compared."""


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
) -> Report:
    """Does what a recipe says, and writes a run directory (`docs/recipes.md`).

    recipe    a Recipe, the path of one, or a mapping with its keys
    output    the run directory; else the recipe's, else runs/NAME, with a number behind where that is taken
    resume    go on where an earlier start with the same recipe and output was killed
    progress  bars for what takes long
    on_row    called with each row of the report as it is finished

    Raises a DovetailError for bad input, as early as it shows; then nothing is left behind. A chain that can't be
    merged as the recipe asks is refused before anything is loaded.
    """
    started = time.perf_counter()
    recipe, name = _recipe(recipe)
    links = legal_chain(recipe)
    output = choose_output(output or recipe.output, name)
    check_free(output)
    task = load_task(recipe.data)
    tasks = [task, *map(load_task, recipe.evaluate.tasks)]
    _check_tasks(tasks, recipe)
    if recipe.search is not None:
        task.split(recipe.search.split)  # a search without records is refused before anything is loaded
    labels = number_of_labels(task, recipe.data.num_labels)
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    apply_on_meta(empty_model(config, task_kind=task.kind, num_labels=labels), links, recipe.targets)
    model, tokenizer = load(
        recipe.model, task_kind=task.kind, num_labels=labels, dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code, seed=recipe.seed,
    )  # fmt: skip
    torch.nn.Module.to(to_stock(model), best_device())
    model.requires_grad_(False)  # nothing of the base is trained; a new head is, once the chain is on
    batches = _calibration(recipe, task, model, tokenizer)
    names = iter(row_names(links, head=task.kind in HEAD_KINDS))

    with run_folder(output, recipe, resume) as folder:
        rows = _Rows(folder, model, tokenizer, tasks, recipe, progress, on_row)
        rows.add("base")
        apply(
            model, links, targets=recipe.targets, calibration=batches,
            calibration_inputs=recipe.calibration.inputs, seed=recipe.seed, progress=progress,
            on_link=lambda link: rows.add(next(names)),
        )  # fmt: skip
        trained: TrainReport | None = None
        if stages_left(model) or trained_parts(model):
            settings = recipe.train.model_dump()
            trained = train(
                model, tokenizer, task, seed=recipe.seed, calibration=batches, output_dir=folder.training,
                resume=folder.training.exists(), progress=progress, **settings,
            )  # fmt: skip
            _log_losses(folder, trained)
        if (last := next(names, None)) is not None:
            rows.add(last)
        searched = None
        if recipe.search is not None:
            searched = search_in_run(folder, model, tokenizer, task, recipe, progress=progress)
            rows.add("searched")
        trainable = footprint(model).trainable_parameters
        save_adapter(model, folder.path / ADAPTER)
        merged, checkpoint, packed = None, None, None
        if recipe.merge != "none":
            merged = merge(model, lossy=recipe.merge == "lossy", probe=_probe(batches), packed=True)
            if any(stage.applied for stage in links.stages):
                packed = deliver_packed(folder.path / PACKED, model, tokenizer, _probe(batches), task.kind)
            to_stock(model)
            rows.add("merged", merged.footprint)
            checkpoint = deliver_stock(folder.path / MODEL, model, tokenizer, _probe(batches))
        report = Report(
            task=TaskInfo.of(task, rows.split, recipe.evaluate.limit),
            chain=recipe.chain,
            model=recipe.model,
            seed=recipe.seed,
            stages=rows.done,
            merge=None if merged is None else Merge.of(merged),
            verdict=_verdict(merged, recipe, links),
            footprint=replace(rows.done[-1].footprint, trainable_parameters=trainable),
            peak_memory_nbytes=0 if trained is None else trained.peak_memory_nbytes,
            seconds=time.perf_counter() - started + rows.seconds_before,
            training=_losses(trained),
            checkpoint=checkpoint,
            packed=packed,
            environment=environment(model),
            search=searched,
        )
        report.save(folder.path)
        write_whole(folder.path / PAGE, page(report, recipe))
        folder.log("done", seconds=report.seconds)
    return report


def row_names(links: Chain, *, head: bool = False) -> list[str]:
    """The names of the rows between "base" and "merged", in order: pruned, quantized, tuned.

    Of several rows of one kind the last has the plain name, the others say their stage: "tuned, stage 1".

    head   whether a new task head is trained beside the chain, so that the last stage is tuned in any case
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


class _Rows:
    """Makes the rows of the report; those that an earlier start finished aren't computed again."""

    def __init__(
        self, folder: RunFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Task],
        recipe: Recipe, progress: bool, on_row: Callable[[Row], None] | None,
    ) -> None:  # fmt: skip
        self.folder, self.model, self.tokenizer, self.tasks = folder, model, tokenizer, tasks
        self.settings, self.progress, self.on_row = recipe.evaluate, progress, on_row
        self.split = recipe.evaluate.split or "test"
        self.done: list[Row] = []
        self.seconds_before = 0.0
        self._started = time.perf_counter()

    def add(self, name: str, taken: Footprint | None = None) -> None:
        """Scores the model as it stands; `taken` is its footprint where it isn't what `footprint` counts now."""
        row = self.folder.rows.get(name)
        if row is None:
            scores: dict[str, Any] = dict(evaluate(
                self.model, self.tokenizer, self.tasks, split=self.split, limit=self.settings.limit,
                batch_size=self.settings.batch_size, progress=self.progress,
            ))  # fmt: skip
            for task in self.tasks:  # the figure that stands for the task comes first
                scores[task.name] = {task.metric: scores[task.name][task.metric], **scores[task.name]}
            seconds = time.perf_counter() - self._started
            row = Row(name=name, metrics=scores, footprint=taken or footprint(self.model), seconds=seconds)
            self.folder.add(row)
        else:
            self.seconds_before += row.seconds
        self.done.append(row)
        if self.on_row is not None:
            self.on_row(row)
        self._started = time.perf_counter()


def _recipe(recipe: Recipe | str | Path | Mapping[str, Any]) -> tuple[Recipe, str]:
    if isinstance(recipe, str | Path):
        return Recipe.load(recipe), Path(recipe).stem
    return (recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)), "run"


def legal_chain(recipe: Recipe) -> CheckedChain:
    """The chain, once it is known that it can run and be merged as asked."""
    links = check(recipe.chain)
    if recipe.merge == "exact" or (recipe.merge == "lossy" and any(not link.mergeable for link in links)):
        check_merge(links)
    if recipe.search is not None and not any(link.ranks for link in links.stages[-1].adapters):
        raise RecipeError(
            "search", found=f"chain {links}", rule="a search needs elastic ranks in the chain's last stage",
            fix="lora(r=16, elastic=[16, 12, 8]), or no search",
        )  # fmt: skip
    return links


def _check_tasks(tasks: list[Task], recipe: Recipe) -> None:
    first, *others = tasks
    for task in others:
        if task.kind != first.kind and (task.kind in HEAD_KINDS or first.kind in HEAD_KINDS):
            raise RecipeError(
                f"evaluate.tasks: {task.name}", found=f"a {task.kind} task beside {first.name}, a {first.kind} task",
                rule="all tasks are answered by one model: with a head, or without", fix="leave it out",
            )  # fmt: skip
    for task in tasks:
        task.split(recipe.evaluate.split or "test")
    first.split("train")


def _calibration(
    recipe: Recipe, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Tensor]]:
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


def _probe(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor[:PROBE_ROWS] for name, tensor in batches[0].items()}


def _verdict(merged: MergeReport | None, recipe: Recipe, links: CheckedChain) -> str:
    quantized = links.quantizer is not None
    return verdict(merged, lossy=recipe.merge == "lossy", quantized=quantized)


def _losses(trained: TrainReport | None) -> list[Losses]:
    return [
        Losses(links=s.links, losses=s.losses, learning_rates=s.learning_rates, seconds=s.seconds)
        for s in (trained.stages if trained else [])
    ]


def _log_losses(folder: RunFolder, trained: TrainReport) -> None:
    for number, stage in enumerate(trained.stages, 1):
        for step, loss in stage.losses:
            folder.log("loss", stage=number, step=step, loss=loss)


def environment(model: PreTrainedModel) -> dict[str, str]:
    """What a reader needs to know to repeat a run: versions, processor, threads."""
    packages = {name: version(name) for name in ("dovetail", "torch", "transformers")}
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return packages | {
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({name})",
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
