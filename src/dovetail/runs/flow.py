"""The whole library in one function: load, evaluate, prune, quantize, train, merge, save, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dovetail import processes
from dovetail.chains.check import CheckedChain
from dovetail.chains.layer.applied import applied
from dovetail.chains.link import Link
from dovetail.checkpoint.adapter import save_adapter
from dovetail.checkpoint.config import auto_class, best_device
from dovetail.checkpoint.footprint import footprint
from dovetail.checkpoint.merge import merge, to_stock
from dovetail.compression.apply import apply
from dovetail.errors import RecipeError
from dovetail.files import check_folder, write_whole
from dovetail.progress import Bar
from dovetail.runs import steps
from dovetail.runs.folder import ADAPTER, EXPORT, MODEL, PACKED, PAGE, TENSORBOARD, choose_output, run_folder
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.card import CARD, card
from dovetail.runs.report.page import page
from dovetail.runs.report.record import Losses, Merge, Report, Row, TaskInfo, environment
from dovetail.runs.report.summary import verdict
from dovetail.runs.rows import Rows, Scores, row_names
from dovetail.runs.shared import SharedBases, SharedScores, scoring_identity
from dovetail.tasks.task import HEAD_KINDS
from dovetail.training.optimizer import trained_parts
from dovetail.training.settings import check_environment, check_processes
from dovetail.training.train import train


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    on_row: Callable[[Row], None] | None = None,
    shared: Path | None = None,
) -> Report:
    """Run a recipe, and write a run directory (`docs/recipes.md`).

    recipe    a Recipe, the path of one, or a mapping with its keys
    output    the run directory; by default the recipe's, else runs/NAME, with a number appended if that exists
    resume    continue a killed run with the same recipe and output
    progress  show bars for long work
    on_row    called with each row of the report as it is finished
    shared    folder of quantized layers and of scores of untuned models, which runs with this folder compute once

    Raises a DovetailError for bad input, as early as possible; nothing is left behind then. A chain that cannot be
    merged as the recipe asks is refused before anything is loaded.
    """
    started = time.perf_counter()
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    recipe = Recipe.read(recipe)
    links = steps.legal_chain(recipe)
    check_environment(recipe.train.report_to, recipe.train.optimizer)
    check_processes(recipe.train.batch_size)
    if recipe.search is not None:
        processes.refuse("run with search", RecipeError)
    processes.start()
    progress = progress and processes.first()
    output = Path(processes.from_first(lambda: str(choose_output(output or recipe.output, name))))
    if processes.first():
        check_folder(output)
    tasks = steps.load_tasks(recipe)
    task = tasks[0]
    steps.check_layers(recipe, task, links)
    with Bar(f"load {recipe.model}", shown=progress):
        model, tokenizer = steps.load_base(recipe, task)
    torch.nn.Module.to(model, best_device())
    model.requires_grad_(False)  # the base is frozen; a new head is trained once the chain is applied
    batches = steps.calibration(recipe, task, model, tokenizer)
    scores = Scores(model, tokenizer, tasks, recipe, progress=progress)
    if not processes.first():
        return _follow(recipe, scores, links, batches)
    probe = steps.probe_of(batches[0], model, task.kind)
    identity = steps.identity(model, tokenizer, tasks, batches)
    names = iter(row_names(links, head=task.kind in HEAD_KINDS))
    trained, searched, merged, checkpoint, packed = None, None, None, None, None

    with Bar(f"run {recipe.chain}", shown=progress), run_folder(output, recipe, resume, identity) as folder:
        rows = Rows(
            folder, scores, on_row=on_row,
            shared=None if shared is None else SharedScores(shared, scoring_identity(identity, recipe, model)),
        )  # fmt: skip
        rows.add("base")
        with SharedBases(shared, recipe, identity, model) as layers:

            def add_row(link: Link) -> None:
                layers.made(model)
                rows.add(next(names))

            apply(
                model, links, layers=recipe.layers, targets=recipe.targets, calibration=batches,
                calibration_inputs=recipe.calibration.inputs, seed=recipe.seed, progress=progress, on_link=add_row,
                bases=layers.bases,
            )  # fmt: skip
        if applied(model).stages_left or trained_parts(model):
            trained = train(
                model, tokenizer, task, seed=recipe.seed, calibration=batches, output_dir=folder.training,
                resume=folder.training.exists(), progress=progress, on_log=folder.log_step,
                logging_dir=folder.path / TENSORBOARD, **recipe.train.model_dump(),
            )  # fmt: skip
            folder.log_training(trained.stages)
        if (last := next(names, None)) is not None:
            rows.add(last)
        if recipe.search is not None:
            searched = steps.search(folder, model, tokenizer, task, recipe, progress=progress)
            rows.add("searched")
        trainable = footprint(model).trainable_parameters
        save_adapter(model, folder.path / ADAPTER)
        if recipe.merge != "none":
            with Bar("merge", shown=progress):
                merged = merge(model, lossy=recipe.merge == "lossy", probe=probe, packed=True)
        exports = steps.write_exports(folder.path / EXPORT, model, tokenizer, recipe)
        if merged is not None:
            if links.kept or any(stage.applied for stage in links.stages):
                packed = steps.write_packed(folder.path / PACKED, model, tokenizer, probe, task.kind)
            to_stock(model)
            rows.add("merged", merged.footprint)
            checkpoint = steps.write_stock(folder.path / MODEL, model, tokenizer, probe)
        report = Report(
            task=TaskInfo.of(task, scores.split, recipe.evaluate.limit),
            chain=recipe.chain,
            layers=recipe.layers,
            model=recipe.model,
            seed=recipe.seed,
            stages=rows.done,
            merge=None if merged is None else Merge.model_validate(merged),
            verdict=verdict(merged, lossy=recipe.merge == "lossy", quantized=links.quantizer is not None),
            footprint=replace(rows.done[-1].footprint, trainable_parameters=trainable),
            peak_memory_nbytes=0 if trained is None else trained.peak_memory_nbytes,
            seconds=time.perf_counter() - started + rows.seconds_before,
            training=[Losses.of(stage, task.metric) for stage in (trained.stages if trained else [])],
            checkpoint=checkpoint,
            packed=packed,
            exports=exports,
            environment=environment(model),
            identity=identity,
            search=searched,
            rendered=[] if trained is None else trained.rendered,
            examples=rows.examples(),
        )
        report.save(folder.path)
        write_whole(folder.path / PAGE, page(report, recipe))
        if checkpoint is not None:
            auto = auto_class(model.config, task.kind).__name__
            write_whole(folder.path / MODEL / CARD, card(report, recipe, auto=auto))
        folder.log("done", seconds=report.seconds)
    processes.from_first(lambda: report.model_dump(mode="json"))
    return report


def _follow(recipe: Recipe, scores: Scores, links: CheckedChain, batches: Sequence[dict[str, Tensor]]) -> Report:
    """Take part in the training and the scores of a run whose first process writes; return its report."""
    model, task = scores.model, scores.tasks[0]
    names = iter(row_names(links, head=task.kind in HEAD_KINDS))
    scores.follow()  # the base

    def follow_row(_: Link) -> None:
        next(names)
        scores.follow()

    apply(
        model, links, layers=recipe.layers, targets=recipe.targets, calibration=batches,
        calibration_inputs=recipe.calibration.inputs, seed=recipe.seed, progress=False, on_link=follow_row,
    )  # fmt: skip
    if applied(model).stages_left or trained_parts(model):
        train(
            model, scores.tokenizer, task, seed=recipe.seed, calibration=batches, progress=False,
            **recipe.train.model_dump(),
        )  # fmt: skip
    if next(names, None) is not None:
        scores.follow()
    if recipe.merge != "none":
        merge(model, lossy=recipe.merge == "lossy", packed=True)
        to_stock(model)
        scores.follow()
    return Report.model_validate(processes.from_first(dict))
