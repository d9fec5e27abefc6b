"""What each row of a study costs, measured from the folder of its run: nothing here is estimated.

Everything is measured on the processor with one thread. Seconds are processor time, so that other programs on the
machine have little influence. The rows take turns in interleaved rounds, and each number is the median of its rounds:
where the machine slows down, all rows slow down.

A model can be shipped in three forms:

base and adapter   the base packed (codes, masks), and the parameters of the adapter at the ranks in use
merged, packed     packed/: computes from its codes
merged, stock      model/: values in full, for every program that reads Hugging Face checkpoints
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor

from dovetail.chains.assignment import assign
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import extract, groups
from dovetail.chains.link import Chain
from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import merge
from dovetail.checkpoint.packed import save_packed
from dovetail.compression.calibration import calibration_batches
from dovetail.errors import LoadError
from dovetail.files import read_json, write_whole
from dovetail.progress import Bar
from dovetail.runs import folder as run_folder
from dovetail.runs.folder import MODEL, RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from dovetail.runs.steps import stored_nbytes
from dovetail.studies.matrix import Line, label
from dovetail.studies.report import Cost
from dovetail.studies.verify import tuned
from dovetail.tasks.find import load_task
from dovetail.tasks.lengths import length_limit
from dovetail.tasks.task import Task
from dovetail.tasks.vocabulary import pad_id
from dovetail.training.peak_memory import PeakMemory
from dovetail.training.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDS, TRAINING_ROUNDS = 7, 5
ROWS, NEW_TOKENS = 16, 32
"""The batch for the timing of inference: its rows, and the tokens that each row is continued by."""
FEW_STEPS, MORE_STEPS = 3, 23
"""The steps of two trainings. Their difference is the time of the steps alone, without the start."""
KEPT = "cost.json"
APART, PACKED, STOCK = "base and adapter", "merged, packed", "merged, stock"


class _Kept(pydantic.BaseModel, extra="forbid"):
    """The content of cost.json: the runs that were measured, as (line, form, seconds of the run), and the result."""

    runs: list[tuple[str, str, float]]
    cost: list[Cost]


def measure(lines: list[tuple[Line, bool]], folder: Path, *, progress: bool = True) -> list[Cost]:
    """Measure the cost table, or read what an earlier start measured of the same runs.

    lines     of the table, each with whether it is shipped merged
    folder    of the study; the first run of each line is measured
    """
    named = [(line, folder / "runs" / line.runs[0].slug, merged) for line, merged in lines]
    chosen = [(line, place, form) for line, place, merged in named for form in forms(place, merged)]
    places = [place for _, place, _ in chosen]
    reports = [Report.load(place) for place in places]
    runs = [
        (label(line.row, line.point), form, report.seconds)
        for (line, _, form), report in zip(chosen, reports, strict=True)
    ]
    with suppress(LoadError):  # not measured yet, or by another version
        kept = read_json(folder / KEPT, _Kept, rule="the file must hold measurements")
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

    model           as shipped
    ids             (row, token) of texts of the train split, cut to one length: no padding
    new_tokens      that decoding adds over all rows; 0 where the model does not generate
    storage_nbytes  of the weights as shipped
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
        limit = length_limit(model, tokenizer, recipe.train.max_length, task.split("train"))
        config = model.config.to_dict()
        batch = calibration_batches(
            task, tokenizer, samples=ROWS, max_length=max(1, limit - NEW_TOKENS),
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
        """Return the processor seconds of a forward pass over the batch."""
        more = {} if self.decoder_ids is None else {"decoder_input_ids": self.decoder_ids}
        started = time.process_time()
        self.model(input_ids=self.ids, **more)
        return time.process_time() - started

    @torch.no_grad()
    def decode(self) -> float:
        """Return the processor seconds of continuing every row greedily by NEW_TOKENS, including the prompt."""
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
        """Return the peak bytes of live tensors during both, including parameters and buffers."""
        with PeakMemory([*self.model.parameters(), *self.model.buffers()]) as memory:
            self.prefill()
            self.decode()
        return memory.peak_nbytes

    def step_seconds(self) -> float:
        """Return the processor seconds of one training step with the settings of the recipe, from the tuned adapter."""
        settings = self.recipe.train.model_dump()
        rows = settings["batch_size"] * settings["gradient_accumulation"] * MORE_STEPS
        task = replace(self.task, splits={"train": self.task.split("train")[:rows]})
        seconds = []
        for steps in (FEW_STEPS, MORE_STEPS):
            model, tokenizer = tuned(self.folder)
            changed = settings | {"max_steps": steps, "evaluate_every": None}
            started = time.process_time()
            train(model, tokenizer, task, seed=self.recipe.seed, progress=False, **changed)
            seconds.append(time.process_time() - started)
        return (seconds[1] - seconds[0]) / (MORE_STEPS - FEW_STEPS)


def _medians(functions: list[Callable[[], float]], rounds: int, bar: Bar, warm: int = 1) -> list[float]:
    """Return the median of each function over interleaved rounds in alternating order, after `warm` other rounds."""
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


def forms(folder: Path, mergeable: bool) -> list[str]:
    """Return the forms in which the model of a run can be shipped; a packed one needs a pruner or a quantizer."""
    if not mergeable:
        return [APART]
    return [PACKED, STOCK] if (folder / run_folder.PACKED).is_dir() else [STOCK]


def shipped(folder: Path, form: str, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """Return the model for inference, its tokenizer, and the bytes of the weights that are shipped for it.

    folder  a run directory
    form    APART, PACKED or STOCK
    kind    of its task
    """
    if form != APART:
        place = folder / (MODEL if form == STOCK else run_folder.PACKED)
        model, tokenizer = load(place, task_kind=kind)
        return model, tokenizer, stored_nbytes(place)
    model, tokenizer = tuned(folder)
    if groups(model):
        extract(model)
    with tempfile.TemporaryDirectory() as place:
        parts = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(parts, Path(place) / "adapter.safetensors")  # links, and a head
        base, _ = tuned(folder)
        _save_base(base, Path(place) / "base")
        return model, tokenizer, stored_nbytes(Path(place)) + stored_nbytes(Path(place) / "base")


def _save_base(model: PreTrainedModel, place: Path) -> None:
    """Write the base under the adapter, packed; a base that no link has changed is written in full."""
    record = applied(model)
    last = record.chain.stages[-1].trained
    count = len(record.chain) - len(last)
    links, own = record.chain.links[:count], record.assignment.layers
    for layer in record.layers.values():
        layer.set_links([])
    if links:
        record.assignment = assign(Chain(links), {pattern: Chain(each.links[:count]) for pattern, each in own.items()})
    merge(model, lossy=not links, packed=bool(links))
    if links:
        save_packed(model, place)
    else:
        model.save_pretrained(place)
