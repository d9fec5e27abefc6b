"""A dry run: legality, stages, exact bytes and the memory that training will need, from a configuration alone.

Nothing is computed and no weight is read. Bytes are counted on tensors without storage (device "meta"), which are made
by the same code that makes the real ones; the peak of memory on fake tensors, by one real training step's operations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dovetail.chains.assignment import Layers, assign
from dovetail.chains.check import check_merge
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.coverage import coverage
from dovetail.chains.layer.held import held
from dovetail.chains.link import Chain, Link
from dovetail.chains.notation import chain
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.config import best_device, empty_model, grid_of, held_in, load_config, load_tokenizer
from dovetail.checkpoint.exportable import check_format, fits
from dovetail.checkpoint.footprint import count_weights, stored_nbytes, weight_nbytes
from dovetail.compression.apply import apply_on_meta
from dovetail.compression.blocks import unreached
from dovetail.errors import CannotMerge, ChainError, DovetailError, LoadError
from dovetail.runs.fit import Setting, cheapest_change, parse_size
from dovetail.tasks.lengths import length_limit
from dovetail.tasks.packing import PackedRows, check_kind
from dovetail.tasks.task import HEAD_KINDS, Task
from dovetail.tasks.tokens import Collator, RowMaker
from dovetail.tasks.vocabulary import pad_id, vocabulary_of
from dovetail.training.optimizer import TrainSettings, cast_frozen, cast_heads, check_checkpointing, trained_parts
from dovetail.training.predict import predict_peak_memory, predict_unreached

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class StagePlan:
    """One stage as it will stand: links, then exact sizes, then the peak while it trains (0 where nothing is)."""

    applied: list[str]
    trained: list[str]
    bits_per_weight: float
    nbytes: int
    trainable_parameters: int
    predicted_peak_memory_nbytes: int | None


@dataclass(frozen=True)
class Plan:
    """What a chain will do to a model.

    chain                         canonical notation
    legal                         whether it can run on this model
    problem                       why not, in full; "" for a legal chain
    mergeable                     whether it merges without loss
    merge_advice                  what to add so that it does; where it does, what is rounded, or ""
    layers                        pattern of layers -> the chain of those that it fits, where it is not `chain`
    layer_count, weights          target layers, and weights in them
    target_fraction               these weights over all parameters of the model: what share bits_per_weight describes
    covered_fraction, left_out    what `dovetail.footprint` says of the model under the chain: share of the parameters,
                                  and kind -> parameters outside the chain
    stages                        one after the other
    bits_per_weight, nbytes       of the model under its last stage, adapters included in nbytes: what
                                  `dovetail.footprint` counts then, exactly
    trainable_parameters          of the last stage
    predicted_peak_memory_nbytes  while training, over all stages, for batches of batch_size x length tokens; None
                                  without `memory`
    memory_parts                  that peak by part: weights (all that is frozen), adapters (all that is trained),
                                  optimizer, and activations with gradients; {} where nothing is trained or predicted
    fits                          whether the peak, or the model where nothing is trained, is at most `gpu`; None
                                  without `gpu`, for an illegal chain and without `memory`
    export_kinds, export_refused  with `to`: what the format calls the grids -> number of layers; and why others do not
                                  fit, with what to change
    change                        where it does not fit: the cheapest change with which it does, or that none was found
    """

    chain: str
    legal: bool
    problem: str
    mergeable: bool
    merge_advice: str
    layers: dict[str, str]
    layer_count: int
    weights: int
    stages: list[StagePlan]
    bits_per_weight: float
    nbytes: int
    trainable_parameters: int
    predicted_peak_memory_nbytes: int | None
    batch_size: int
    length: int
    target_fraction: float | None = None
    covered_fraction: float | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    memory_parts: dict[str, int] = field(default_factory=dict)
    gpu_nbytes: int | None = None
    fits: bool | None = None
    change: str = ""
    export_kinds: dict[str, int] = field(default_factory=dict)
    export_refused: list[str] = field(default_factory=list)


def plan(
    chain_: str | Chain | Link,
    model: str | Path | PreTrainedConfig = "playground",
    *,
    layers: Layers | None = None,
    targets: str | Sequence[str] = "all-linear",
    task: Task | None = None,
    task_kind: str = "generation",
    num_labels: int | None = None,
    dtype: str | None = None,
    batch_size: int = 32,
    length: int = 128,
    max_length: int = 512,
    packing: bool = False,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    keep_weights: Literal["auto"] | bool = "auto",
    trust_remote_code: bool = False,
    memory: bool = True,
    gpu: str | int | None = None,
    to: str | None = None,
    on_step: Callable[[str], object] = lambda text: None,
) -> Plan:
    """Plans a chain on a model without running it.

    layers      pattern of layers -> the same links with other arguments, as in `dovetail.apply`
    model       as for `dovetail.load`, of which only config.json is read; or a configuration
    task        to train on: its kind and its longest records decide the batch, and the tokenizer is read too
    task_kind   where no task is given
    batch_size, length   rows and tokens of the widest batch; length is the longest record's with a task. With packing,
                a row has max_length tokens, of texts of this length
    max_length, packing, bf16, gradient_checkpointing, keep_weights   as in `dovetail.train`; keep_weights="auto" keeps
                none with `gpu`, or on a machine that has one
    memory      predict the peak, which takes seconds (`dovetail.training.predict`); else it is None
    gpu         memory of a GPU, such as "24GB" or "80GiB", or bytes: says whether the training fits, and if not, what
                to change. What the allocator holds back and CUDA's own memory are not counted
    to          format of `dovetail.export`: says which layers fit it
    on_step     called with what is done next

    An illegal chain gives a plan with `legal=False`; other errors are raised: LoadError for the model, DataError for
    records that do not suit it.
    """
    gpu_nbytes = None if gpu is None else parse_size(gpu)
    if to is not None:
        check_format(to)
    texts = {pattern: str(text) for pattern, text in (layers or {}).items()}
    nothing = Plan(str(chain_), False, "", False, "", texts, 0, 0, [], 0.0, 0, 0, 0, batch_size, length)
    try:
        grid = grid_of(chain_)
        had = held_in(model, grid) if isinstance(model, str | Path) else held(model)
        found = assign(chain(chain_), layers, had)
        nothing = replace(nothing, chain=str(found.chain), layers=found.texts)
    except ChainError as error:  # before transformers is imported, which takes seconds
        return replace(nothing, problem=f"{type(error).__name__}: {error}")
    from transformers import PreTrainedConfig

    config = (
        model
        if isinstance(model, PreTrainedConfig)
        else load_config(model, trust_remote_code=trust_remote_code, grid=grid)
    )
    kind = task.kind if task is not None else task_kind
    make = partial(
        empty_model, config, task_kind=kind, num_labels=num_labels, dtype=dtype, trust_remote_code=trust_remote_code
    )
    empty = make()
    batch_of = partial(_synthetic, empty, kind, length=length)
    if packing:
        check_kind(empty, kind)
        batch_of = partial(_packed, empty, kind, length=length, max_length=max_length)
    if task is not None:
        assert not isinstance(model, PreTrainedConfig), "a task is tokenized: name the model"
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        batch_of = partial(widest_batch, empty, tokenizer, task, max_length=max_length, packing=packing)
    batch = batch_of(batch_size=batch_size)
    on_step("targets and sizes")
    rows, tokens = batch["input_ids"].shape
    nothing = replace(nothing, batch_size=rows, length=tokens)
    try:
        the_chain = assign(chain_, layers, held(config)).chain
        nothing = replace(nothing, chain=str(the_chain))
        apply_on_meta(empty, chain_, targets, layers=layers)
        calibrated = any(link.statistics for stage in the_chain.stages for link in stage.applied)
        if calibrated and (name := predict_unreached(make(), applied(empty).layers, batch)) is not None:
            raise unreached(name)
    except DovetailError as error:
        return replace(nothing, problem=f"{type(error).__name__}: {error}")
    mergeable, advice = True, _rounding(the_chain, empty)
    if lost := the_chain.given_up:
        advice = f"the chain gives up the {' and the '.join(lost)} of the merged base: {the_chain.keeping}"
    try:
        check_merge(the_chain)
    except CannotMerge as error:
        mergeable, advice = False, error.fix
    check_checkpointing(empty, gradient_checkpointing)
    if keep_weights == "auto" and (gpu_nbytes is not None or best_device().type != "cpu"):
        keep_weights = False
    settings = TrainSettings(
        batch_size=batch_size, bf16=bf16, gradient_checkpointing=gradient_checkpointing, keep_weights=keep_weights
    )
    models: list[PreTrainedModel] = []
    parts, rounded, highest = [], False, 0
    for number, stage in enumerate(the_chain.stages):
        model_here = empty if number == 0 else make()
        if number > 0:
            apply_on_meta(model_here, chain_, targets, number, layers)
        on_step(f"memory of stage {number + 1} of {len(the_chain.stages)}" if memory else "")
        peak = _peak(model_here, batch, settings) if memory else None
        models.append(model_here)
        rounded = rounded or (bf16 and bool(trained_parts(model_here)))
        if rounded:  # training in bf16 rounds what is frozen, for good, and the heads at its end
            model_here = copy.deepcopy(model_here)
            cast_frozen(model_here)
        if peak is not None and peak > highest:
            highest, nothing = peak, replace(nothing, memory_parts=_memory_parts(model_here, peak))
        if rounded:
            cast_heads(model_here)
        planned = applied(model_here).layers
        weights = sum(layer.base.shape[0] * layer.base.shape[1] for layer in planned.values())
        parts.append(
            StagePlan(
                applied=[str(link) for link in stage.applied],
                trained=[str(link) for link in stage.trained],
                bits_per_weight=8 * sum(map(weight_nbytes, planned.values())) / weights,
                nbytes=stored_nbytes(model_here),
                trainable_parameters=sum(p.numel() for p in model_here.parameters() if p.requires_grad),
                predicted_peak_memory_nbytes=peak,
            )
        )
        share = weights / count_weights(model_here)
        covered, left = coverage(model_here)
        nothing = replace(nothing, layer_count=len(planned), weights=weights, target_fraction=share)
        nothing = replace(nothing, covered_fraction=covered, left_out=left)
        if to is not None:
            kinds, refused = fits(to, model_here)
            nothing = replace(nothing, export_kinds=kinds, export_refused=refused)
    found = replace(
        nothing,
        legal=True,
        mergeable=mergeable,
        merge_advice=advice,
        stages=parts,
        bits_per_weight=parts[-1].bits_per_weight,
        nbytes=parts[-1].nbytes,
        trainable_parameters=parts[-1].trainable_parameters,
        predicted_peak_memory_nbytes=highest if memory else None,
    )
    if gpu_nbytes is None or not memory:
        return found

    made = {found.chain: models}

    def models_of(text: str) -> list[PreTrainedModel]:
        """Return the model under each stage of a chain; the targets and the calibrated links are those above."""
        if text not in made:
            count = len(assign(text, layers, held(config)).chain.stages)
            stages = [make() for _ in range(count)]
            for number, each in enumerate(stages):
                apply_on_meta(each, text, targets, number, layers)
            made[text] = stages
        return made[text]

    def predict(setting: Setting) -> int | None:
        rows, checkpointing = setting.batch_size, setting.gradient_checkpointing
        on_step(f"{setting.chain}, batch_size={rows}")
        other = settings.model_copy(update={"batch_size": rows, "gradient_checkpointing": checkpointing})
        try:
            models = models_of(setting.chain)
            peak = max(_peak(each, batch_of(batch_size=rows), other) for each in models)
        except DovetailError:
            return None
        return peak or stored_nbytes(models[-1])

    peak = highest or found.nbytes  # a chain that trains nothing has no peak
    if peak <= gpu_nbytes:
        return replace(found, gpu_nbytes=gpu_nbytes, fits=True)
    setting = Setting(found.chain, batch_size, gradient_checkpointing)
    change = cheapest_change(
        setting, gpu_nbytes, predict, peak=peak, fixed=peak - found.memory_parts.get("activations", 0),
        checkpointing=bool(highest) and empty.supports_gradient_checkpointing, rewrite=not layers,
    )  # fmt: skip
    return replace(found, gpu_nbytes=gpu_nbytes, fits=False, change=change)


def _memory_parts(model: PreTrainedModel, peak: int) -> dict[str, int]:
    """Return the peak by part; AdamW keeps two numbers per trained one."""
    tensors = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(tensors.values()) - adapters
    rest = max(0, peak - weights - 3 * adapters)
    return {"weights": weights, "adapters": adapters, "optimizer": 2 * adapters, "activations": rest}


def _peak(model: PreTrainedModel, batch: dict[str, Tensor], settings: TrainSettings) -> int:
    """Return the predicted peak; LoadError for a configuration with which the model's own code fails."""
    try:
        return predict_peak_memory(model, batch, settings)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, DovetailError):
            raise
        raise LoadError(
            f"config of {type(model).__name__}",
            found=f"{type(error).__name__} in a training step: {error}"[:300],
            rule="the model's own code must run with the values of its configuration",
            fix="check config.json, or leave the memory out (--no-memory)",
        ) from error


def _rounding(the_chain: CheckedChain, model: PreTrainedModel) -> str:
    """Return what merging rounds: adapters without a constraint, on a dense half-precision model."""
    last = the_chain.stages[-1]
    open_ = last.adapters and not last.constraints
    half = model.dtype in (torch.bfloat16, torch.float16)
    return f"sums are rounded once to the model's {str(model.dtype).removeprefix('torch.')}" if open_ and half else ""


def widest_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, *, batch_size: int, max_length: int,
    packing: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the widest batch that training on the task sees: full, with the task's longest records."""
    config: Any = model.config
    records, vocabulary = task.split("train"), vocabulary_of(model)
    length = length_limit(model, tokenizer, max_length, records)
    make = RowMaker(tokenizer, config.is_encoder_decoder, length, vocabulary)
    rows = make.rows(task.kind, records)
    lengths = [len(row["input_ids"]) for row in rows]
    if packing:
        rows = PackedRows(rows, lengths, length)
        lengths = rows.lengths
    widest = sorted(range(len(rows)), key=lambda row: lengths[row], reverse=True)[:batch_size]
    return Collator(pad_id(tokenizer, vocabulary))([rows[row] for row in widest])


def _synthetic(model: PreTrainedModel, kind: str, batch_size: int, length: int) -> dict[str, Tensor]:
    """Return a batch of that size with arbitrary values."""
    ids = torch.ones(batch_size, length, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.ones_like(ids)}
    if kind in HEAD_KINDS:
        batch["labels"] = torch.zeros(batch_size, dtype=torch.float32 if kind == "regression" else torch.int64)
    return batch


def _packed(model: PreTrainedModel, kind: str, batch_size: int, length: int, max_length: int) -> dict[str, Tensor]:
    """Return a batch of as many rows of `max_length` tokens, with texts as long as those of `_synthetic`."""
    rows, tokens = _synthetic(model, kind, batch_size, length)["input_ids"].shape
    ids = torch.ones(rows, max_length, dtype=torch.int64)
    places = torch.arange(max_length).remainder(tokens).repeat(rows, 1)
    return {"input_ids": ids, "position_ids": places, "labels": ids.clone()}
