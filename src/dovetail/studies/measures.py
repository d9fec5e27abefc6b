"""What a finished run says of itself as one cell of a study: sizes, scores, parameters, memory, time, and its merge.

Everything is read from the folder of the run, except what a configuration alone determines (`Planned`): the predicted
peak of memory, and the counts behind the share of trained parameters and the bit reduction. It is computed once for
all seeds, and kept in the folder of the study.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from dovetail.chains.layer.applied import applied
from dovetail.checkpoint.config import empty_model, grid_of, load_config
from dovetail.checkpoint.footprint import count_weights, stored_nbytes
from dovetail.compression.apply import apply_on_meta
from dovetail.files import read_json, write_whole
from dovetail.runs.folder import ADAPTER
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report, ReportPart, Row, Score
from dovetail.runs.steps import checked_chain
from dovetail.studies.axes import Value
from dovetail.studies.matrix import Line, Run
from dovetail.studies.verify import has_codes
from dovetail.tasks.find import load_task, number_of_labels

TUNED = ("tuned", "searched")
HALF_BITS = 16
"""The bits of a dense weight in the bit reduction, whatever the dtype that a run used."""


class Planned(ReportPart):
    """What the configuration of a run determines, whatever its seed.

    weights             in the target layers
    parameters          of the model without adapters
    code_bits           stored bits per weight of the target layers under the last stage: codes, scales and zero points
                        without masks; 16 for a dense weight
    outside             trained parameters outside the target layers, such as a new head
    peak_memory_nbytes  predicted peak of training (`dovetail.plan`); None where nothing is trained, and for optimizers
                        other than AdamW
    """

    weights: int
    parameters: int
    code_bits: float
    outside: int
    peak_memory_nbytes: int | None


class Cell(ReportPart):
    """One run at the stage that its line shows. What was not measured, or does not apply to the stage, is None.

    row, point, task            of its line
    seed, run                   of the run; run is the name of its folder
    stage                       that the line shows
    score                       at that stage, in the metric of the task
    score_base, score_untuned   of the model before anything, and pruned and quantized but not tuned (qpeft_study, Table
                                4.2); score_untuned is None where the run tunes before it quantizes or prunes
    scores                      "TASK METRIC" -> score at that stage, of all tasks that the recipe scores
    nbytes_base, nbytes         of the whole model in memory, before anything and at that stage (Table 4.1)
    nbytes_untuned              of the whole model as `score_untuned` found it
    bits_per_weight             of the target layers, without adapters
    nonzero_fraction            of their base weights
    bit_reduction               1 - nonzero bits / (16 bits x weights of the target layers), adapters included (CLAM,
                                Table 2). A dense weight and a parameter of an adapter count 16 bits, a quantized weight
                                what its codes and scales take; masks do not count
    trained_parameters          numbers that training changed (Table 4.3)
    trained_share               of all parameters of the model and its adapters together, as peft prints it
    adapter_nbytes              of adapter.safetensors as written, with what makes its base again (Table 4.4)
    adapter_nbytes_16_bit       of the trained parameters at 16 bits each
    peak_memory_nbytes          of training, measured (Table 4.10)
    planned_memory_nbytes       of training, predicted from the configuration alone
    steps                       of training
    training_seconds            wall time of all its steps, each once where the training was interrupted
    step_seconds                mean wall time of a step, with the start of training (Table 4.11)
    seconds                     of the whole run, scoring included
    mergeable                   whether merging was verified as lossless; None where nothing was tuned or tried
    merge                       what merging kept and changed, in words
    diverged                    why the run counts as diverged (`divergence`); "" where it does not
    """

    row: str
    point: dict[str, Value]
    task: str
    seed: int
    run: str
    stage: str
    score: Score
    score_base: Score
    score_untuned: Score
    scores: dict[str, Score]
    nbytes_base: int
    nbytes_untuned: int | None
    nbytes: int
    bits_per_weight: float
    nonzero_fraction: float
    bit_reduction: float
    trained_parameters: int
    trained_share: float
    adapter_nbytes: int | None
    adapter_nbytes_16_bit: int
    peak_memory_nbytes: int | None
    planned_memory_nbytes: int | None
    steps: int
    training_seconds: float | None
    step_seconds: float | None
    seconds: float
    mergeable: bool | None
    merge: str
    diverged: str


def planned(recipe: Recipe, kept: Path) -> Planned:
    """Return what the configuration of a run determines, computed once for recipes that differ in their seed alone.

    kept   folder for the results
    """
    text = json.dumps(recipe.model_dump(mode="json", exclude={"seed", "output"}), sort_keys=True)
    path = kept / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return read_json(path, Planned, rule="the file must hold the counts that Dovetail kept", fix="remove it")
    found = _planned(recipe)
    kept.mkdir(parents=True, exist_ok=True)
    write_whole(path, found.model_dump_json(indent=2) + "\n")
    return found


def _planned(recipe: Recipe) -> Planned:
    task, train = load_task(recipe.data), recipe.train
    labels = number_of_labels(task, recipe.data.num_labels)
    made = plan(
        recipe.chain, recipe.model, layers=recipe.layers or None, targets=recipe.targets, task=task, num_labels=labels,
        dtype=recipe.dtype, batch_size=train.batch_size, max_length=train.max_length, packing=train.packing,
        bf16=train.bf16, gradient_checkpointing=train.gradient_checkpointing, keep_weights=train.keep_weights,
        trust_remote_code=recipe.trust_remote_code, memory=train.optimizer == "adamw",
    )  # fmt: skip
    config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code, grid=grid_of(recipe.chain))
    model = empty_model(
        config, task_kind=task.kind, num_labels=labels, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code
    )
    last = len(checked_chain(recipe).stages) - 1
    apply_on_meta(model, recipe.chain, recipe.targets, last, recipe.layers or None)
    layers = applied(model).layers.values()
    weights = {layer: layer.base.shape[0] * layer.base.shape[1] for layer in layers}
    code_bits = sum(
        HALF_BITS * weights[layer] if layer.base.quantized is None else 8 * stored_nbytes(layer.base.quantized)
        for layer in layers
    )
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Planned(
        weights=sum(weights.values()),
        parameters=count_weights(model),
        code_bits=code_bits / sum(weights.values()),
        outside=sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in inside),
        peak_memory_nbytes=made.predicted_peak_memory_nbytes or None,
    )


def cell(line: Line, one: Run, stage: str, folder: Path, mergeable: bool | None) -> Cell:
    """Return the measures of a finished run.

    line, stage   of the table, and the stage that it shows
    folder        of the study
    mergeable     whether the merge of the run was verified as lossless
    """
    place = folder / "runs" / one.slug
    report, counts = Report.load(place), planned(one.recipe, folder / "planned")
    base, here, untuned = report.stages[0], report.row(stage), untuned_row(report)
    past, tuned = _past(report, stage), _tuned(report, stage)
    adapter = here.footprint.trainable_parameters - counts.outside if stage.startswith(TUNED) else 0
    dense = HALF_BITS * counts.weights
    code_bits = counts.code_bits if has_codes(one.recipe, past) else HALF_BITS
    nonzero = here.footprint.nonzero_fraction * code_bits * counts.weights + HALF_BITS * adapter
    trained = report.footprint.trainable_parameters if tuned else 0
    steps = sum(len(each.losses) for each in report.training) if tuned else 0
    seconds = sum(each.seconds for each in report.training)
    file = place / ADAPTER / "adapter.safetensors"
    return Cell(
        row=line.row,
        point=line.point,
        task=line.task,
        seed=report.seed,
        run=one.slug,
        stage=stage,
        score=report.score(here),
        score_base=report.score(base),
        score_untuned=None if untuned is None else report.score(untuned),
        scores={f"{task} {metric}": value for task, found in here.metrics.items() for metric, value in found.items()},
        nbytes_base=base.footprint.nbytes,
        nbytes_untuned=None if untuned is None else untuned.footprint.nbytes,
        nbytes=here.footprint.nbytes,
        bits_per_weight=here.footprint.bits_per_weight,
        nonzero_fraction=here.footprint.nonzero_fraction,
        bit_reduction=1 - nonzero / dense,
        trained_parameters=trained,
        trained_share=trained / (counts.parameters + max(trained - counts.outside, 0)),
        adapter_nbytes=file.stat().st_size if tuned and file.exists() else None,
        adapter_nbytes_16_bit=2 * trained,
        peak_memory_nbytes=report.peak_memory_nbytes or None if tuned else None,
        planned_memory_nbytes=counts.peak_memory_nbytes if tuned else None,
        steps=steps,
        training_seconds=seconds if steps else None,
        step_seconds=seconds / steps if steps else None,
        seconds=report.seconds,
        mergeable=mergeable,
        merge=report.verdict if tuned else "",
        diverged=diverged_at(report, stage),
    )


def _past(report: Report, stage: str) -> list[str]:
    names = [row.name for row in report.stages]
    return names[: names.index(stage) + 1]


def _tuned(report: Report, stage: str) -> bool:
    return any(name.startswith(TUNED) for name in _past(report, stage))


def untuned_row(report: Report) -> Row | None:
    """Return the model that is pruned and quantized as far as the chain asks, and not tuned; None where none was."""
    names = [row.name for row in report.stages]
    first = next((at for at, name in enumerate(names) if name.startswith(TUNED)), len(names))
    later = any(name.startswith(("pruned", "quantized")) for name in names[first:])
    untuned = [row for row in report.stages[:first] if row.name != "merged"]
    return None if later else untuned[-1]


def diverged_at(report: Report, stage: str) -> str:
    """Return why a run diverged before this stage, or ""; a stage before tuning shows nothing of training."""
    return divergence(report) if _tuned(report, stage) else ""


def divergence(report: Report) -> str:
    """Return why a run diverged, or "".

    A stage diverged where a loss is not finite, or where the mean loss of the last tenth of its steps exceeds that of
    the first tenth by more than two standard errors of the difference, sqrt(var_first / n + var_last / n), n being the
    number of steps in a tenth, at least 5. A stage of fewer than 10 steps is judged by its finite losses alone.
    """
    for number, stage in enumerate(report.training, 1):
        losses = [loss for _, loss in stage.losses]
        bad = next((step for step, loss in stage.losses if not math.isfinite(loss)), None)
        if bad is not None:
            return f"the loss of stage {number} is not finite at step {bad}"
        n = max(5, len(losses) // 10)
        if len(losses) >= 2 * n and _rose(losses[:n], losses[-n:]):
            first, last = statistics.mean(losses[:n]), statistics.mean(losses[-n:])
            return f"the loss of stage {number} rose from {first:.3g} to {last:.3g} (means of {n} steps)"
    return ""


def _rose(first: Sequence[float], last: Sequence[float]) -> bool:
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / len(first))
    return not statistics.mean(last) <= statistics.mean(first) + 2 * error
