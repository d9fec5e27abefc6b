"""One stage of training on the Hugging Face Trainer.

Differences from the stock Trainer: each link has its own learning rate; the loss is the mean over the counted tokens of
the whole step, for every model and any number of accumulated batches; batches of similar length come in random order,
the longest row early; elastic adapters run at ranks drawn for each step; a checkpoint holds only the trained
parameters, as safetensors, and is valid once it is complete; a loss that is not finite ends the run; the peak of memory
is measured over the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from dovetail import processes
from dovetail.chains.layer.elastic import groups, use_reference
from dovetail.errors import DovetailError, TrainError
from dovetail.tasks.finite import check_finite, not_finite
from dovetail.tasks.lengths import in_evaluation
from dovetail.tasks.tokens import IGNORED, Collator, Example
from dovetail.training.callbacks import BeforeSteps, Forgetting, RankDraws, Watch
from dovetail.training.checkpoints import KEPT, TRAINED, load_trained, mark_complete, save_trained
from dovetail.training.optimizer import autocast, make_optimizer
from dovetail.training.settings import TrainSettings

_BATCHES_SORTED_TOGETHER = 50
_COUNTED = "counted labels"
"""Key of a batch, with several processes: the number of its labels that the loss counts."""


class BatchOrder(Sampler[int]):
    """The order of rows, which differs between epochs and depends on the seed alone.

    lengths      tokens of each row
    batch_size   rows of a batch, which are consecutive
    step_rows    rows of a step, over all its batches
    grouped      put rows of similar length into a batch. The longest row is in the second step, when the optimizer
                 has its state: a run that does not fit into memory fails at once, and the first steps show the peak
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, step_rows: int, grouped: bool, seed: str) -> None:
        self.lengths, self.batch_size, self.step_rows = lengths, batch_size, step_rows
        self.grouped, self.seed = grouped, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = Random(f"{self.seed} epoch {self.epoch}")
        order = random.sample(range(len(self.lengths)), len(self.lengths))
        if not self.grouped:
            return iter(order)
        together = _BATCHES_SORTED_TOGETHER * self.batch_size
        batches: list[list[int]] = []
        for at in range(0, len(order), together):
            rows = sorted(order[at : at + together], key=lambda row: -self.lengths[row])
            batches += [rows[b : b + self.batch_size] for b in range(0, len(rows), self.batch_size)]
        last = batches.pop()  # it may be short, and must then remain the last
        random.shuffle(batches)
        order = [row for batch in [*batches, last] for row in batch]
        longest = max(range(len(order)), key=lambda place: self.lengths[order[place]])
        early = self.step_rows if self.step_rows < len(order) else 0
        order[early], order[longest] = order[longest], order[early]
        return iter(order)


class RankBatches(Sampler[list[int]]):
    """This process's part of every batch: every count-th row of it, from its own number on.

    A process without a row, where the last batch is short, gets the batch's first row as -1 - row: it is not counted.
    """

    def __init__(self, order: BatchOrder) -> None:
        self.order = order
        self.batch_sampler = self  # the Trainer looks for `set_epoch` there

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.order.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        for at in range(0, len(rows), self.order.batch_size):
            batch = rows[at : at + self.order.batch_size]
            yield batch[processes.rank() :: processes.count()] or [-1 - batch[0]]


class _Places(Sequence[int]):
    """Places of rows, by themselves; what a loader passes to `StageTrainer.collate`."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        return place


class StageTrainer(Trainer):
    """The Trainer of one stage.

    watch     sees every step
    seed      of the order of rows and of the ranks of elastic adapters
    trackers  further callbacks, which see what is logged
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Sequence[Example],
        collator: Collator,
        settings: TrainSettings,
        watch: Watch,
        *,
        seed: str,
        trackers: Sequence[TrainerCallback],
    ) -> None:
        self.elastic = groups(model)
        draws = [RankDraws(self.elastic, seed)] if self.elastic else []
        self.between = BeforeSteps(model)
        # Draws are first, so that the reference ranks are restored at the end of a step before the watch evaluates.
        callbacks = [*draws, self.between, Forgetting(), watch, *trackers]
        super().__init__(model, arguments, collator, rows, callbacks=callbacks)  # pyright: ignore[reportArgumentType]
        self.remove_callback(PrinterCallback)
        watch.handler = self.callback_handler
        self.settings, self.watch = settings, watch
        self._auxiliary = 0.0
        self._looked = False
        self._compiled: Callable[..., Any] | None = None
        config: Any = model.config
        self.order = BatchOrder(
            [_tokens(row, config.is_encoder_decoder) for row in rows],
            batch_size=settings.batch_size,
            step_rows=settings.batch_size * settings.gradient_accumulation,
            grouped=settings.group_by_length,
            seed=seed,
        )
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the labels; `compute_loss` scales by them

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and restore the reference ranks of elastic adapters, also after an error."""
        model: Any = self.model
        # DistributedDataParallel sends the rest with every forward pass; all processes have it already.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        model._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in model.named_buffers()]
        try:
            return super().train(*args, **kwargs)
        finally:
            use_reference(self.elastic)
            del model._ddp_params_and_buffers_to_ignore

    def widest_batch(self) -> dict[str, Tensor]:
        """Return the batch that needs most memory: full, with the longest rows."""
        lengths, rows = self.order.lengths, cast("Sequence[Example]", self.train_dataset)
        widest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)[: self.settings.batch_size]
        return cast("Collator", self.data_collator)([rows[row] for row in widest])

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.settings)  # pyright: ignore[reportArgumentType]
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the Trainer, or with several processes one of this process's rows."""
        if processes.count() == 1:
            return super().get_train_dataloader()
        return DataLoader(
            cast("Any", _Places(len(self.order))), batch_sampler=RankBatches(self.order), collate_fn=self._collate
        )

    def _collate(self, places: Sequence[int]) -> dict[str, Any]:
        rows, collate = cast("Sequence[Example]", self.train_dataset), cast("Collator", self.data_collator)
        absent = places[0] < 0
        batch = collate([rows[-1 - place] if absent else rows[place] for place in places])
        return {**batch, _COUNTED: torch.zeros((), dtype=torch.int64) if absent else counted(batch["labels"])}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.order

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the Trainer would iterate over all parameters at every step."""
        return 0

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        return autocast(self.args.device, self.settings.bf16)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the share of the batch in the mean loss over all labels of the step.

        With several processes, multiplied by their number: gradients and losses become the mean over the processes.
        """
        number = inputs.pop(_COUNTED, None)
        if not self._looked:
            self._looked = True
            check_finite(
                f"{self.watch.title}, step {self.state.global_step + 1}",
                self._own,
                partial(_forward, self._own, inputs),
                error=TrainError,
            )
        outputs = self._runs(model)(**inputs)
        loss = outputs.loss
        if not bool(loss.isfinite()):
            raise self._not_finite(self._own, inputs)
        share = 1.0
        if number is not None:
            assert num_items_in_batch is not None
            share = number * processes.count() / num_items_in_batch
            loss = loss * share
        elif self.args.gradient_accumulation_steps > 1:
            assert num_items_in_batch is not None
            share = counted(inputs["labels"]) / num_items_in_batch
            loss = loss * share
        said = self._loss_of_labels(outputs, inputs["labels"])
        self._auxiliary += 0.0 if said is outputs.loss else float((outputs.loss.detach() - said) * share)
        return (loss, outputs) if return_outputs else loss

    def _runs(self, model: nn.Module) -> Callable[..., Any]:
        """Return the model, or the compiled one: not while memory is measured, which sees every operation."""
        if not self.settings.torch_compile or self.watch.measuring:
            return model
        if self._compiled is None:
            self._compiled = torch.compile(model)
        return self._compiled

    @property
    def _own(self) -> nn.Module:
        """The model itself, which DistributedDataParallel may wrap."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _loss_of_labels(self, outputs: Any, labels: Tensor) -> Tensor:
        config: Any = self.model.config  # pyright: ignore[reportOptionalMemberAccess]
        return loss_of_labels(outputs, labels, encoder_decoder=config.is_encoder_decoder)

    def _not_finite(self, model: nn.Module, inputs: dict[str, Any]) -> DovetailError:
        """Return the error for a loss that is not finite; it names the first module with such an output."""
        step = self.state.global_step
        where, fix = f"{self.watch.title}, step {step + 1}", "lower lr_scale, or add warmup" if step else ""
        return not_finite(where, model, partial(_forward, model, inputs), fix=fix, error=TrainError)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Return the number of counted labels of a step. The Trainer would take the value -100.0 for no label."""
        number = torch.stack([batch.get(_COUNTED, counted(batch["labels"])) for batch in batch_samples]).sum()
        return processes.total(number.to(device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss of the labels as "loss", and what a model adds to it (for MoE routers) as "auxiliary_loss"."""
        if "loss" in logs:
            auxiliary = float(processes.total(torch.tensor(self._auxiliary, dtype=torch.float64))) / processes.count()
            self._auxiliary = 0.0
            if auxiliary:
                logs |= {"loss": logs["loss"] - auxiliary, "auxiliary_loss": auxiliary}
        super().log(logs, start_time)

    # Checkpoints.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        assert isinstance(self.model, nn.Module)
        if not processes.first():
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_trained(self.model, Path(output_dir) / TRAINED)
        self.between.save(Path(output_dir) / KEPT)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        processes.wait()
        if processes.first():
            mark_complete(Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert isinstance(self.model, nn.Module)
        load_trained(self.model, Path(resume_from_checkpoint) / TRAINED)
        self.between.load(Path(resume_from_checkpoint) / KEPT)


def _tokens(row: Example, encoder_decoder: bool) -> int:
    """Return the number of tokens that a row costs."""
    labels = row["labels"]
    return len(row["input_ids"]) + (len(labels) if encoder_decoder and isinstance(labels, list) else 0)


@torch.no_grad()
def _forward(model: nn.Module, inputs: dict[str, Any]) -> None:
    with in_evaluation(model):  # dropout would draw random numbers
        model(**inputs)


def counted(labels: Tensor) -> Tensor:
    """Return the number of labels that a loss counts: tokens that are not ignored, or every label of a head."""
    return labels.ne(IGNORED).sum() if labels.ndim > 1 else torch.tensor(labels.numel(), device=labels.device)


def loss_of_labels(outputs: Any, labels: Tensor, *, encoder_decoder: bool) -> Tensor:
    """Return the mean loss over the counted labels, without what a model adds to it, such as the loss of MoE routers.

    Computed from the logits again only where the outputs list another loss.
    """
    others = [name for name, value in outputs.items() if name.endswith("_loss") and isinstance(value, Tensor)]
    if not others or labels.ndim != 2:
        return outputs.loss
    logits_btv = outputs.logits.detach()
    if not encoder_decoder:
        logits_btv, labels = logits_btv[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits_btv.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def mean_loss(model: PreTrainedModel, rows: Sequence[Example], collate: Collator, batch_size: int) -> float:
    """Return the mean loss over all counted labels of the rows; dropout is off. Each process takes some batches."""
    config: Any = model.config
    starts = range(0, len(rows), batch_size)
    found_b2 = torch.zeros(len(starts), 2, dtype=torch.float64)  # of each batch: the sum of losses, and the labels
    with in_evaluation(model), torch.inference_mode():
        for place in range(processes.rank(), len(starts), processes.count()):
            chosen = rows[starts[place] : starts[place] + batch_size]
            batch = {name: tensor.to(model.device) for name, tensor in collate(chosen).items()}
            number, outputs = int(counted(batch["labels"])), model(**batch)
            loss = loss_of_labels(outputs, batch["labels"], encoder_decoder=config.is_encoder_decoder)
            found_b2[place, 0] = number * loss.double().cpu()
            found_b2[place, 1] = number
    total, labels = processes.total(found_b2).sum(0).tolist()
    return total / labels


def trackers(name: str, directory: Path) -> list[TrainerCallback]:
    """Return the callbacks that the Trainer does not make by itself: TensorBoard, with its files in `directory`."""
    if name != "tensorboard":
        return []
    tensorboard = TensorBoardCallback()
    tensorboard.logging_dir = tensorboard.logging_dir or str(directory)
    return [tensorboard]


def trainer_arguments(
    model: PreTrainedModel, settings: TrainSettings, directory: Path, *, checkpoints: bool
) -> TrainingArguments:
    """Return the arguments of the Trainer for a stage: quiet, on the model's device, with checkpoints if asked."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=-(-settings.batch_size // processes.count()),
        gradient_accumulation_steps=settings.gradient_accumulation,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        use_cpu=model.device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if checkpoints else "no",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        eval_strategy="no",
        report_to="none" if settings.report_to == "tensorboard" else settings.report_to,
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:  # one model on one device: no DataParallel
        arguments._n_gpu = 1
    return arguments
