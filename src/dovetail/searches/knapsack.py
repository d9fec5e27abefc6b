"""The best assignment for every budget: a knapsack in which each unit takes one of its choices (multiple choice).

    minimize    sum over units of score[unit][choice]        the loss that the scores predict
    subject to  sum over units of cost[unit][choice] <= budget

Dynamic programming over the units keeps every pair (cost, score) that no other one beats in both. The last list is the
whole front: one scoring and one pass solve the problem for all budgets, exactly. Layers of a model come in few sizes,
so that many sums are equal: 72 units with 16 choices leave some 30,000 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dovetail.errors import SearchError

Rows = Sequence[Sequence[float]]
"""A value for each unit and each of its choices."""
MOST_PAIRS = 1 << 20
"""Beyond, of the pairs whose costs differ by less than a millionth of the range, the one of least score is kept."""


class Knapsack:
    """The solutions for all budgets.

    scores  finite, smaller is better
    costs   at least 0, such as bytes
    errors  SearchError for a score that is not finite
    """

    def __init__(self, scores: Rows, costs: Rows) -> None:
        cost_n, score_n = np.zeros(1), np.zeros(1)
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []
        for unit, (row, prices) in enumerate(zip(scores, costs, strict=True)):
            score_c, cost_c = np.asarray(row, float), np.asarray(prices, float)
            if not (np.isfinite(score_c).all() and np.isfinite(cost_c).all()):
                rule = "scores and costs must be finite"
                raise SearchError(f"unit {unit}", found=f"{list(row)}"[:200], rule=rule, fix="check the model")
            all_cost = (cost_n[:, None] + cost_c).ravel()
            all_score = (score_n[:, None] + score_c).ravel()
            kept = _front(all_cost, all_score)
            if len(kept) > MOST_PAIRS:
                cell = (all_cost[kept] * (MOST_PAIRS / all_cost[kept[-1]])).astype(np.int64)
                kept = kept[np.append(np.diff(cell) > 0, True)]
            self._steps.append((kept // len(cost_c), kept % len(cost_c)))
            cost_n, score_n = all_cost[kept], all_score[kept]
        self.costs, self.scores = cost_n, score_n

    def solve(self, budget: float) -> list[int]:
        """Return the choice of each unit with the least sum of scores among those that fit into the budget.

        errors  SearchError for a budget below the cheapest choices
        """
        if not budget >= self.costs[0]:
            rule = f"the smallest assignment costs {self.costs[0]:,.10g}"
            raise SearchError("budget", found=f"{budget:,.10g}", rule=rule, fix="raise the budget")
        place = int(np.searchsorted(self.costs, budget, side="right")) - 1
        choices = []
        for parents, chosen in reversed(self._steps):
            choices.append(int(chosen[place]))
            place = int(parents[place])
        return choices[::-1]

    def front(self, budget: float, count: int) -> list[list[int]]:
        """Return the solutions of up to `count` budgets, evenly spaced up to this one, the smallest first."""
        least, most = float(self.costs[0]), min(budget, float(self.costs[-1]))
        found = [self.solve(least + share * (most - least)) for share in np.linspace(0, 1, count + 1)[1:-1]]
        found.append(self.solve(min(budget, most) if budget >= least else budget))
        return [choices for place, choices in enumerate(found) if choices not in found[:place]]


def _front(cost_n: np.ndarray, score_n: np.ndarray) -> np.ndarray:
    """Return the places of the pairs that no other one beats in both, by rising cost."""
    order = np.lexsort((score_n, cost_n))
    best = np.minimum.accumulate(score_n[order])
    return order[np.append(True, score_n[order][1:] < best[:-1])]
