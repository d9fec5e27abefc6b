"""A layer's base and the initial parameters of an adapter, chosen together (`Adapter.decompose`).

    base = Q(W - taken),   W ≈ base + what the adapter adds at its start

The adapter sees the quantizer as a function. What it takes from W is a low rank, computed once: with it, the base is
made again bit for bit, on any processor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.chains.layer.base import Base
from dovetail.chains.layer.linear import adapter_dtype
from dovetail.chains.link import Adapter, Quantizer
from dovetail.chains.statistics import InputStatistics
from dovetail.chains.terms import LowRank, without


@torch.no_grad()
def decompose(
    base: Base, link: Adapter, quantizer: Quantizer | None, inputs: InputStatistics | None, *, pruned: bool
) -> tuple[LowRank | None, dict[str, Tensor]]:
    """Return what `link` takes from the weight of a dense base, and its initial parameters; nothing is changed.

    quantizer  that comes before the link in its stage; None: the base stays dense
    inputs     statistics of the layer's input, for the quantizer
    pruned     whether zeros of the weight are those of a pruner, which the base keeps
    """
    weight = base.matrix()
    wide = adapter_dtype(base.dtype)

    def quantize(part_oi: Tensor) -> Tensor:
        part_oi = _with_zeros(part_oi, weight, pruned=pruned)
        if quantizer is not None:
            return quantizer.quantize(part_oi, inputs).dequantize(torch.empty_like(part_oi, dtype=wide))
        return part_oi.to(wide)

    taken, values = link.decompose(weight.to(wide), quantize)
    if taken is not None:
        taken = LowRank(taken.a_ri.to(wide), taken.b_or.to(wide))
    return taken, {name: value.to(base.device, wide) for name, value in values.items()}


@torch.no_grad()
def make_base(
    base: Base,
    taken: LowRank | None,
    quantizer: Quantizer | None,
    inputs: InputStatistics | None,
    *,
    pruned: bool,
    keep_start: bool,
) -> None:
    """Replace a dense base by the one that `decompose` chose: the weight less what was taken, then quantized."""
    weight = base.matrix()
    rest = _with_zeros(without(weight.to(adapter_dtype(base.dtype)), taken), weight, pruned=pruned)
    if quantizer is None:
        base.set_dense(rest)
    else:
        base.quantize(quantizer, inputs, keep_start, rest)


def _with_zeros(part_oi: Tensor, weight_oi: Tensor, *, pruned: bool) -> Tensor:
    """Return a part of the weight in the weight's dtype, which is rounded next, with the pruner's zeros."""
    part_oi = part_oi.to(weight_oi.dtype)
    return torch.where(weight_oi == 0, 0, part_oi) if pruned else part_oi
