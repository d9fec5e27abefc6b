"""Training of a chain, stage after stage, or of a whole model.

The first stage of a chain is trained and merged into the base, then the next one, to the last (CLAM §3.1). A model
without a chain is fine-tuned as a whole, which is the baseline for comparisons.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dovetail import processes
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.keeping import keeping
from dovetail.chains.layer.linear import chain_layers
from dovetail.compression.apply import advance
from dovetail.compression.calibration import calibration_batches, checked
from dovetail.errors import TrainError
from dovetail.files import read_json, write_whole
from dovetail.progress import note
from dovetail.tasks.find import as_task
from dovetail.tasks.labels import as_model_labels, name_labels
from dovetail.tasks.lengths import length_limit
from dovetail.tasks.packing import PackedRows, check_packing
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Record, Task
from dovetail.tasks.tokens import Collator, Example, RowMaker, rendered
from dovetail.tasks.vocabulary import check_model, keep_end_ids, pad_id, vocabulary_of
from dovetail.training import checkpoints
from dovetail.training.identity import batches_identity, model_identity, records_identity, tokenizer_identity
from dovetail.training.optimizer import (
    HEADS,
    MODEL,
    autocast,
    cast_frozen,
    cast_heads,
    check_checkpointing,
    check_compiling,
    learning_rates,
    trained_parts,
)
from dovetail.training.settings import Training, TrainSettings, check_environment, check_processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dovetail.training.trainer import StageTrainer

REPORT = "report.json"

OnLog = Callable[[int, int, dict[str, Any]], None]
"""Stage from 1, step, and {"loss": ...} or {"validation": scores}."""


@dataclass(frozen=True)
class StageReport:
    """The result of training one stage.

    links                 the links that were trained, in order; empty for a whole model
    steps                 optimizer steps
    seconds               of training; of a resumed one, up to its checkpoint and from there on
    losses                (step, mean loss in nats per token) of every step; nats per record for a classification,
                          squared error for a regression
    evaluations           (step, scores and mean loss on the validation split), if `evaluate_every` is set
    trainable_parameters  number of trained parameters
    learning_rates        link, "heads" or "model" -> maximum learning rate
    peak_memory_nbytes    on a GPU, the maximum that was allocated; else, of tensors alive at once in the first steps
    auxiliary_losses      (step, what the model adds to the loss, such as the loss of MoE routers), where it does
    without_gradient      names of the trained parameters that got no gradient in the first 3 steps
    """

    links: list[str]
    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, dict[str, float]]]
    trainable_parameters: int
    learning_rates: dict[str, float]
    peak_memory_nbytes: int
    auxiliary_losses: list[tuple[int, float]] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrainReport:
    """The result of training.

    stages    in order
    seconds   in total, including merging, pruning and quantizing between the stages
    cut       number of training records whose prompt or text was cut to max_length or to the model's limit
    rendered  the first training row as text: stretches, and whether the loss counts them; [] for a task with labels
    """

    stages: list[StageReport]
    seconds: float
    cut: int = 0
    rendered: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def peak_memory_nbytes(self) -> int:
        """The maximum over the stages."""
        return max(stage.peak_memory_nbytes for stage in self.stages)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Task | str | Sequence[Record],
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    output_dir: Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    progress: bool = True,
    on_log: OnLog | None = None,
    logging_dir: Path | None = None,
    **settings: Any,
) -> TrainReport:
    """Train a model in place on the train split of a task, and leave it in evaluation mode.

    data          a task, the name of a playground task, or records (`dovetail.tasks`)
    settings      the fields of `TrainSettings`, as keyword arguments: epochs=3.0, max_steps, batch_size=32,
                  gradient_accumulation=1, lr_scale=1.0, learning_rate=1e-4, link_learning_rate,
                  head_learning_rate=1e-3, schedule="linear", warmup=0.0, weight_decay=0.0, optimizer="adamw",
                  max_grad_norm=1.0, max_length=512, packing=False, bf16=False, gradient_checkpointing=False,
                  keep_weights="auto", torch_compile=False, group_by_length=True, evaluate_every, evaluate_limit,
                  checkpoint_every=200, report_to="none", preset, seed=0. Two runs with the same seed give the same bits
    calibration   batches for pruning and quantizing in later stages; by default drawn from the train split
    output_dir    directory of checkpoints; nothing is written without one
    resume        continue a killed run, to the same bits; the model must be as it was at the start of that run
    stop_after    end after this step of the first stage, with a checkpoint in output_dir, from which the same call with
                  resume goes on
    progress      show a bar if training takes longer than a second
    on_log        called with (stage from 1, step, {"loss": ...} or {"validation": scores}) when they are known,
                  in the first process

    logging_dir   directory of TensorBoard's files, if report_to names it; by default ./tensorboard

    Several processes (torchrun, accelerate launch) train the same model on the same data together: each takes a part of
    every batch, which gives the losses of one process up to rounding, and scores a part of the batches. The first one
    writes.

    With bf16, adapters and heads are trained in float32; heads are rounded at the end. Later stages merge into the
    rounded base, which costs precision. A model without a chain keeps float32 parameters. The global random state is
    unchanged afterwards.

    Raises TrainError for settings out of range, if there is nothing to train, or if the loss is not finite; DataError
    for records that do not match the model.
    """
    # Imported here: the Trainer takes seconds to import.
    from dovetail.training.callbacks import StopAfter, Watch
    from dovetail.training.predict import worth_keeping
    from dovetail.training.trainer import StageTrainer, trackers, trainer_arguments

    asked = TrainSettings(**settings)
    check_environment(asked.report_to, asked.optimizer)
    check_processes(asked.batch_size)
    processes.start()
    output_dir, resume = _agreed(output_dir, resume)
    progress = progress and processes.first()
    check_checkpointing(model, asked.gradient_checkpointing)
    check_compiling(model, asked.torch_compile)
    started = time.perf_counter()
    config: Any = model.config
    if not chain_layers(model):
        vars(config).pop("dovetail", None)  # the fingerprint of a merged model is wrong once the model is trained
    data = as_task(data)
    name_labels(config, data.labels)
    data = as_model_labels(data, config)
    _check_same({**asked.model_dump(), "stop_after": stop_after}, data, tokenizer)
    rows, make = training_rows(model, tokenizer, data, "train", asked)
    cut = make.say(f"train {data.name}", shown=progress).get("cut", 0)
    shown = rendered(tokenizer, rows[0])
    if shown:
        text = "".join(f"⟦{part}⟧" if counted else part for part, counted in shown)
        note(f"train {data.name}: the first row; the loss counts the tokens between ⟦ and ⟧\n{text}", shown=progress)
    if asked.packing:
        check_packing(model, data.kind, rows)
        packed = PackedRows(rows, [len(row["input_ids"]) for row in rows], make.max_length)
        said = f"{len(rows)} rows are packed into {len(packed)} of at most {make.max_length} tokens"
        note(f"train {data.name}: {said}; batch_size counts these", shown=progress)
        rows = packed
    chained = bool(chain_layers(model))
    stages = 1 + applied(model).stages_left if chained else 1
    if stages == 1 and not trained_parts(model):
        raise TrainError(
            "train",
            found="no parameter to train",
            rule="the chain must have an adapter, or the model must not be frozen",
            fix="add an adapter: ... >> lora(r=16)",
        )
    if calibration is None and stages > 1:
        calibration = calibration_batches(
            data,
            tokenizer,
            seed=asked.seed,
            max_length=length_limit(model, tokenizer, asked.max_length, data.split("train")),
            decoder_start=config.decoder_start_token_id if config.is_encoder_decoder else None,
            vocabulary=vocabulary_of(model),
        )
    given = checked(() if calibration is None else calibration, model)
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in given]
    validate = None if asked.evaluate_every is None else _validation(model, tokenizer, data, asked)
    reports: list[StageReport] = []
    identity = {} if output_dir is None else _identity(model, tokenizer, data, batches, asked)
    kept = checkpoints.run_directory(output_dir, identity, resume)
    with kept as directory, _kept_use_cache(model), _kept_random_state():
        if asked.bf16 and chained:
            cast_frozen(model)
        for stage in range(stages):
            if stage:
                with autocast(model.device, asked.bf16):
                    advance(model, calibration=batches, seed=asked.seed, progress=progress)
            here = directory / f"stage-{stage + 1}"
            processes.share([*model.parameters(), *model.buffers()])
            processes.from_first(lambda here=here: checkpoints.check_base(model, here))
            if not trained_parts(model):
                reports.append(StageReport([], 0, 0.0, [], [], 0, {}, 0))
                continue
            if processes.from_first(lambda here=here: resume and (here / REPORT).exists()):
                checkpoints.load_trained(model, here / checkpoints.TRAINED)
                rule = "the report of a trained stage must be as Dovetail writes it"
                reports.append(read_json(here / REPORT, StageReport, rule=rule, limit=checkpoints.REPORT_NBYTES))
                continue
            title = f"train {data.name}" + (f", stage {stage + 1} of {stages}" if stages > 1 else "")
            watch = Watch(
                title, shown=progress, evaluate_every=asked.evaluate_every,
                evaluate=validate,
                log=None if on_log is None or not processes.first() else partial(on_log, stage + 1),
            )  # fmt: skip
            trainer = StageTrainer(
                model,
                trainer_arguments(model, asked, here, checkpoints=output_dir is not None),
                rows,
                Collator(pad_id(tokenizer, vocabulary_of(model))),
                asked,
                watch,
                seed=f"{asked.seed} stage {stage}",
                trackers=[
                    *trackers(asked.report_to, (logging_dir or Path("tensorboard")) / here.name),
                    *([] if stop_after is None else [StopAfter(stop_after)]),
                ],
            )
            latest = processes.from_first(lambda here=here: str(checkpoints.last_checkpoint(here) or "") * resume)
            with keeping(model, worth_keeping(model, trainer.widest_batch(), asked)):
                report = _train_stage(model, trainer, Path(latest) if latest else None)
            reports.append(report)
            if trainer.state.global_step < trainer.state.max_steps:
                break
            if output_dir is not None and processes.first():
                checkpoints.save_trained(model, here / checkpoints.TRAINED)
                write_whole(here / REPORT, json.dumps(asdict(report)))
                for path in here.glob("checkpoint-*"):
                    shutil.rmtree(path)
    if asked.bf16 and chained:
        cast_heads(model)
    if data.kind in ("generation", "choice", "chat"):  # an end token was trained
        keep_end_ids(model, tokenizer, make.turn_ends)
        make.keep_template()
    model.eval()
    return TrainReport(reports, time.perf_counter() - started, cut, shown)


def _agreed(output_dir: Path | None, resume: bool) -> tuple[Path | None, bool]:
    """Return the first process's folder, and whether it continues there."""
    said, resume = processes.from_first(lambda: (str(output_dir or ""), resume))
    return Path(said) if said else None, resume


def _check_same(settings: Mapping[str, Any], data: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TrainError where this process trains with other settings or on other records than the first one."""
    if processes.count() == 1:
        return
    records = records_identity({"train": data.split("train")})
    own = {**settings, "tokenizer": tokenizer_identity(tokenizer), "data": records}
    first = processes.from_first(lambda: own)
    differing = [name for name, value in json.loads(json.dumps(own)).items() if value != first[name]]
    if int(processes.total(torch.tensor(len(differing)))):  # in all, so that none waits for another one
        others = f"another {' and another '.join(differing)} than in the first process"
        raise TrainError(
            f"train, process {processes.rank()} of {processes.count()}",
            found=others if differing else "other settings or records in another process",
            rule="all processes train together: with the same settings, on the same records in the same order",
            fix="give all the same arguments, and draw records with a fixed seed",
        )


def training_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Task, split: str, settings: Training,
    limit: int | None = None,
) -> tuple[Sequence[Example], RowMaker]:  # fmt: skip
    """Return the tokenized records of a split, and their maker; DataError for records that do not match the model."""
    config: Any = model.config
    records = data.split(split)[:limit]
    check_model(data.name, data.kind, records, model)
    max_length = length_limit(model, tokenizer, settings.max_length, records)
    make = RowMaker(tokenizer, config.is_encoder_decoder, max_length, vocabulary_of(model))
    return make.rows(data.kind, records), make


def _identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Task, calibration: Sequence[Mapping[str, Tensor]],
    settings: TrainSettings,
) -> dict[str, Any]:  # fmt: skip
    """Return what a resumed run must share with the run that it continues."""
    return {
        **settings.fixed(),
        **model_identity(model),
        "task": data.kind,
        "data": records_identity({"train": data.split("train")}),
        "tokenizer": tokenizer_identity(tokenizer),
        "calibration": batches_identity(calibration),
    }


def _validation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Task, settings: TrainSettings
) -> Callable[[], dict[str, float]]:
    """Return a function that gives the scores and the mean loss of the model on the validation split."""
    from dovetail.training.trainer import mean_loss

    limit, collate = settings.evaluate_limit, Collator(pad_id(tokenizer, vocabulary_of(model)))
    rows, _ = training_rows(model, tokenizer, data, "validation", settings, limit)

    def validate() -> dict[str, float]:
        with autocast(model.device, settings.bf16):
            scores = evaluate(model, tokenizer, data, split="validation", limit=limit, progress=False, in_parts=True)[
                data.name
            ]
            return scores | {"loss": mean_loss(model, rows, collate, settings.batch_size)}

    return validate


def _train_stage(model: PreTrainedModel, trainer: StageTrainer, checkpoint: Path | None) -> StageReport:
    started, settings = time.perf_counter(), trainer.settings
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        trainer.watch.close()
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
    history: list[dict[str, Any]] = trainer.state.log_history
    parts = trained_parts(model)
    return StageReport(
        links=[part for part in parts if part not in (HEADS, MODEL)],
        steps=trainer.state.global_step,
        seconds=trainer.watch.seconds_before + time.perf_counter() - started,
        losses=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        evaluations=[(entry["step"], entry["validation"]) for entry in history if "validation" in entry],
        trainable_parameters=sum(p.numel() for parameters in parts.values() for p in parameters),
        learning_rates=learning_rates(model, settings),
        peak_memory_nbytes=trainer.watch.peak_memory_nbytes,
        auxiliary_losses=[(entry["step"], entry["auxiliary_loss"]) for entry in history if "auxiliary_loss" in entry],
        without_gradient=trainer.watch.without_gradient,
    )


@contextmanager
def _kept_use_cache(model: PreTrainedModel) -> Iterator[None]:
    """Restore config.use_cache, which the Trainer turns off and generation needs."""
    config: Any = model.config
    use_cache = config.to_dict().get("use_cache")
    try:
        yield
    finally:
        if use_cache is None:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = use_cache


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Restore the state of every random generator, which the Trainer seeds."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
