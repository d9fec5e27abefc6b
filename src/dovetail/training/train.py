"""Training: stage after stage, or the whole model.

A chain's first stage is trained and merged into the base, then the next one begins, until none is left (CLAM §3.1).
A model without a chain is fine-tuned whole: the baseline to compare with.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.layer.linear import chain_layers
from dovetail.compression.apply import advance, stages_left
from dovetail.compression.calibration import calibration_batches, checked
from dovetail.errors import TrainError
from dovetail.tasks.find import as_task
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Record, Task
from dovetail.tasks.tokens import Collator, Example, check_head, check_labels, encode, length_limit, pad_id
from dovetail.training import checkpoints
from dovetail.training.optimizer import (
    HEADS,
    MODEL,
    TrainSettings,
    cast_frozen,
    cast_heads,
    learning_rates,
    make_optimizer,
    trained_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dovetail.training.trainer import StageTrainer, Watch

_REPORT = "report.json"


@dataclass(frozen=True)
class StageReport:
    """What a stage did.

    links                 the links that it trained, in their order; none for a whole model
    steps                 optimizer steps
    seconds               of training, since it was last resumed
    losses                (step, mean loss in nats a token) of every step; squared error for a regression
    evaluations           (step, the validation split's scores) where asked for
    trainable_parameters  trained numbers
    learning_rates        link, or "heads", or "model" -> learning rate at its highest
    peak_memory_nbytes    on a GPU what was allocated at most; else the tensors alive at once in the first steps
    """

    links: list[str]
    steps: int
    seconds: float
    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, dict[str, float]]]
    trainable_parameters: int
    learning_rates: dict[str, float]
    peak_memory_nbytes: int


@dataclass(frozen=True)
class TrainReport:
    """The stages in order, and the seconds of all, merging, pruning and quantizing in between included."""

    stages: list[StageReport]
    seconds: float

    @property
    def peak_memory_nbytes(self) -> int:
        """The highest of the stages."""
        return max(stage.peak_memory_nbytes for stage in self.stages)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Task | str | Sequence[Record],
    *,
    epochs: float = 3.0,
    max_steps: int | None = None,
    batch_size: int = 32,
    gradient_accumulation: int = 1,
    lr_scale: float = 1.0,
    learning_rate: float = 1e-4,
    head_learning_rate: float = 1e-3,
    schedule: str = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    max_length: int = 512,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    group_by_length: bool = True,
    seed: int = 0,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    evaluate_every: int | None = None,
    evaluate_limit: int | None = None,
    output_dir: Path | None = None,
    checkpoint_every: int = 200,
    resume: bool = False,
    progress: bool = True,
) -> TrainReport:
    """Train a model in place on a task's train split, and leave it in evaluation mode.

    data                    a task, a playground task's name, or records (`dovetail.tasks`)
    epochs, max_steps       of each stage; max_steps goes before epochs
    batch_size              rows of a batch; a step is `gradient_accumulation` batches
    lr_scale                CLAM's c: multiplies every learning rate
    learning_rate           of a model without a chain; a link's own is `Adapter.learning_rate`
    head_learning_rate      of what a chain's model trains outside the chain: new heads
    schedule, warmup        linear or cosine to 0, or constant; fraction of steps that rises from 0 before
    weight_decay            on matrices, not on vectors (scales, biases, norms)
    max_length              tokens of a row, or fewer where the model's positions end earlier
    bf16                    the frozen base is rounded to bfloat16, for good; the forward pass runs under autocast;
                            adapters are kept in float32; heads too, and are rounded at the end. Later stages
                            merge into the rounded base, which costs them precision. A model without a chain keeps
                            float32 parameters
    gradient_checkpointing  activations of a block are computed again in the backward pass: less memory, slower
    group_by_length         batches of like length, in random order, the longest row in the second step
    seed                    of the order of rows, dropout and the next stages' links; two runs give the same bits. The
                            global random state is left as it was
    calibration             batches for the next stages' pruning and quantizing; by default drawn from the train split
    evaluate_every          steps after which the validation split (`evaluate_limit` records of it) is scored
    output_dir              where checkpoints go; without one nothing is written
    checkpoint_every        steps between checkpoints
    resume                  go on where a killed run stopped, to the same bits. The model comes as at its beginning
    progress                a bar for what takes longer than a second

    Raises TrainError for settings out of range, when nothing is to be trained, or when the loss isn't finite; DataError
    for records that don't suit the model.
    """
    # Imported here: the Trainer takes seconds to import.
    from dovetail.training.trainer import BatchOrder, StageTrainer, Watch, trainer_arguments

    settings = TrainSettings(
        epochs=epochs, max_steps=max_steps, batch_size=batch_size, gradient_accumulation=gradient_accumulation,
        lr_scale=lr_scale, learning_rate=learning_rate, head_learning_rate=head_learning_rate, schedule=schedule,
        warmup=warmup, weight_decay=weight_decay, max_grad_norm=max_grad_norm, max_length=max_length, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, group_by_length=group_by_length, seed=seed,
    )  # fmt: skip
    started = time.perf_counter()
    config: Any = model.config
    if not chain_layers(model):
        vars(config).pop("dovetail", None)  # a merged model that is trained on is no longer what its config says
    data = as_task(data)
    records = data.split("train")
    check_head(data.name, data.kind, model)
    if data.kind in ("classification", "regression"):
        check_labels(data.name, data.kind, records, model)
    max_length = length_limit(model, tokenizer, max_length)
    rows = encode(data.kind, records, tokenizer, encoder_decoder=config.is_encoder_decoder, max_length=max_length)
    chained = bool(chain_layers(model))
    stages = 1 + stages_left(model) if chained else 1
    if stages == 1 and not trained_parts(model):
        raise TrainError(
            "train",
            found="no parameter to be trained",
            rule="a chain trains an adapter, or the model isn't frozen",
            fix="add an adapter: ... >> lora(r=16)",
        )
    if calibration is None and stages > 1:
        calibration = calibration_batches(
            data,
            tokenizer,
            seed=seed,
            max_length=max_length,
            decoder_start=config.decoder_start_token_id if config.is_encoder_decoder else None,
        )
    given = checked(() if calibration is None else calibration)
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in given]

    def validate() -> dict[str, float]:
        with _autocast(model, bf16):
            scores = evaluate(model, tokenizer, data, split="validation", limit=evaluate_limit, progress=False)
        return scores[data.name]

    reports: list[StageReport] = []
    kept = checkpoints.run_directory(output_dir, asdict(settings), resume)
    with kept as directory, _kept_use_cache(model), _kept_random_state():
        if bf16 and chained:
            cast_frozen(model)
        for stage in range(stages):
            if stage:
                with _autocast(model, bf16):
                    advance(model, calibration=batches, seed=seed, progress=progress)
            title = f"train {data.name}" + (f", stage {stage + 1} of {stages}" if stages > 1 else "")
            watch = Watch(title, shown=progress, evaluate_every=evaluate_every, evaluate=validate)
            here = directory / f"stage-{stage + 1}"
            checkpoints.check_base(model, here)
            if not trained_parts(model):
                reports.append(StageReport([], 0, 0.0, [], [], 0, {}, 0))
            elif resume and (here / _REPORT).exists():
                checkpoints.load_trained(model, here / checkpoints.TRAINED)
                reports.append(_read_report(here / _REPORT))
            else:
                arguments = trainer_arguments(model, settings, here, None if output_dir is None else checkpoint_every)
                order = BatchOrder(
                    [_tokens(row, config.is_encoder_decoder) for row in rows],
                    batch_size=batch_size,
                    step_rows=batch_size * gradient_accumulation,
                    grouped=group_by_length,
                    seed=f"{seed} stage {stage}",
                )
                trainer = StageTrainer(
                    model,
                    arguments,
                    rows,
                    Collator(pad_id(tokenizer)),
                    order=order,
                    bf16=bf16,
                    callback=watch,
                    make_optimizer=lambda model: make_optimizer(model, settings),
                )
                last = checkpoints.last_checkpoint(here) if resume else None
                report = _train_stage(model, trainer, settings, watch, last)
                reports.append(report)
                if output_dir is not None:
                    checkpoints.save_trained(model, here / checkpoints.TRAINED)
                    checkpoints.write_json(here / _REPORT, asdict(report))
                    for path in here.glob("checkpoint-*"):
                        shutil.rmtree(path)
    if bf16 and chained:
        cast_heads(model)
    model.eval()
    return TrainReport(reports, time.perf_counter() - started)


def _train_stage(
    model: PreTrainedModel, trainer: StageTrainer, settings: TrainSettings, watch: Watch, checkpoint: Path | None
) -> StageReport:
    started = time.perf_counter()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        watch.close()
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
    history: list[dict[str, Any]] = trainer.state.log_history
    parts = trained_parts(model)
    return StageReport(
        links=[part for part in parts if part not in (HEADS, MODEL)],
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - started,
        losses=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        evaluations=[(entry["step"], entry["validation"]) for entry in history if "validation" in entry],
        trainable_parameters=sum(p.numel() for parameters in parts.values() for p in parameters),
        learning_rates=learning_rates(model, settings),
        peak_memory_nbytes=watch.peak_memory_nbytes,
    )


@contextmanager
def _kept_use_cache(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer turns config.use_cache off, and generating needs it."""
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
    """The Trainer seeds every generator; afterwards they are as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _autocast(model: PreTrainedModel, bf16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()


def _tokens(row: Example, encoder_decoder: bool) -> int:
    labels = row["labels"]
    return len(row["input_ids"]) + (len(labels) if encoder_decoder and isinstance(labels, list) else 0)


def _read_report(path: Path) -> StageReport:
    fields = json.loads(path.read_text())
    for name in ("losses", "evaluations"):
        fields[name] = [tuple(entry) for entry in fields[name]]
    return StageReport(**fields)
