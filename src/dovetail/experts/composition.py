"""Composition of experts for a task with a few examples: LoraHub (Huang et al. 2023; ComPEFT §3.6, eq. 1).

  A = Σ w_i A_i,  B = Σ w_i B_i,   w = argmin  nll(examples; A, B) + l1 · mean |w_i|,   |w_i| <= bound

The parameters themselves are summed, A's and B's separately, so the composition is an adapter of the same rank. Its
product has terms of two experts, which a sum of merged weights does not have. The search uses no gradients: the loss is
evaluated at `budget` points, which nevergrad's Shiwa (Liu et al. 2020) chooses; for few experts this is COBYLA, from
w = 0. An expert takes two bits per value until it is added.

Unlike `merging`, which needs no data, a composition needs examples and budget + 1 evaluations of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from dovetail.errors import DataError, DovetailError, NotFinite
from dovetail.experts.expert import Expert
from dovetail.experts.live.activate import put
from dovetail.experts.masks import Masks
from dovetail.experts.merging import check_together, masks_of, weighted_sum
from dovetail.experts.vectors import TaskVector
from dovetail.progress import Bar
from dovetail.tasks.find import as_task
from dovetail.tasks.lengths import in_evaluation, length_limit
from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Record, Task
from dovetail.tasks.vocabulary import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOPELESS = 1e4
"""Loss reported to the optimiser in place of a larger one, or of one that is not finite."""
_SPAN = 1.5
"""LoraHub's bound. Other bounds are scaled to it, since the optimiser takes steps of 1."""

Loss = Callable[[TaskVector], float]


@dataclass(frozen=True)
class Tried:
    """Weights of one try, their loss (mean negative log-likelihood, nats per token), and loss plus penalty."""

    weights: tuple[float, ...]
    loss: float
    objective: float


@dataclass(frozen=True)
class Composition:
    """The result of a search.

    weights      one per expert
    task_vector  Σ weight · expert, float32
    loss         mean negative log-likelihood of the examples' labelled tokens, nats per token
    objective    loss + l1 · mean |weight|, which the search minimizes
    history      all tries, in order
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
    """Find weights of experts for a task from a few of its examples, and put the best composition on the model.

    experts   of one kind (as for `merge`), which the model can carry (`dovetail.experts.put`)
    data      a task, the name of a playground task, or records, of a kind that language models learn
    budget    compositions to try; 40 in the paper's LoraHub
    bound     largest |weight|
    l1        factor of the mean |weight| in the objective
    seed      of the optimiser; the weights are deterministic on one machine
    split     of a task
    limit     number of its first examples to use; None: all of them
    progress  show a bar if the search takes longer than 3 s
    returns   the best of all tries, whereas LoraHub takes the optimiser's recommendation, tried or not
    errors    DataError as of `merge`, for a task that needs a head, and for a setting out of range; DovetailError if
              nevergrad is not installed; errors of `put`. The model then carries the last try, if any
    """
    check_together(experts)
    task = as_task(data, split)
    if task.kind in ("classification", "regression"):
        rule = "the task must be of kind generation, choice, pairs or text"
        raise DataError(f"compose for task {task.name}", found=f"a {task.kind} task", rule=rule)
    check_model(task.name, task.kind, task.split(split), model)
    if limit is not None and limit < 1:
        raise DataError("compose", found=f"limit={limit}", rule="limit must be at least 1")
    length = length_limit(model, tokenizer, max_length, task.split(split)[:limit])
    runner = Runner(model, tokenizer, task.name, batch_size, length, progress=False)
    rows = runner.make.examples(task.kind, task.split(split)[:limit])

    def loss(vector: TaskVector) -> float:
        put(model, vector)
        try:
            sums, counts = runner.log_likelihoods(rows)
        except NotFinite:
            return math.inf
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
    """Run the search of `compose` for any loss of a composed task vector; lower is better."""
    check_together(experts)
    if not (math.isfinite(bound) and bound > 0 and budget >= 1 and math.isfinite(l1) and l1 >= 0):
        found = f"budget={budget}, bound={bound}, l1={l1}"
        raise DataError("compose", found=found, rule="budget must be at least 1, bound above 0, l1 at least 0")
    nevergrad = _nevergrad()
    parts = {name: [masks_of(expert, name) for expert in experts] for name in experts[0].coded}
    space = nevergrad.p.Array(init=np.zeros(len(experts))).set_bounds(-_SPAN, _SPAN)
    space.random_state = np.random.RandomState(seed % 2**32)
    optimizer = nevergrad.optimizers.Shiwa(parametrization=space, budget=budget)
    history: list[Tried] = []
    try:
        with warnings.catch_warnings(), Bar("compose", budget, shown=progress) as bar:
            for library in ("scipy", "cma", "nevergrad"):  # warn of nevergrad's own use of them
                warnings.filterwarnings("ignore", module=rf"{library}\.")
            for _ in range(budget):
                asked = optimizer.ask()
                weights = tuple(float(weight) * bound / _SPAN for weight in asked.value)
                value = loss(_composed(parts, weights, experts[0]))
                tried = Tried(weights, value, value + l1 * sum(map(abs, weights)) / len(weights))
                history.append(tried)
                optimizer.tell(asked, min(_rank(tried), _HOPELESS))
                best = min(history, key=_rank)
                bar.advance(note=f"loss {best.loss:.3f}")
    finally:
        del optimizer  # ends its thread, which would keep the interpreter alive
    best = min(history, key=_rank)
    if not math.isfinite(best.objective):
        found, rule = f"no finite loss in {budget} tries", "at least one composition must have a finite loss"
        raise DataError("compose", found=found, rule=rule, fix="pass a smaller bound")
    vector = _composed(parts, best.weights, experts[0])
    return Composition(best.weights, vector, best.loss, best.objective, tuple(history))


def _composed(parts: Mapping[str, Sequence[Masks]], weights: Sequence[float], first: Expert) -> TaskVector:
    """Return Σ weight · expert, without the experts of weight 0."""
    kept = [place for place, weight in enumerate(weights) if weight]
    if not kept:
        return TaskVector({name: torch.zeros(first.shapes[name]) for name in parts}, first.origin)
    factors = [weights[place] for place in kept]
    tensors = {name: weighted_sum([masks[place] for place in kept], factors) for name, masks in parts.items()}
    return TaskVector(tensors, first.origin)


def _rank(tried: Tried) -> float:
    return tried.objective if math.isfinite(tried.objective) else math.inf


def _nevergrad() -> ModuleType:
    try:
        import nevergrad
    except ImportError:
        rule, fix = "the package nevergrad must be installed", 'run `pip install "dovetail[compose]"`'
        raise DovetailError("compose", found="no nevergrad", rule=rule, fix=fix) from None
    return nevergrad
