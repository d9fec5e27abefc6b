"""The selection of the weights with the highest scores, with an exact number of zeros.

Of equal scores, both selections prune the first. Scores may be infinite, but not NaN.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def keep_top(scores_gn: Tensor, sparsity: float) -> Tensor:
    """Keep all but the round(sparsity · n) lowest scores of each row, exactly; of equal scores, prune the first.

    scores_gn  (groups, n) any float dtype
    returns    (groups, n) bool, True where a weight stays

    >>> keep_top(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), 0.25)
    tensor([[ True, False,  True,  True]])
    """
    n = scores_gn.shape[1]
    zeros = round(sparsity * n)
    if not zeros:
        return torch.ones_like(scores_gn, dtype=torch.bool)
    threshold_g1 = _kth_lowest(scores_gn, zeros)
    keep = scores_gn > threshold_g1
    missing_g = n - zeros - keep.sum(1)
    rows = missing_g.nonzero()[:, 0]
    if len(rows):  # several weights at the threshold: the last ones stay
        tied = scores_gn[rows] == threshold_g1[rows]
        go = tied.sum(1) - missing_g[rows]
        keep[rows] |= tied & (tied.cumsum(1) > go[:, None])
    return keep


def keep_pattern(scores_oi: Tensor, n: int, m: int) -> Tensor:
    """Keep the n best of every m consecutive inputs, exactly; of equal scores, prune the first.

    scores_oi  (o, i) any float dtype; m divides i
    n, m       1 <= n < m <= 128
    returns    (o, i) bool, True where a weight stays

    >>> keep_pattern(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), 2, 4)
    tensor([[ True, False,  True, False]])
    """
    place_mw = scores_oi.reshape(-1, m).t().contiguous()  # w: windows
    better = torch.zeros(place_mw.shape, dtype=torch.uint8, device=scores_oi.device)
    for apart in range(1, m):  # each pair of places once; 3 to 4 times as fast as sorting windows of 4
        later = place_mw[apart:] >= place_mw[:-apart]
        better[:-apart] += later
        better[apart:] += ~later
    return (better < n).t().reshape(scores_oi.shape)


def _kth_lowest(scores_gn: Tensor, k: int) -> Tensor:
    """Return the k-th lowest score of each row, from 1: (groups, 1), the scores' dtype."""
    if scores_gn.device.type != "cpu":
        return torch.kthvalue(scores_gn, k, dim=1, keepdim=True).values
    # On CPU a tenth of torch.kthvalue's time, which moreover is quadratic on falling rows: minutes for 3 million.
    wide = scores_gn.detach().to(torch.promote_types(scores_gn.dtype, torch.float32)).numpy()
    return torch.from_numpy(np.partition(wide, k - 1, axis=1)[:, k - 1 : k].copy()).to(scores_gn.dtype)
