"""Hill climbing over any space of configurations (SQFT, Algorithm 1).

anchor, visited = start, {start}
for each turn:
    candidates = N neighbours of the anchor that are not visited;  visited |= candidates
    if the best candidate is better than the anchor: anchor = it
the answer is the anchor
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Evaluation(Generic[T]):
    """A scored configuration, and its turn; the turn of the start is 0."""

    turn: int
    configuration: T
    score: float


@dataclass(frozen=True)
class Climb(Generic[T]):
    """The best evaluation of a climb, and all evaluations in order; `history[0]` is the start."""

    best: Evaluation[T]
    history: tuple[Evaluation[T], ...]


def hill_climb(
    start: T,
    sample_neighbours: Callable[[T, Collection[T]], Iterable[T]],
    evaluate: Callable[[T], float],
    turns: int,
    on_evaluation: Callable[[Evaluation[T], Evaluation[T]], None] | None = None,
) -> Climb[T]:
    """Climb from `start` for at most `turns` turns (SQFT, Algorithm 1).

    sample_neighbours  (anchor, visited) -> neighbours to try; visited ones and repeats among them are left out
    evaluate           configuration -> score, larger is better; one that is not finite is the worst. Called at most
                       once for each configuration: the visited set is the cache
    on_evaluation      called with each evaluation and the anchor's, before the anchor moves

    The anchor moves only to a strictly better score, and to the first of equal ones, so the result is never worse than
    the start. A turn without an unvisited neighbour ends the climb.

    >>> hill_climb(0, lambda anchor, visited: [anchor - 1, anchor + 1], lambda x: -abs(x - 3), turns=10).best.score
    0
    """
    scores: dict[T, float] = {}
    history: list[Evaluation[T]] = []

    def score(turn: int, configuration: T, anchor: Evaluation[T] | None) -> Evaluation[T]:
        value = evaluate(configuration)
        scores[configuration] = value if math.isfinite(value) else -math.inf
        found = Evaluation(turn, configuration, scores[configuration])
        history.append(found)
        if on_evaluation is not None:
            on_evaluation(found, anchor or found)
        return found

    anchor = score(0, start, None)
    for turn in range(1, turns + 1):
        sampled = dict.fromkeys(sample_neighbours(anchor.configuration, scores.keys()))
        candidates = [configuration for configuration in sampled if configuration not in scores]
        if not candidates:
            break
        best = max((score(turn, candidate, anchor) for candidate in candidates), key=lambda found: found.score)
        if best.score > anchor.score:
            anchor = best
    return Climb(anchor, tuple(history))
