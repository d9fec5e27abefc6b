"""Sparsity per layer: OWL, by outlying scores.

    D_g = fraction of scores above 5 times their layer's mean        s_g = s + c · (mean D - D_g)

Source: Yin et al. 2023 (Outlier Weighed Layerwise Sparsity), §3. Layers with many outliers lose most by pruning, so
they get fewer zeros; all layers of a transformer block have the same sparsity. c is the largest that keeps every s_g
within s ± spread (λ = 0.08 in the paper), so order and mean hold at any sparsity. The authors' code stretches the D_g
over a range of 2λ, which exceeds s ± λ where one block has far more outliers, counts outliers against the block's mean,
and weighs blocks equally.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_LEAST_SHARE = 0.1
"""A group keeps at least this share of the mean density 1 - s: near s = 1 the spread would take everything."""


def outlier_ratio(scores_oi: Tensor, threshold: float = 5.0) -> float:
    """Return the fraction of scores above threshold times their mean.

    scores_oi  (o, i) any float, not negative

    >>> outlier_ratio(torch.tensor([[1.0] * 9 + [91.0]]))
    0.1
    """
    mean = scores_oi.mean(dtype=torch.float64)
    return int((scores_oi > threshold * mean).sum()) / scores_oi.numel()


def allocate(
    ratios: Mapping[str, float],
    weights: Mapping[str, int],
    groups: Mapping[str, str],
    sparsity: float,
    spread: float = 0.08,
) -> dict[str, float]:
    """Return the sparsity of each layer, lower where its group's outlier ratio is higher, with the wanted mean.

    ratios    layer -> `outlier_ratio` of its scores
    weights   layer -> number of its weights
    groups    layer -> its transformer block; any other layer is a group of its own
    sparsity  wanted mean over all weights, in [0, 1)
    spread    the largest distance of a group's sparsity from the mean
    returns   layer -> sparsity, in [0, 1) and in sparsity ± spread; all equal where the ratios are equal

    >>> found = allocate({"a": 0.0, "b": 0.1}, {"a": 200, "b": 100}, {}, 0.5)
    >>> {name: round(sparsity, 4) for name, sparsity in found.items()}
    {'a': 0.54, 'b': 0.42}
    """
    group_of = {name: groups.get(name, name) for name in ratios}
    sizes: dict[str, int] = dict.fromkeys(group_of.values(), 0)
    outliers: dict[str, float] = dict.fromkeys(group_of.values(), 0.0)
    for name, group in group_of.items():
        sizes[group] += weights[name]
        outliers[group] += weights[name] * ratios[name]
    ratio = {group: outliers[group] / sizes[group] for group in sizes}
    if math.isclose(min(ratio.values()), max(ratio.values()), rel_tol=1e-9, abs_tol=1e-12):
        return dict.fromkeys(ratios, sparsity)
    mean = math.fsum(outliers.values()) / sum(sizes.values())
    fewest, most = min(ratio.values()), max(ratio.values())
    up, down = mean - fewest, most - mean
    c = min(spread / max(up, down), (1 - _LEAST_SHARE) * (1 - sparsity) / up, sparsity / down)
    return {name: max(0.0, sparsity + c * (mean - ratio[group])) for name, group in group_of.items()}
