"""Search for the ranks of a trained elastic adapter: hill climbing from the reference (SQFT §3.3, Algorithm 1).

Nothing is trained: a sub-adapter is a part of the super-adapter, scored on a small sample of the validation split.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from random import Random
from typing import TYPE_CHECKING

from torch import nn

from dovetail.chains.layer.elastic import Group, groups
from dovetail.errors import NotFinite, SearchError
from dovetail.progress import Bar
from dovetail.tasks.find import as_task
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import LOWER_IS_BETTER, Record, Task
from dovetail.training.hill_climb import Evaluation, hill_climb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ranks = tuple[int, ...]
"""A configuration: a rank for each group, in the order of `groups`."""

_TRIES = 20


@dataclass(frozen=True)
class RankSearch:
    """The result of a search over ranks; scores are values of `metric` on the proxy sample.

    start        score of the reference ranks
    best         score of the ranks found; never worse than `start`
    ranks        group -> rank found (`dovetail.chains.layer.elastic.groups`)
    evaluations  number of sub-adapters scored, including the reference
    samples      records of the proxy sample
    history      (turn, group -> rank, score) of each evaluation, in order
    """

    metric: str
    split: str
    start: float
    best: float
    ranks: dict[str, int]
    evaluations: int
    samples: int
    history: list[tuple[int, dict[str, int], float]]


def search_ranks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str | Sequence[Record],
    *,
    turns: int = 10,
    neighbours: int = 8,
    step: int = 2,
    samples: int = 100,
    split: str = "validation",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> RankSearch:
    """Search the ranks of the elastic adapters of the current stage, and leave the model at the best ones.

    task        its metric is maximized, or minimized if smaller is better
    turns       T of Algorithm 1: the maximum number of times that neighbours of the anchor are tried
    neighbours  N: neighbours per turn
    step        S: the maximum number of groups in which neighbours differ (`sample_neighbours`)
    samples     M: records of the proxy sample; all records if the split has fewer
    split       the split that they come from. A task without a validation split is refused; split="train" searches on
                the training records, which favours large ranks
    seed        of the sample and the neighbours
    errors      SearchError for a model without an elastic adapter, settings out of range, and where no configuration
                has a finite score; DataError for a missing split. The ranks of the model are then unchanged
    """
    numbers = {"turns": turns, "neighbours": neighbours, "step": step, "samples": samples}
    for name, value in numbers.items():
        if value < 1:
            rule = f"{name} must be at least 1"
            raise SearchError("search_ranks", found=f"{name}={value}", rule=rule, fix=f"pass {name}=1")
    elastic = groups(model)
    if not elastic:
        raise SearchError(
            "search_ranks",
            found="no elastic adapter in the current stage",
            rule="the search needs an elastic adapter, whose ranks it chooses from",
            fix="train with lora(r=16, elastic=[16, 12, 8])",
        )
    proxy = proxy_task(as_task(task, split), split, samples, seed)
    sign = -1.0 if proxy.metric in LOWER_IS_BETTER else 1.0
    random = Random(f"{seed} rank neighbours")
    choices = [group.ranks for group in elastic]
    before = tuple(group.rank for group in elastic)

    def score(ranks: Ranks) -> float:
        _use(elastic, ranks)
        try:
            scores = evaluate(model, tokenizer, proxy, split=split, batch_size=batch_size, progress=False)
        except NotFinite:
            return -math.inf
        return sign * scores[proxy.name][proxy.metric]

    with Bar(f"search ranks on {proxy.name}", 1 + turns * neighbours, shown=progress) as bar:

        def show(found: Evaluation[Ranks], anchor: Evaluation[Ranks]) -> None:
            bar.advance(1, f"{proxy.metric} {sign * max(found.score, anchor.score):.3f}")

        try:
            climb = hill_climb(
                tuple(group.reference for group in elastic),
                lambda anchor, visited: sample_neighbours(anchor, choices, neighbours, step, visited, random),
                score,
                turns,
                show,
            )
            if not math.isfinite(climb.best.score):
                raise SearchError(
                    f"search_ranks on {proxy.name}",
                    found=f"no finite {proxy.metric} at {len(climb.history)} configurations",
                    rule="at least one configuration must have a finite score",
                    fix="check the outputs of the model, or raise samples",
                )
        except BaseException:
            _use(elastic, before)
            raise
    _use(elastic, climb.best.configuration)
    return RankSearch(
        metric=proxy.metric,
        split=split,
        start=sign * climb.history[0].score,
        best=sign * climb.best.score,
        ranks=_named(elastic, climb.best.configuration),
        evaluations=len(climb.history),
        samples=len(proxy.split(split)),
        history=[(e.turn, _named(elastic, e.configuration), sign * e.score) for e in climb.history],
    )


def proxy_task(task: Task, split: str, samples: int, seed: int) -> Task:
    """Return the task with a sample of one split only, drawn by the seed, in the order of the split."""
    records = task.split(split)
    drawn = sorted(Random(f"{seed} proxy").sample(range(len(records)), min(samples, len(records))))
    return replace(task, splits={split: [records[index] for index in drawn]})


def sample_neighbours(
    anchor: Ranks, choices: Sequence[Ranks], count: int, step: int, visited: Collection[Ranks], random: Random
) -> list[Ranks]:
    """Return `count` S-step neighbours of the anchor that are not visited, or all of them if there are fewer.

    The paper does not define an S-step neighbour. Here, between one and S groups move, each to the next larger or the
    next smaller rank of its list. The number of groups is drawn first, uniformly; then the groups and the directions.

    choices  the ranks of each group in order
    """
    most = min(step, len(anchor))
    found: dict[Ranks, None] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            return list(found)
        moved = random.sample(range(len(anchor)), random.randint(1, most))
        neighbour = list(anchor)
        for group in moved:
            neighbour[group] = random.choice(_adjacent(anchor[group], choices[group]))
        if tuple(neighbour) != anchor and tuple(neighbour) not in visited:
            found[tuple(neighbour)] = None
    # Few are left: enumerate all.
    for neighbour in _all_neighbours(anchor, choices, most):
        if len(found) == count:
            break
        if neighbour not in visited:
            found[neighbour] = None
    return list(found)


def _adjacent(rank: int, choices: Ranks) -> Ranks:
    """Return the entries next to a rank in its list, or the rank itself if the list has no other."""
    at = choices.index(rank)
    return choices[max(0, at - 1) : at] + choices[at + 1 : at + 2] or (rank,)


def _all_neighbours(anchor: Ranks, choices: Sequence[Ranks], most: int) -> Iterator[Ranks]:
    movable = [group for group, ranks in enumerate(choices) if len(ranks) > 1]
    for size in range(1, min(most, len(movable)) + 1):
        for moved in combinations(movable, size):
            for ranks in product(*(_adjacent(anchor[group], choices[group]) for group in moved)):
                neighbour = list(anchor)
                for group, rank in zip(moved, ranks, strict=True):
                    neighbour[group] = rank
                yield tuple(neighbour)


def _use(elastic: Sequence[Group], ranks: Ranks) -> None:
    for group, rank in zip(elastic, ranks, strict=True):
        group.use_rank(rank)


def _named(elastic: Sequence[Group], ranks: Ranks) -> dict[str, int]:
    return {group.name: rank for group, rank in zip(elastic, ranks, strict=True)}
