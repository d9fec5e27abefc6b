"""One stage of training on the Hugging Face Trainer.

Differences from the stock Trainer: each link has its own learning rate; the loss is the mean over the counted tokens of
the whole step, for every model and any number of accumulated batches; batches of similar length come in random order,
the longest row early; elastic adapters run at ranks drawn for each step; a checkpoint holds only the trained
parameters, as safetensors, and is valid once it is complete; a loss that is not finite ends the run; the peak of memory
is measured over the first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback

from dovetail.chains.layer.elastic import Group, draw_ranks, groups, use_reference
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Adapter
from dovetail.errors import DovetailError, TrainError
from dovetail.files import atomic
from dovetail.progress import Bar, note
from dovetail.tasks.finite import check_finite, not_finite
from dovetail.tasks.lengths import in_evaluation
from dovetail.tasks.tokens import IGNORED, Collator, Example
from dovetail.training.checkpoints import KEPT, TRAINED, load_trained, mark_complete, save_trained
from dovetail.training.optimizer import autocast, make_optimizer
from dovetail.training.peak_memory import PeakMemory
from dovetail.training.settings import TrainSettings

_MEASURED_STEPS = 3
_BATCHES_SORTED_TOGETHER = 50


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
        callbacks = [*draws, self.between, watch, *trackers]
        super().__init__(model, arguments, collator, rows, callbacks=callbacks)  # pyright: ignore[reportArgumentType]
        self.remove_callback(PrinterCallback)
        watch.handler = self.callback_handler
        self.settings, self.watch = settings, watch
        self._auxiliary = 0.0
        self._looked = False
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
        try:
            return super().train(*args, **kwargs)
        finally:
            use_reference(self.elastic)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.settings)  # pyright: ignore[reportArgumentType]
        return self.optimizer

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
        """Return the share of the batch in the mean loss over all labels of the step."""
        if not self._looked:
            self._looked = True
            check_finite(
                f"{self.watch.title}, step {self.state.global_step + 1}",
                model,
                partial(_forward, model, inputs),
                error=TrainError,
            )
        outputs = model(**inputs)
        loss = outputs.loss
        if not bool(loss.isfinite()):
            raise self._not_finite(model, inputs)
        share = 1.0
        if self.args.gradient_accumulation_steps > 1:
            assert num_items_in_batch is not None
            share = counted(inputs["labels"]) / num_items_in_batch
            loss = loss * share
        said = self._loss_of_labels(outputs, inputs["labels"])
        self._auxiliary += 0.0 if said is outputs.loss else float((outputs.loss.detach() - said) * share)
        return (loss, outputs) if return_outputs else loss

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
        return torch.stack([counted(batch["labels"]) for batch in batch_samples]).sum().to(device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss of the labels as "loss", and what a model adds to it (for MoE routers) as "auxiliary_loss"."""
        if "loss" in logs and self._auxiliary:
            logs |= {"loss": logs["loss"] - self._auxiliary, "auxiliary_loss": self._auxiliary}
            self._auxiliary = 0.0
        super().log(logs, start_time)

    # Checkpoints.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        assert isinstance(self.model, nn.Module)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_trained(self.model, Path(output_dir) / TRAINED)
        self.between.save(Path(output_dir) / KEPT)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        mark_complete(Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert isinstance(self.model, nn.Module)
        load_trained(self.model, Path(resume_from_checkpoint) / TRAINED)
        self.between.load(Path(resume_from_checkpoint) / KEPT)


class RankDraws(TrainerCallback):
    """Draw a rank for every group of elastic adapters at each optimizer step.

    The draw holds for all batches of the step and for recomputation by gradient checkpointing. It depends on the seed
    and the step alone, so that a resumed run repeats it.
    """

    def __init__(self, elastic: Sequence[Group], seed: str) -> None:
        self.elastic, self.seed = elastic, seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        draw_ranks(self.elastic, f"{self.seed} step {state.global_step} ranks")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        use_reference(self.elastic)


class BeforeSteps(TrainerCallback):
    """Call `Adapter.before_step` of every adapter between two steps, and add what it returns to the gradient.

    kept  what the adapters remember, by the link, its place and their own names; part of a checkpoint
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}
        self._links: dict[str, tuple[Adapter, dict[str, dict[str, nn.Parameter]]]] = {}
        for name, layer in chain_layers(model).items():
            for place, state in enumerate(layer.states):
                own = {key: p for key, p in state.named_parameters(recurse=False) if p.requires_grad}
                if isinstance(state.link, Adapter) and own:
                    _, layers = self._links.setdefault(f"{place} {state.link}", (state.link, {}))
                    layers[name] = own
        self._added: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def _call(self, step: int, steps: int) -> None:
        self._added = []
        for key, (link, layers) in self._links.items():
            found = link.before_step(layers, step, steps, self.kept.setdefault(key, {}))
            self._added += [(layers[name][key], added) for name, own in found.items() for key, added in own.items()]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._call(state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter, added in self._added:  # the gradients were cleared; those of the loss are added to these
            parameter.grad = added

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._call(state.global_step + 1, state.max_steps)

    def save(self, path: Path) -> None:
        """Write what the adapters remember, where they remember something."""
        tensors = {f"{key}|{name}": t.contiguous().cpu() for key, own in self.kept.items() for name, t in own.items()}
        if tensors:
            with atomic(path) as part:
                save_file(tensors, part)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote."""
        if not path.exists():
            return
        for name, tensor in load_file(path).items():
            key, _, own = name.rpartition("|")
            device = next(iter(next(iter(self._links[key][1].values())).values())).device
            self.kept.setdefault(key, {})[own] = tensor.to(device)


class StopAfter(TrainerCallback):
    """End training after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


class Watch(TrainerCallback):
    """Show the progress, measure memory, evaluate at intervals, and end a run whose loss is not finite.

    title      text of the bar
    evaluate   called every `evaluate_every` steps; its result is logged as "validation"
    log        called with the step and {"loss": ...} or {"validation": scores}
    handler    the trainer's callbacks, which include the experiment tracker; set by the trainer
    """

    def __init__(
        self, title: str, *, shown: bool, evaluate_every: int | None, evaluate: Callable[[], dict[str, float]] | None,
        log: Callable[[int, dict[str, Any]], None] | None,
    ) -> None:  # fmt: skip
        self.title, self.shown, self.log = title, shown, log
        self.evaluate_every, self.evaluate = evaluate_every, evaluate
        self.handler: Any = None
        self.peak_memory_nbytes = 0
        self.without_gradient: list[str] = []
        self._still: dict[str, nn.Parameter] = {}
        self._unreached: set[str] = set()
        self._bar: Bar | None = None
        self._memory: PeakMemory | None = None
        self._steps_done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self._still = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._unreached = set(self._still)
        self._bar = Bar(self.title, state.max_steps, shown=self.shown, delay=1.0).__enter__()
        self._bar.advance(state.global_step)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        else:
            self._memory = PeakMemory([*model.parameters(), *model.buffers()])
            self._memory.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps_done < _MEASURED_STEPS:
            self._unreached -= {name for name in self._unreached if self._still[name].grad is not None}
            self._still = {n: p for n, p in self._still.items() if p.grad is None or not bool(p.grad.any())}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps_done += 1
        if self._steps_done == _MEASURED_STEPS:
            self._name(list(self._still))
        due = self.evaluate_every is not None and state.global_step % self.evaluate_every == 0
        if due or self._steps_done == _MEASURED_STEPS:
            self._stop_measuring()
        if due and self.evaluate is not None:
            scores = self.evaluate()
            history: list[Any] = state.log_history
            history.append({"step": state.global_step, "validation": scores})
            if self.log is not None:
                self.log(state.global_step, {"validation": scores})
            # A copy of `control`: the handler unsets should_log, and the loss of this step is yet to be logged.
            self.handler.on_log(
                args, state, replace(control), {f"eval_{name}": value for name, value in scores.items()}
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise TrainError(
                    f"{self.title}, step {state.global_step}",
                    found=f"{name}={logs[name]}",
                    rule="loss and gradient must be finite",
                    fix="lower lr_scale, or add warmup",
                )
        if self.log is not None:
            self.log(state.global_step, {"loss": logs["loss"]})
        if self._bar is not None:
            self._bar.advance(1, f"loss {logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda":
            self.peak_memory_nbytes = torch.cuda.max_memory_allocated(args.device)
        if self._steps_done < _MEASURED_STEPS:  # LoRA's A has zeros as its gradient until B has moved
            self._name([name for name in self._still if name in self._unreached])

    def _name(self, names: list[str]) -> None:
        """Remember the parameters that got no gradient, and print a note on them."""
        self.without_gradient = names
        if names:
            steps = f"{self._steps_done} steps" if self._steps_done > 1 else "step"
            said = f"{len(names)} trained tensors got no gradient in the first {steps}, the first of them {names[0]}"
            note(f"{self.title}: {said}; where that goes on, training does not change them", shown=self.shown)

    def close(self) -> None:
        """End the measurement and the bar, also after an error."""
        self._stop_measuring()
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def _stop_measuring(self) -> None:
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            self.peak_memory_nbytes = self._memory.peak_nbytes
            self._memory = None


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
    """Return the mean loss over all counted labels of the rows; dropout is off."""
    total = torch.zeros((), dtype=torch.float64)
    labels, config = 0, cast("Any", model.config)
    with in_evaluation(model), torch.inference_mode():
        for at in range(0, len(rows), batch_size):
            batch = {name: tensor.to(model.device) for name, tensor in collate(rows[at : at + batch_size]).items()}
            number, outputs = int(counted(batch["labels"])), model(**batch)
            loss = loss_of_labels(outputs, batch["labels"], encoder_decoder=config.is_encoder_decoder)
            total += number * loss.double().cpu()
            labels += number
    return float(total / labels)


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
        per_device_train_batch_size=settings.batch_size,
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
