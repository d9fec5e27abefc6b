"""What each pipeline costs, measured from its run's folder: nothing here is estimated.

On the processor, with one thread; seconds are those of processor time, so that other programs on the machine count
little. The pipelines take turns, round after round, and each figure is the median of its rounds: a machine that slows
down is slow for all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
import torch
from torch import Tensor

from dovetail.compression.calibration import calibration_batches
from dovetail.progress import Bar
from dovetail.runs.folder import RECIPE, write_whole
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from dovetail.studies.matrix import Line, label
from dovetail.studies.report import Cost
from dovetail.studies.shipped import forms, shipped, tuned
from dovetail.tasks.find import load_task
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import length_limit, pad_id
from dovetail.training.peak_memory import PeakMemory
from dovetail.training.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDS, TRAINING_ROUNDS = 7, 5
ROWS, NEW_TOKENS = 16, 32
"""Of the batch that inference is timed on: rows, and tokens that each is continued by."""
FEW_STEPS, MORE_STEPS = 3, 23
"""Two trainings, whose difference is the time of the steps alone: starting is left out."""
KEPT = "cost.json"


class _Kept(pydantic.BaseModel, extra="forbid"):
    """cost.json: what was measured, (line, form, seconds that its run took), and what came out."""

    runs: list[tuple[str, str, float]]
    cost: list[Cost]


def measure(lines: list[tuple[Line, bool]], folder: Path, *, progress: bool = True) -> list[Cost]:
    """The cost table; what an earlier start measured of the same runs is kept.

    lines     of the table, each with whether it is shipped merged
    folder    of the study; measured is each line's first run
    """
    named = [(line, folder / "runs" / line.runs[0].slug, merged) for line, merged in lines]
    chosen = [(line, place, form) for line, place, merged in named for form in forms(place, merged)]
    places = [place for _, place, _ in chosen]
    reports = [Report.load(place) for place in places]
    runs = [
        (label(line.row, line.point), form, report.seconds)
        for (line, _, form), report in zip(chosen, reports, strict=True)
    ]
    with suppress(OSError, pydantic.ValidationError):  # not measured yet, or with another version
        kept = _Kept.model_validate_json((folder / KEPT).read_bytes())
        if kept.runs == runs:
            return kept.cost
    if not chosen:
        return []
    with _one_thread():
        pipelines = [_Pipeline.of(place, form) for _, place, form in chosen]
        with Bar("measure", 2 * ROUNDS + TRAINING_ROUNDS, shown=progress) as bar:
            prefill = _medians([each.prefill for each in pipelines], ROUNDS, bar)
            decode = _medians([each.decode for each in pipelines], ROUNDS, bar)
            inference = [each.inference_nbytes() for each in pipelines]
            # A run that is shipped in two forms is tuned in one way.
            tunings = {each.folder: each.step_seconds for each in pipelines}
            steps = _medians(list(tunings.values()), TRAINING_ROUNDS, bar, warm=0)
    step = dict(zip(tunings, steps, strict=True))
    found = [
        Cost(
            row=line.row,
            point=line.point,
            shipped=form,
            storage_nbytes=pipelines[at].storage_nbytes,
            step_seconds=step[place],
            tuning_nbytes=report.peak_memory_nbytes,
            prefill_tokens_a_second=pipelines[at].ids.numel() / prefill[at],
            decode_tokens_a_second=pipelines[at].new_tokens / decode[at] if pipelines[at].new_tokens else None,
            inference_nbytes=inference[at],
        )
        for at, ((line, place, form), report) in enumerate(zip(chosen, reports, strict=True))
    ]
    write_whole(folder / KEPT, _Kept(runs=runs, cost=found).model_dump_json(indent=2) + "\n")
    return found


@dataclass
class _Pipeline:
    """A tuned pipeline, as it is shipped and as it is trained.

    model       what is shipped
    ids         (row, token) of the train split's texts, cut to one length: no padding
    new_tokens  that decoding adds over all rows; 0 where the model doesn't generate
    storage_nbytes  of what is shipped
    """

    folder: Path
    recipe: Recipe
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    decoder_ids: Tensor | None
    new_tokens: int
    storage_nbytes: int

    @classmethod
    def of(cls, folder: Path, form: str) -> _Pipeline:
        from transformers import GenerationMixin

        recipe = Recipe.load(folder / RECIPE)
        task = load_task(recipe.data)
        model, tokenizer, storage = shipped(folder, form, task.kind)
        model.eval()
        limit = length_limit(model, tokenizer, recipe.train.max_length)
        config = model.config.to_dict()
        batch = calibration_batches(
            Task(task.name, task.kind, task.metric, {"train": task.split("train")}), tokenizer, samples=ROWS,
            max_length=max(1, limit - NEW_TOKENS),
            decoder_start=config.get("decoder_start_token_id") if model.config.is_encoder_decoder else None,
        )[0]  # fmt: skip
        shortest = int(batch["attention_mask"].sum(dim=1).min())
        ids = batch["input_ids"][:, :shortest]
        generates = isinstance(model, GenerationMixin) and model.can_generate()
        return cls(
            folder, recipe, task, model, tokenizer, ids, batch.get("decoder_input_ids"),
            ids.shape[0] * NEW_TOKENS if generates else 0, storage,
        )  # fmt: skip

    @torch.no_grad()
    def prefill(self) -> float:
        """Processor seconds of a forward pass over the batch."""
        more = {} if self.decoder_ids is None else {"decoder_input_ids": self.decoder_ids}
        started = time.process_time()
        self.model(input_ids=self.ids, **more)
        return time.process_time() - started

    @torch.no_grad()
    def decode(self) -> float:
        """Processor seconds of continuing every row greedily by NEW_TOKENS, the prompt's forward pass included."""
        from transformers import GenerationConfig

        if not self.new_tokens:
            return 0.0
        settings = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, use_cache=True,
            pad_token_id=pad_id(self.tokenizer), eos_token_id=self.tokenizer.eos_token_id,
            decoder_start_token_id=self.model.generation_config.decoder_start_token_id,
            bos_token_id=self.model.generation_config.bos_token_id,
        )  # fmt: skip
        started = time.process_time()
        self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), generation_config=settings
        )
        return time.process_time() - started

    def inference_nbytes(self) -> int:
        """The most bytes of live tensors while it does both, its parameters and buffers among them."""
        with PeakMemory([*self.model.parameters(), *self.model.buffers()]) as memory:
            self.prefill()
            self.decode()
        return memory.peak_nbytes

    def step_seconds(self) -> float:
        """Processor seconds of one training step with the recipe's settings, going on from what was tuned."""
        settings = self.recipe.train.model_dump()
        rows = settings["batch_size"] * settings["gradient_accumulation"] * MORE_STEPS
        records = {"train": self.task.split("train")[:rows]}
        task = Task(self.task.name, self.task.kind, self.task.metric, records)
        seconds = []
        for steps in (FEW_STEPS, MORE_STEPS):
            model, tokenizer = tuned(self.folder)
            changed = settings | {"max_steps": steps, "evaluate_every": None}
            started = time.process_time()
            train(model, tokenizer, task, seed=self.recipe.seed, progress=False, **changed)
            seconds.append(time.process_time() - started)
        return (seconds[1] - seconds[0]) / (MORE_STEPS - FEW_STEPS)


def _medians(functions: list[Callable[[], float]], rounds: int, bar: Bar, warm: int = 1) -> list[float]:
    """The median of what each function measures, in interleaved rounds, the order alternating, after `warm` others."""
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(-warm, rounds):
        order = range(len(functions))
        for at in order if number % 2 == 0 else reversed(order):
            found = functions[at]()
            if number >= 0:
                seconds[at].append(found)
        if number >= 0:
            bar.advance()
    return [statistics.median(values) for values in seconds]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
