"""The knapsack is exact, for every budget."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.errors import SearchError
from dovetail.searches.knapsack import Knapsack

NUMBERS = st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 20)), min_size=1, max_size=4)


def total(rows, choices) -> float:
    return sum(row[choice] for row, choice in zip(rows, choices, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=4), st.integers(0, 90))
def test_no_assignment_within_the_budget_is_better(units, budget):
    scores, costs = [[s for s, _ in unit] for unit in units], [[c for _, c in unit] for unit in units]
    everything = [c for c in product(*(range(len(row)) for row in scores)) if total(costs, c) <= budget]
    knapsack = Knapsack(scores, costs)
    if not everything:
        with pytest.raises(SearchError, match="smallest assignment"):
            knapsack.solve(budget)
        return
    found = knapsack.solve(budget)
    assert total(costs, found) <= budget
    assert total(scores, found) == pytest.approx(min(total(scores, each) for each in everything))


def test_the_front_rises_and_ends_at_the_budget():
    random = np.random.default_rng(0)
    costs = [[2.0, 3.0, 4.0, 8.0]] * 30
    scores = [[importance * 4.0**-bits for bits in (2, 3, 4, 8)] for importance in random.random(30)]
    knapsack = Knapsack(scores, costs)
    front = knapsack.front(150, 5)
    sizes = [total(costs, each) for each in front]
    assert sizes == sorted(set(sizes))
    assert 145 <= sizes[-1] <= 150
    assert len(front) == 5
    assert knapsack.front(60, 5) == [[0] * 30]
    assert total(costs, knapsack.front(1e9, 3)[-1]) == 240


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(SearchError, match="finite"):
        Knapsack([[0.0, bad]], [[1, 2]])
    with pytest.raises(SearchError, match="raise the budget"):
        Knapsack([[0.0]], [[1]]).solve(float("nan"))
