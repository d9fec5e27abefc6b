"""Baselines of ComPEFT (§4.1, App. C.1), as experts and as sparse vectors.

  stc         top-k by magnitude, signs, scale = mean |τ| of the kept values         (Sattler et al. 2019)
  prune       top-k by magnitude, values unchanged                                  (the paper's "Pruned")
  dare        each value dropped with chance 1 - density, the rest / density        (Yu et al. 2023)
  bitdelta    all signs, scale = mean |τ| of each tensor                            (Liu et al. 2024)
  train_scales  of any expert: argmin over its scales of |logits(τ) - logits(τ~)|²  (Liu et al. 2024, §3.1)

ComPEFT chooses its scale by a sweep, while STC and BitDelta compute it. BitDelta keeps every sign, at least 1 bit per
value. Training scales needs gradients of the whole model. An exact zero has no sign in any of them.

A sparse vector (pruning, DARE) holds some values unchanged. Its positions are coded as an expert's (`codec`), so sizes
are comparable; a value takes 16 or 32 bits, where an expert has one bit for the sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dovetail.errors import DataError
from dovetail.experts import ternary
from dovetail.experts.codec.codec import Coded, code, counts_of, decode_indices
from dovetail.experts.expert import Expert, assemble, check_density
from dovetail.experts.live.activate import deactivate, put
from dovetail.experts.live.placement import slots
from dovetail.experts.merging import packed
from dovetail.experts.vectors import Origin, origin_of, specs_of
from dovetail.progress import Bar
from dovetail.tasks.find import as_task
from dovetail.tasks.lengths import in_evaluation, length_limit
from dovetail.tasks.scoring.runner import Runner
from dovetail.tasks.task import Record, Task
from dovetail.tasks.tokens import IGNORED
from dovetail.tasks.vocabulary import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SparseVector:
    """Some values of a task vector.

    coded    their positions, by tensor; all signs are plus
    values   the values, by tensor, in row-major order and in the tensor's dtype; on the CPU
    density  requested share to keep
    origin   of the task vector
    """

    coded: Mapping[str, Coded] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    density: float
    origin: Origin

    @property
    def kept(self) -> int:
        """Number of values."""
        return sum(values.numel() for values in self.values.values())

    @property
    def numel(self) -> int:
        return sum(coded.numel for coded in self.coded.values())

    @property
    def nbytes(self) -> int:
        """Size of positions, without the codec's sign bits, and of values, which hold their own signs."""
        signs = sum(int(-(-counts_of(coded.directory) // 8).sum()) for coded in self.coded.values())
        return sum(c.nbytes for c in self.coded.values()) - signs + sum(v.nbytes for v in self.values.values())

    def dense(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the task vector, 0 where no value was kept. dtype: of all tensors; None: that of each before."""
        result = {}
        for name, coded in self.coded.items():
            values = self.values[name] if dtype is None else self.values[name].to(dtype)
            result[name] = torch.zeros(coded.shape, dtype=values.dtype)
            result[name].view(-1)[torch.from_numpy(decode_indices(coded, name)[0])] = values
        return result


def sparse(tensors: Iterable[tuple[str, Tensor]], density: float, origin: Origin) -> SparseVector:
    """Return the nonzero values of tensors on the CPU, passed one by one with their names."""
    coded, values = {}, {}
    for name, tensor in tensors:
        flat = tensor.reshape(-1)
        plus = packed(flat)
        coded[name] = code(np.stack([plus, np.zeros_like(plus)]), tuple(tensor.shape))
        values[name] = flat[flat != 0]
    return SparseVector(coded, values, density, origin)


def stc(vector: Mapping[str, Tensor], density: float, per: Literal["vector", "tensor"] = "vector") -> Expert:
    """Keep the signs of the largest values, with their mean magnitude (STC; Sattler et al. 2019, Alg. 1).

    vector   a task vector, as for `compress`
    density  share of values to keep, 0..1
    per      "vector": the largest of all tensors, and one scale; "tensor": the largest of each tensor, and a scale each
    errors   DataError as of `compress`
    """
    check_density("stc", density)
    if per not in ("vector", "tensor"):
        raise DataError("stc", found=f"per={per!r}", rule='per must be "vector" or "tensor"')
    coded = {}
    for names in [list(vector)] if per == "vector" else [[name] for name in vector]:
        coded |= _top_k({name: vector[name] for name in names}, density)
    return _expert(vector, coded, density, per, "stc")


def prune(vector: Mapping[str, Tensor], density: float) -> SparseVector:
    """Keep the largest values by magnitude, over all tensors together, unchanged; set the others to 0.

    density  share of values to keep, 0..1
    errors   DataError as of `compress`
    """
    check_density("prune", density)
    chosen = _top_k(vector, density)

    def kept() -> Iterator[tuple[str, Tensor]]:
        for name, coded in chosen.items():
            tensor = vector[name].detach().cpu()
            at = torch.from_numpy(decode_indices(coded, name)[0])
            flat = tensor.reshape(-1)
            yield name, torch.zeros_like(flat).index_copy_(0, at, flat[at]).view(tensor.shape)

    return sparse(kept(), density, origin_of(vector))


def dare(vector: Mapping[str, Tensor], density: float, seed: int = 0) -> SparseVector:
    """Keep values at random and divide them by the probability (drop and rescale).

    density  probability of keeping a value, above 0
    seed     Bernoulli tensors are drawn for the tensors in the order of their names, in their dtypes, as peft's
             `random_pruning` does in this order after torch.manual_seed(seed)
    errors   DataError for a density out of range, NaN, infinity or integers
    """
    check_density("dare", density)
    if density == 0:
        raise DataError("dare", found="density=0", rule="density must be above 0, since kept values are divided by it")
    generator = torch.Generator().manual_seed(seed)

    def kept() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(vector):
            tensor = vector[name].detach().cpu()
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                found = "NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype)
                raise DataError(f"task vector at {name}", found=found, rule="all values must be finite floats")
            yield name, tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density

    return sparse(kept(), density, origin_of(vector))


def bitdelta(vector: Mapping[str, Tensor]) -> Expert:
    """Keep all signs, one bit per value, and each tensor's mean magnitude with zeros (Liu et al. 2024, eq. 2 and 4).

    errors  DataError as of `compress`
    """
    coded = _top_k(vector, 1.0)
    return _expert(vector, coded, 1.0, "tensor", "bitdelta")


def train_scales(
    expert: Expert,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    vector: Mapping[str, Tensor],
    records: Task | str | Sequence[Record],
    *,
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 0.01,
    max_length: int = 128,
    progress: bool = True,
) -> Expert:
    """Train one scale per tensor, so that the logits approach those of the uncompressed task vector.

    expert         any; its signs stay unchanged
    model          that can carry expert and vector (`dovetail.experts.put`); afterwards as after `deactivate`
    vector         the task vector of the expert
    records        texts to compare logits on; of a task, the training split. BitDelta uses 800 with 128 tokens
    learning_rate  of Adam, for factors of the scales, which start at 1. BitDelta's 1e-4 is for the scales themselves
    returns        an expert with scale "tensor" and alpha 1
    errors         DataError for settings out of range, and for a loss that is not finite; LoadError as of `put`

    Each step writes one vector and then the other to the model, so no logits are kept and no second model is needed.
    The gradient of a factor is the sum of gradient · scale · sign over its tensor.
    """
    if not (epochs >= 1 and batch_size >= 1 and math.isfinite(learning_rate) and learning_rate > 0):
        found = f"epochs={epochs}, batch_size={batch_size}, learning_rate={learning_rate}"
        rule, fix = "epochs and batch_size must be at least 1, learning_rate above 0", "omit them for the defaults"
        raise DataError("train_scales", found=found, rule=rule, fix=fix)
    task = as_task(records)
    check_model(task.name, task.kind, task.split("train"), model)
    length = length_limit(model, tokenizer, max_length, task.split("train"))
    runner = Runner(model, tokenizer, task.name, batch_size, length, progress=False)
    rows = runner.make.examples(task.kind, task.split("train"))
    units = expert.dense(torch.float32)  # times a tensor's gradient: that of its factor
    live = slots(model, expert.shapes, expert.origin)
    factors = torch.ones(len(units), requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=learning_rate)
    needed = {tensor: tensor.requires_grad for tensor in [*model.parameters(), *live.values()]}
    try:
        with in_evaluation(model), Bar("scales", epochs * len(rows), shown=progress) as bar:
            for tensor in needed:
                tensor.requires_grad_(False)
            for _ in range(epochs):
                for chosen, batch in runner.batches(rows):
                    put(model, vector, expert.origin)
                    with torch.no_grad():
                        wanted = _logits(runner, batch)
                    put(model, {name: unit * factor for (name, unit), factor in
                                zip(units.items(), factors.tolist(), strict=True)}, expert.origin)  # fmt: skip
                    for tensor in live.values():
                        tensor.requires_grad_(True)
                    loss = functional.mse_loss(_logits(runner, batch), wanted)
                    gradients = torch.autograd.grad(loss, [live[name] for name in units], allow_unused=True)
                    for tensor in live.values():
                        tensor.requires_grad_(False)
                    factors.grad = torch.tensor([
                        0.0 if gradient is None else float((gradient.cpu().float() * units[name]).sum())
                        for name, gradient in zip(units, gradients, strict=True)
                    ])  # fmt: skip
                    if not math.isfinite(loss.item()) or not bool(torch.isfinite(factors.grad).all()):
                        found, fix = f"a loss of {loss.item():g}", "pass a smaller learning_rate"
                        raise DataError("train_scales", found=found, rule="the loss must be finite", fix=fix)
                    optimizer.step()
                    bar.advance(len(chosen), note=f"loss {loss.item():.4g}")
    finally:
        for tensor, required in needed.items():
            tensor.requires_grad_(required)
        deactivate(model)
    scales = [scale * factor for scale, factor in zip(expert.scales.values(), factors.tolist(), strict=True)]
    provenance = expert.header.provenance | {"trained_scales": epochs * len(rows)}
    return assemble(expert.coded, expert.dtypes, "tensor", scales, expert.density, 1.0, expert.origin, provenance)


def _logits(runner: Runner, batch: dict[str, Tensor]) -> Tensor:
    """Return logits without padding, float32 (tokens, vocabulary), or those of a head (rows, labels)."""
    logits = runner.logits(batch).float()
    if batch["labels"].ndim == 1:
        return logits
    return logits[batch["labels"] != IGNORED if runner.encoder_decoder else batch["attention_mask"].bool()]


def _top_k(vector: Mapping[str, Tensor], density: float) -> dict[str, Coded]:
    """Return the coded signs of the largest values, by name in sorted order."""
    masks = ternary.top_k(vector, density).masks
    return {name: code(masks.pop(name), spec.shape) for name, spec in specs_of(vector).items()}


def _expert(
    vector: Mapping[str, Tensor], coded: dict[str, Coded], density: float, per: Literal["vector", "tensor"], method: str
) -> Expert:
    """Return an expert with mean magnitudes as scales: over the kept values, or (BitDelta) over all of a tensor."""
    coded = {name: coded[name] for name in sorted(coded)}
    sums, counts = [], []
    for name, each in coded.items():
        flat = vector[name].detach().cpu().reshape(-1)
        sums.append(float(flat[torch.from_numpy(decode_indices(each, name)[0])].double().abs().sum()))
        counts.append(flat.numel() if method == "bitdelta" else each.kept)
    if per == "vector":
        sums, counts = [math.fsum(sums)], [sum(counts)]
    scales = [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]
    dtypes = {name: spec.dtype for name, spec in specs_of(vector).items()}
    return assemble(coded, dtypes, per, scales, density, 1.0, origin_of(vector), {"method": method})
