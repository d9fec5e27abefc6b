"""Experts composed for a task with a few examples: LoraHub (Huang et al. 2023; ComPEFT §3.6, eq. 1).

  A = Σ w_i A_i,  B = Σ w_i B_i,   w = argmin  nll(examples; A, B) + l1 · mean |w_i|,   |w_i| <= bound

The parameters themselves are summed, A's and B's apart, so that what is composed is an adapter of the same rank; its
product has terms of two experts, which a sum of merged weights hasn't. No gradients: the loss is asked for at `budget`
points, which Shiwa (Liu et al. 2020) chooses, nevergrad's rules for choosing an optimiser; among few experts that is
COBYLA, from w = 0 on. An expert stays two bits a value until it is added.

Beside `merging`, which needs no data, this needs examples and budget + 1 evaluations of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dovetail.errors import DataError, DovetailError
from dovetail.experts.expert import Expert
from dovetail.experts.live.activate import put
from dovetail.experts.masks import Masks
from dovetail.experts.merging import check_together, masks_of, weighted_sum
from dovetail.experts.vectors import TaskVector
from dovetail.progress import Bar
from dovetail.tasks.find import as_task
from dovetail.tasks.scoring import in_evaluation
from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Record, Task
from dovetail.tasks.tokens import check_head, encode, length_limit

_HOPELESS = 1e4
"""What the optimiser is told of a loss above it, or of none: the composition overflowed."""
_SPAN = 1.5
"""LoraHub's bound. Others are scaled to it: the optimiser takes steps of 1."""

Loss = Callable[[TaskVector], float]


@dataclass(frozen=True)
class Tried:
    """Weights that were tried: `loss` is the mean negative log-likelihood (nats a token), `objective` that and the
    penalty."""

    weights: tuple[float, ...]
    loss: float
    objective: float


@dataclass(frozen=True)
class Composition:
    """What a search found.

    weights      one for each expert
    task_vector  Σ weight · expert, float32
    loss         mean negative log-likelihood of the examples' labelled tokens, nats a token
    objective    loss + l1 · mean |weight|: what the search made small
    history      everything that was tried, in order
    """

    weights: tuple[float, ...]
    task_vector: TaskVector = field(repr=False)
    loss: float
    objective: float
    history: tuple[Tried, ...] = field(repr=False)


def compose(
    experts: Sequence[Expert],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Task | str | Sequence[Record],
    *,
    budget: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    seed: int = 0,
    split: str = "train",
    limit: int | None = 32,
    batch_size: int = 64,
    max_length: int = 1024,
    progress: bool = True,
) -> Composition:
    """Weights of experts for a task, from a few of its examples; the model carries the best composition afterwards.

    experts   of one kind (as `merge` takes them), such as the model can carry (`dovetail.experts.put`)
    data      a task, the name of one of the playground, or records, of a kind that language models learn
    budget    compositions to try; the paper's LoraHub takes 40
    bound     largest |weight|
    l1        of the mean |weight|, added to the loss
    seed      of the optimiser: the same weights every time, on the same machine
    split     of a task, `limit`: its first examples only; None: all of them
    progress  a bar for what takes longer than 3 s
    returns   the best of all that was tried, whereas LoraHub takes what the optimiser recommends, tried or not
    errors    DataError for what `merge` refuses, a task that needs a head, a setting out of range; DovetailError where
              nevergrad isn't installed; what `put` refuses. The model then carries what was tried last, if anything
    """
    check_together(experts)
    task = as_task(data, split)
    if task.kind in ("classification", "regression"):
        rule = "the loss is that of tokens: generation, choice, pairs or text"
        raise DataError(f"compose for task {task.name}", found=f"a {task.kind} task", rule=rule)
    check_head(task.name, task.kind, model)
    if limit is not None and limit < 1:
        raise DataError("compose", found=f"limit={limit}", rule="at least one example")
    length = length_limit(model, tokenizer, max_length)
    runner = Runner(model, tokenizer, task.name, batch_size, length, progress=False)
    rows = encode(
        task.kind, task.split(split)[:limit], tokenizer, encoder_decoder=runner.encoder_decoder, max_length=length
    )

    def loss(vector: TaskVector) -> float:
        put(model, vector)
        sums, counts = runner.log_likelihoods(rows)
        return -(sums.sum() / counts.sum()).item()

    with in_evaluation(model), torch.no_grad():
        found = search(experts, loss, budget=budget, bound=bound, l1=l1, seed=seed, progress=progress)
    put(model, found.task_vector)
    return found


def search(
    experts: Sequence[Expert],
    loss: Loss,
    *,
    budget: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Composition:
    """The search of `compose` for any loss of a composed task vector; lower is better."""
    check_together(experts)
    if not (math.isfinite(bound) and bound > 0 and budget >= 1 and math.isfinite(l1) and l1 >= 0):
        found = f"budget={budget}, bound={bound}, l1={l1}"
        raise DataError("compose", found=found, rule="budget from 1, bound above 0, l1 from 0 on")
    nevergrad = _nevergrad()
    parts = {name: [masks_of(expert, name) for expert in experts] for name in experts[0].coded}
    space = nevergrad.p.Array(init=np.zeros(len(experts))).set_bounds(-_SPAN, _SPAN)
    space.random_state = np.random.RandomState(seed % 2**32)
    optimizer = nevergrad.optimizers.Shiwa(parametrization=space, budget=budget)
    history: list[Tried] = []
    best = None
    try:
        with warnings.catch_warnings(), Bar("compose", budget, shown=progress) as bar:
            for library in ("scipy", "cma", "nevergrad"):  # tell what nevergrad asks of them, a user can't mend it
                warnings.filterwarnings("ignore", module=rf"{library}\.")
            for _ in range(budget):
                asked = optimizer.ask()
                weights = tuple(float(weight) * bound / _SPAN for weight in asked.value)
                value = loss(_composed(parts, weights, experts[0]))
                tried = Tried(weights, value, value + l1 * sum(map(abs, weights)) / len(weights))
                history.append(tried)
                told = min(tried.objective, _HOPELESS) if math.isfinite(tried.objective) else _HOPELESS
                optimizer.tell(asked, told)
                if best is None or _rank(tried) < _rank(best):
                    best = tried
                bar.advance(note=f"loss {best.loss:.3f}")
    finally:
        del optimizer  # ends its thread, for which the interpreter would wait
    if best is None or not math.isfinite(best.objective):
        raise DataError("compose", found=f"no finite loss in {budget} tries", rule="some composition has one")
    vector = _composed(parts, best.weights, experts[0])
    return Composition(best.weights, vector, best.loss, best.objective, tuple(history))


def _composed(parts: Mapping[str, Sequence[Masks]], weights: Sequence[float], first: Expert) -> TaskVector:
    """Σ weight · expert; what has no weight isn't added."""
    kept = [place for place, weight in enumerate(weights) if weight]
    tensors: dict[str, Tensor] = {}
    for name, masks in parts.items():
        if kept:
            tensors[name] = weighted_sum([masks[place] for place in kept], [weights[place] for place in kept])
        else:
            tensors[name] = torch.zeros(first.shapes[name])
    return TaskVector(tensors, first.origin)


def _rank(tried: Tried) -> float:
    return tried.objective if math.isfinite(tried.objective) else math.inf


def _nevergrad() -> ModuleType:
    try:
        import nevergrad
    except ImportError:
        raise DovetailError(
            "compose", found="no nevergrad", rule="its optimiser chooses the weights",
            fix='pip install "dovetail[compose]"',
        ) from None  # fmt: skip
    return nevergrad
