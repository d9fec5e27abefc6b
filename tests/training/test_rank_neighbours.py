"""Which neighbours the search for ranks looks at."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

import dovetail
import dovetail.training.rank_search as rank_search
from dovetail.chains.layer.elastic import groups
from dovetail.searches import search_ranks
from dovetail.training.rank_search import sample_neighbours
from small_models import SUMS, llama, make_tokenizer


@pytest.mark.parametrize("step", [1, 2, 3])
def test_neighbours_move_one_to_step_groups_each_number_as_often(step: int) -> None:
    anchor, choices, random = (4,) * 6, [(8, 6, 4, 3, 2)] * 6, Random(0)
    moved = Counter()
    for _ in range(600):
        (neighbour,) = sample_neighbours(anchor, choices, 1, step, (), random)
        changed = [rank for rank, start in zip(neighbour, anchor, strict=True) if rank != start]
        assert set(changed) <= {6, 3}
        moved[len(changed)] += 1
    assert set(moved) == set(range(1, step + 1))
    assert all(count == pytest.approx(600 / step, rel=0.2) for count in moved.values())


def test_search_moves_at_most_two_groups_at_a_time_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_search, "evaluate", lambda *_, **__: {"sums": {"exact_match": 0.0}})
    model = dovetail.apply(llama(), "lora(r=4, elastic=[4, 3, 2, 1])")
    start = {group.name: group.rank for group in groups(model)}
    for step, most in ((None, 2), (3, 3)):
        given = {} if step is None else {"step": step}
        found = search_ranks(model, make_tokenizer(), SUMS, turns=1, neighbours=40, progress=False, **given)
        moved = {sum(ranks[name] != start[name] for name in start) for _, ranks, _ in found.history}
        assert moved == set(range(most + 1))
