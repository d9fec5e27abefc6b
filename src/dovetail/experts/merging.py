"""Merging of experts into one task vector, on their masks; each method is a small function of one tensor's masks.

  average          Σ x_i / n, or Σ w_i x_i / Σ w_i                            (Choshen et al. 2022)
  task_arithmetic  Σ w_i x_i                                                  (Ilharco et al. 2023)
  ties             trim; per value elect a sign; mean of the w_i x_i that have it    (Yadav et al. 2023)
  dare             Σ w_i drop(x_i) / density                                  (Yu et al. 2023)
  dare_ties        the same, with TIES' election and mean in place of the sum        (peft)

A tensor of an expert is one number and two masks, before and after trimming and dropping. No method decodes: it moves
bits, and adds ± that number where a bit is set. Sums are float32, added in the order of the experts. They equal those
of `peft.utils.merge_utils` on decoded float32 tensors, up to the order in which torch adds more than four.

Average and task arithmetic keep all values, and their result is dense where experts overlap little. TIES discards
values that disagree, which helps most with many experts. DARE needs only a seed, and adds noise. A new method is a
function with `@merge_method("name")`, in any module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.experts.codec.codec import decode_masks, word_count
from dovetail.experts.expert import Expert, check_density
from dovetail.experts.masks import Masks, elect, scaled_sum
from dovetail.experts.peft_adapters import difference
from dovetail.experts.vectors import Origin, Spec, TaskVector

Election = Literal["total", "frequency"]
_WHOLE = {
    "chain",
    "layers",
    "targets",
    "stage",
    "base_fingerprint",
    "chain_fingerprint",
    "quantizer",
    "ranks",
    "extracted",
}
"""Keys of an adapter.json that change it; also the seed, if values are differences to what it draws."""


@dataclass(frozen=True)
class MergeSettings:
    """The settings of a method.

    weights    one per expert; None: not given
    density    share to keep; None: not given
    election   of TIES
    generator  for random draws: seeded once, used by one tensor after the other
    """

    weights: tuple[float, ...] | None
    density: float | None
    election: Election
    generator: torch.Generator


Method = Callable[[Sequence[Masks], MergeSettings], Tensor]
"""Masks of one tensor, one per expert -> the merged tensor, float32. `Masks` hold a single tensor here."""
METHODS: dict[str, Method] = {}


def merge_method(name: str) -> Callable[[Method], Method]:
    """Register a method of `merge`."""

    def register(function: Method) -> Method:
        METHODS[name] = function
        return function

    return register


def merge(
    experts: Sequence[Expert],
    method: str = "average",
    *,
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    election: Election = "total",
    dtype: torch.dtype = torch.float32,
) -> TaskVector:
    """Merge several experts of one kind into one task vector.

    experts   with the same tensors, base and origin
    method    "average", "task_arithmetic", "ties", "dare", "dare_ties", or another registered method
    weights   one per expert; None: 1 each, which is the plain mean for average. Multiply a factor for all of them (λ of
              task arithmetic) into the weights. The election of TIES ignores weights, as in peft
    density   ties: share of each tensor's values to keep, by magnitude; None: all that the expert keeps. The kept
              values of an expert's tensor are equal: above the expert's own density nothing is trimmed, and below it
              `torch.topk` chooses among equals, as in peft. dare, dare_ties: probability of keeping a value, above 0
    seed      dare: Bernoulli tensors are drawn for the tensors in the order of their names, for each in the order of
              the experts, as peft does if it is called in this order after torch.manual_seed(seed)
    election  ties: sign of the sum of the values ("total") or of their signs ("frequency"); + if the sum is 0
    dtype     of the result; computed in float32
    returns   tensors by name, with the first expert's origin
    errors    DataError for no expert, experts of different tensors, bases or origins, an unknown method, invalid
              weights or another number of them, a density out of range, a scale beyond float32; LoadError for changed
              bytes
    """
    check_together(experts)
    if method not in METHODS:
        raise DataError("merge", found=f"method={method!r}", rule="method must be one of " + ", ".join(METHODS))
    if election not in get_args(Election):
        rule = "election must be one of " + ", ".join(get_args(Election))
        raise DataError("merge", found=f"election={election!r}", rule=rule, fix='pass election="total"')
    if density is not None:
        check_density("merge", density)
    given = None if weights is None else checked_weights(weights, len(experts))
    settings = MergeSettings(given, density, election, torch.Generator().manual_seed(seed))
    merged = {}
    for name in experts[0].coded:
        parts = [masks_of(expert, name) for expert in experts]
        merged[name] = METHODS[method](parts, settings).to(dtype)
    specs = {name: Spec(shape, dtype) for name, shape in experts[0].shapes.items()}
    return TaskVector(merged, experts[0].origin, specs)


@merge_method("average")
def average(parts: Sequence[Masks], settings: MergeSettings) -> Tensor:
    """Return the mean; weights are divided by their sum."""
    total = float(len(parts)) if settings.weights is None else math.fsum(settings.weights)
    if total == 0:
        raise DataError("merge, average", found="weights that add up to 0", rule="the sum of the weights must not be 0",
                        fix='pass method="task_arithmetic"')  # fmt: skip
    return weighted_sum(parts, settings.weights).div_(total)


@merge_method("task_arithmetic")
def task_arithmetic(parts: Sequence[Masks], settings: MergeSettings) -> Tensor:
    """Return the weighted sum."""
    return weighted_sum(parts, settings.weights)


@merge_method("ties")
def ties(parts: Sequence[Masks], settings: MergeSettings) -> Tensor:
    """Trim, elect, and return the mean of the values that agree with the election."""
    if settings.density is not None and settings.density < 1:
        parts = [trimmed(part, settings.density) for part in parts]
    return disjoint_mean(parts, settings.weights, settings.election)


@merge_method("dare")
def dare(parts: Sequence[Masks], settings: MergeSettings) -> Tensor:
    """Drop values at random, scale the rest up, and return the weighted sum."""
    return weighted_sum(_dropped(parts, settings), settings.weights)


@merge_method("dare_ties")
def dare_ties(parts: Sequence[Masks], settings: MergeSettings) -> Tensor:
    """Drop values at random, scale the rest up, and continue as TIES."""
    return disjoint_mean(_dropped(parts, settings), settings.weights, settings.election)


def weighted_sum(parts: Sequence[Masks], weights: Sequence[float] | None) -> Tensor:
    """Return the sum of weight · decoded tensor, float32, in the order of the experts; None: weights of 1."""
    (name,) = parts[0].shapes
    factors = [1.0] * len(parts) if weights is None else weights
    return scaled_sum([_weighted(part, factor) for part, factor in zip(parts, factors, strict=True)])[name]


def disjoint_mean(parts: Sequence[Masks], weights: Sequence[float] | None, election: Election) -> Tensor:
    """Return, for every value, Σ w_i x_i over the experts with the elected sign, divided by their number.

    0 if no expert has the elected sign (Yadav et al. 2023, Algorithm 1).
    """
    (name,) = parts[0].shapes
    minus = elect(parts, by="count").words[1] if election == "frequency" else packed(scaled_sum(parts)[name] < 0)
    agreeing = [Masks(np.stack([p.words[0] & ~minus, p.words[1] & minus]), p.shapes, p.scales) for p in parts]
    either = [np.stack([p.words[0] | p.words[1], np.zeros_like(minus)]) for p in agreeing]
    number = scaled_sum([Masks(words, parts[0].shapes, {name: 1.0}) for words in either])[name]
    return weighted_sum(agreeing, weights).div_(number.clamp_(min=1))


def trimmed(part: Masks, density: float) -> Masks:
    """Return an expert's tensor with at most int(density · n) values: `torch.topk` of the decoded magnitudes."""
    ((name, shape),) = part.shapes.items()
    most = int(density * math.prod(shape))
    if part.kept <= most:
        return part
    magnitudes = scaled_sum([Masks(np.stack([part.words[0] | part.words[1], np.zeros_like(part.words[0])]),
                                   part.shapes, {name: abs(part.scales[name])})])[name]  # fmt: skip
    chosen = torch.zeros(magnitudes.numel(), dtype=torch.bool)
    chosen[torch.topk(magnitudes.view(-1), most).indices] = True
    return Masks(part.words & packed(chosen), part.shapes, part.scales)


def _dropped(parts: Sequence[Masks], settings: MergeSettings) -> list[Masks]:
    density = settings.density
    if not density:
        rule = "density must be above 0 for dare"
        raise DataError("merge, dare", found=f"density={density}", rule=rule, fix="pass density=0.5")
    return list(parts) if density == 1 else [dropped(part, density, settings.generator) for part in parts]


def dropped(part: Masks, density: float, generator: torch.Generator) -> Masks:
    """Return an expert's tensor with each value kept with probability `density` and divided by it."""
    ((name, shape),) = part.shapes.items()
    drawn = torch.bernoulli(torch.full(shape, density), generator=generator)
    scale = torch.tensor(part.scales[name], dtype=torch.float32) / density
    return Masks(part.words & packed(drawn), part.shapes, {name: scale.item()})


def packed(tensor: Tensor) -> np.ndarray:
    """Return the mask of the nonzero values of a tensor: uint64, (words,)."""
    bits = np.packbits(tensor.reshape(-1).bool().numpy(), bitorder="little")
    words = np.zeros(word_count(tensor.numel()), np.uint64)
    words.view(np.uint8)[: len(bits)] = bits
    return words


def masks_of(expert: Expert, name: str) -> Masks:
    """Return the masks of one tensor, with a scale of at least 0.

    errors  LoadError for changed bytes, DataError for a scale beyond float32
    """
    coded, scale = expert.coded[name], expert.scales[name]
    single = torch.tensor(scale, dtype=torch.float32).item()
    if not math.isfinite(single):
        rule, fix = "a scale must fit float32, in which experts are merged", "call with_alpha with a smaller alpha"
        raise DataError(f"expert at {name}", found=f"scale {scale:g}", rule=rule, fix=fix)
    words = np.zeros((2, word_count(coded.numel)), np.uint64)
    if single:  # with scale 0, no value has a sign
        decode_masks(coded, words, 0, name, torch.get_num_threads())
    return Masks(words if single >= 0 else words[::-1], {name: coded.shape}, {name: abs(scale)})


def check_together(experts: Sequence[Expert]) -> None:
    """Raise DataError, naming the expert and the difference, unless all have the same tensors, base and origin."""
    if not experts:
        raise DataError("experts", found="none", rule="at least one expert is needed")
    first = experts[0]
    for number, expert in enumerate(experts):
        where = f"expert {number + 1} of {len(experts)}"
        if not isinstance(expert, Expert):
            raise DataError(where, found=f"a {type(expert).__name__}", rule="all must be experts",
                            fix="make it with experts.compress or experts.load")  # fmt: skip
        for name in sorted(first.shapes.keys() | expert.shapes.keys()):
            one, two = first.shapes.get(name), expert.shapes.get(name)
            if one != two:
                found, rule = _shape(two), f"it must be as in the first expert: {_shape(one)}"
                raise DataError(f"{where}, at {name}"[:600], found=found, rule=rule)
        _check_origins(where, first.origin, expert.origin)


def checked_weights(weights: Sequence[float], number: int) -> tuple[float, ...]:
    """Return the weights as floats. DataError unless there is one finite number per expert."""
    given = list(weights)
    if len(given) != number:
        raise DataError("weights", found=f"{len(given)} for {number} experts", rule="each expert must have one weight")
    for place, weight in enumerate(given):
        if isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)) or not math.isfinite(weight):
            where, rule = f"weight {place + 1} of {number}", "a weight must be a finite number"
            raise DataError(where, found=repr(weight)[:100], rule=rule, fix="pass weights=[1, 0.5]")
    return tuple(float(weight) for weight in given)


def _check_origins(where: str, one: Origin, two: Origin) -> None:
    parts: dict[str, tuple[Any, Any]] = {name: (getattr(one, name), getattr(two, name)) for name in
                                         ("base", "initial", "chain")}  # fmt: skip
    meant = _WHOLE | ({"seed"} if one.initial == "chain" else set())
    here, there = one.adapter or {}, two.adapter or {}
    for key in [*here, *(key for key in there if key not in here)]:
        if key in meant:
            parts[f"adapter's {key}"] = (here.get(key), there.get(key))
    if (wrong := difference(one.peft or {}, two.peft or {})) is not None:
        key, a, b = wrong
        parts[f"peft's {key}"] = (a, b)
    for label, (here, there) in parts.items():
        if _plain(here) != _plain(there):
            raise DataError(where, found=f"{label} {there!r}"[:300], rule=f"the first expert has {here!r}"[:300],
                            fix="merge experts of one base and one kind of adapter")  # fmt: skip


def _plain(value: Any) -> Any:
    """Return None for an empty value, which peft stores as empty or leaves out."""
    return None if isinstance(value, (Mapping, list)) and not value else value


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {list(shape)}"


def _weighted(part: Masks, weight: float) -> Masks:
    """Multiply scales by a weight, rounded to float32 before and after as in a decoded tensor."""
    with np.errstate(over="ignore"):
        scales = {name: float(np.float32(scale) * np.float32(weight)) for name, scale in part.scales.items()}
    for name, scale in scales.items():
        if not math.isfinite(scale):
            raise DataError(f"experts at {name}", found=f"weight {weight:g}, scale {part.scales[name]:g}",
                            rule="their product must fit float32")  # fmt: skip
    return Masks(part.words, part.shapes, scales)
