"""Pareto rank and crowding distance (QR-Adaptor, Algorithms 1 and 2; Deb et al. 2002), vectorised.

a dominates b if a <= b in every objective and a < b in at least one. All objectives are minimized.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pareto_rank(losses_nm: NDArray[np.float64], violation_n: NDArray[np.float64] | None = None) -> NDArray[np.intp]:
    """Return the Pareto rank of each point; 1 is the rank of the nondominated ones (QR-Adaptor, Algorithm 1).

    losses_nm    (n, m)  objectives, smaller is better; without NaN
    violation_n  (n,)    total violation of the constraints, 0 or less if the point is feasible. A feasible point ranks
                         before every infeasible one, and infeasible ones rank by their violation (Deb et al. 2002, §VI)
    returns      (n,)    ranks from 1

    >>> pareto_rank(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]])).tolist()
    [1, 1, 2]
    """
    if violation_n is None:
        return _rank(losses_nm)
    ranks = np.zeros(len(losses_nm), dtype=np.intp)
    feasible = violation_n <= 0
    ranks[feasible] = _rank(losses_nm[feasible])
    ranks[~feasible] = ranks.max(initial=0) + _rank(violation_n[~feasible, None])
    return ranks


def _rank(losses_nm: NDArray[np.float64]) -> NDArray[np.intp]:
    earlier, later = losses_nm[:, None], losses_nm[None]
    dominates = np.all(earlier <= later, axis=-1) & np.any(earlier < later, axis=-1)
    dominators = dominates.sum(0)
    ranks = np.zeros(len(losses_nm), dtype=np.intp)
    rank = 0
    while (front := (dominators == 0) & (ranks == 0)).any():
        rank += 1
        ranks[front] = rank
        dominators -= dominates[front].sum(0)
    return ranks


def crowding_distance(losses_nm: NDArray[np.float64], rank_n: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the crowding distance of each point among the points of its rank (QR-Adaptor, Algorithm 2).

    losses_nm  (n, m)  objectives; without NaN
    rank_n     (n,)    Pareto ranks
    returns    (n,)    the sum over the objectives of the gap between the two neighbours, divided by the range of the
                       objective among the points of that rank. It is infinite at both ends of an objective; an
                       objective that is the same everywhere or infinite somewhere adds nothing else

    >>> crowding_distance(np.array([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]]), np.array([1, 1, 1])).tolist()
    [inf, 2.0, inf]
    """
    distance = np.zeros(len(losses_nm))
    for rank in np.unique(rank_n):
        members = np.flatnonzero(rank_n == rank)
        for loss_n in losses_nm[members].T:
            order = np.argsort(loss_n, kind="stable")
            sorted_n = loss_n[order]
            if np.isfinite(sorted_n).all() and sorted_n[-1] > sorted_n[0]:
                distance[members[order[1:-1]]] += (sorted_n[2:] - sorted_n[:-2]) / (sorted_n[-1] - sorted_n[0])
            distance[members[order[[0, -1]]]] = np.inf
    return distance
