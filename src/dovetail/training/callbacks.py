"""What happens between the steps of a stage: draws of ranks, methods with steps of their own, progress and measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dovetail.chains.layer.elastic import Group, draw_ranks, use_reference
from dovetail.chains.layer.keeping import forget
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Adapter
from dovetail.errors import TrainError
from dovetail.files import atomic
from dovetail.progress import Bar, note
from dovetail.training.peak_memory import PeakMemory

_MEASURED_STEPS = 3


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


class Forgetting(TrainerCallback):
    """Let kept weights be made again after each step of the optimizer, whatever it tells torch of its changes."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        forget(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        forget(kwargs["model"])


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

    peak_memory_nbytes, seconds_before   the peak of all starts of this training, and the seconds of the earlier ones up
                                         to the checkpoint that this one continues
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
        self.seconds_before = 0.0
        self._started = time.perf_counter()
        self._still: dict[str, nn.Parameter] = {}
        self._unreached: set[str] = set()
        self._bar: Bar | None = None
        self._memory: PeakMemory | None = None
        self._steps_done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self._resume(state)
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
        self._remember(args, state)
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
        self._remember(args, state)
        if self._steps_done < _MEASURED_STEPS:  # LoRA's A has zeros as its gradient until B has moved
            self._name([name for name in self._still if name in self._unreached])

    @property
    def measuring(self) -> bool:
        """Whether every operation is counted, to find the peak of memory."""
        return self._memory is not None

    def _resume(self, state: TrainerState) -> None:
        """Take over the seconds and the peak of the start that this one continues."""
        history: list[Any] = state.log_history
        for entry in history:
            if "measured" in entry:
                self.seconds_before, self.peak_memory_nbytes = entry["measured"]

    def _remember(self, args: TrainingArguments, state: TrainerState) -> None:
        """Measure up to here, and leave it in the state of the Trainer, which a checkpoint holds."""
        if args.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(args.device)
        else:
            now = 0 if self._memory is None else self._memory.peak_nbytes
        self.peak_memory_nbytes = max(self.peak_memory_nbytes, now)
        measured = [self.seconds_before + time.perf_counter() - self._started, self.peak_memory_nbytes]
        history: list[Any] = state.log_history
        history[:] = [entry for entry in history if "measured" not in entry]
        history.append({"step": state.global_step, "measured": measured})

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
            self._memory = None
