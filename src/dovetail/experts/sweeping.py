"""Choice of density and alpha: pairs are scored on validation records, poor ones only on some (ComPEFT §2.1, §3.1).

The task vector is compressed once per density; its alphas share the bytes (`Expert.with_alpha`). If the score comes in
parts, the points race: all are scored on the first few parts, then on twice as many, and so on. After each round a
point is stopped if it is significantly behind the best. The test uses differences on the same parts, d_1 … d_m:
mean(d) + t(m) · sd(d) / sqrt(m + 1) < 0, with Student's t at the given certainty. One more difference of 0 enters mean
and sd, so that a few equal differences are not significant.

For bases of 13 B parameters and more, at densities up to 0.2, alpha = 1 needs no sweep (§4.2; `default_alpha`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.stats import t as student
from torch import Tensor, nn

from dovetail.display.format import format_score, metric_name
from dovetail.display.style import COLOURS, INK, SOFT
from dovetail.errors import DataError, NotFinite
from dovetail.experts.expert import Expert, compress
from dovetail.experts.live.activate import activate, deactivate
from dovetail.files import write_bytes
from dovetail.progress import Bar
from dovetail.tasks.find import as_task
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import LOWER_IS_BETTER, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10)
"""Grids of the paper (§3.1)."""
_FIRST = 4  # parts of the first round
_PART, _MOST_PARTS = 16, 16  # least records of a part; most parts
_MEANS = ("accuracy", "exact_match")


@dataclass(frozen=True)
class Score:
    """A score in parts, each the mean over some records; higher is better.

    of       function of an expert, a first and a last part (exclusive); returns one float per part
    sizes    records of each part
    metric   name for tables and plots
    """

    of: Callable[[Expert, int, int], Sequence[float]]
    sizes: tuple[int, ...]
    metric: str = "score"


@dataclass(frozen=True)
class Point:
    """A density and an alpha, with their score.

    score    mean over the scored records
    records  number of scored records
    stopped  whether the point was stopped before it was scored on all records
    nbytes   size of the expert's file
    """

    density: float
    alpha: float
    score: float
    records: int
    stopped: bool
    nbytes: int


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    points   all points, by density and alpha
    best     of those scored on all records: the highest score, then the lowest density, then the middle alpha
    expert   the task vector, compressed with the best density and alpha
    metric   name of the score
    """

    points: tuple[Point, ...]
    best: Point
    expert: Expert = field(repr=False)
    metric: str = "score"

    def plot(self, path: str | Path, *, original: float | None = None) -> Path:
        """Plot score against alpha as PNG, one line per density (Figure 6), stopped points hollow, the best ringed.

        original  score of the uncompressed task vector, drawn as a dashed line
        """
        from dovetail.display.plots import empty, frame_lines, png  # imports matplotlib

        share = 100 if format_score(self.metric, 0.0).endswith("%") else 1
        drawing, axes = empty()
        for number, density in enumerate(sorted({point.density for point in self.points})):
            line = [p for p in self.points if p.density == density and math.isfinite(p.score)]
            x, y = [point.alpha for point in line], [share * point.score for point in line]
            colour, dash = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
            axes.plot(x, y, dash, color=colour, linewidth=1.8, label=f"density {density:g}")
            fill = ["white" if point.stopped else colour for point in line]
            axes.scatter(x, y, s=22, facecolors=fill, edgecolors=colour, linewidths=1.2, zorder=3)
        if math.isfinite(self.best.score):
            said = f"{format_score(self.metric, self.best.score)}, density {self.best.density:g}"
            axes.scatter(self.best.alpha, share * self.best.score, s=120, facecolors="none", edgecolors=INK, zorder=4,
                         label=f"best: {said}")  # fmt: skip
        if any(point.stopped for point in self.points):
            axes.scatter([], [], s=22, facecolors="white", edgecolors=SOFT, linewidths=1.2, label="stopped early")
        if original is not None:
            axes.axhline(share * original, color=SOFT, linestyle="--", linewidth=1.2, label="uncompressed")
        alphas = sorted({point.alpha for point in self.points})
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        frame_lines(axes, "alpha", metric_name(self.metric) + (" (%)" if share == 100 else ""))
        path = Path(path)
        write_bytes(path, png(drawing))
        return path


@dataclass
class _Racer:
    """A point in the race, with its scores so far."""

    density: float
    expert: Expert
    scores: list[float] = field(default_factory=list)
    stopped: bool = False


def sweep(
    vector: Mapping[str, Tensor],
    score: Score | Callable[[Expert], float],
    *,
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
    scale: Literal["vector", "tensor"] = "vector",
    certainty: float = 0.99,
    progress: bool = True,
) -> Sweep:
    """Score every density with every alpha, and return all scores and the best point.

    vector     a task vector, as for `compress`
    score      function of an expert, higher is better; a `Score` (`scorer` makes one of a task) lets points race
    certainty  confidence with which a point must be worse than the best to be stopped, 0.5 to 1; 1: none is stopped
    progress   show a bar if the sweep takes longer than 3 s
    errors     DataError for empty grids, a density, alpha or certainty out of range, and as of `compress`
    """
    if not densities or not alphas:
        found = "no densities" if alphas else "no alphas"
        raise DataError("sweep", found=found, rule="a sweep needs at least one density and one alpha",
                        fix="omit the argument for the paper's grid")  # fmt: skip
    if not 0.5 <= certainty <= 1:
        raise DataError("sweep", found=f"certainty={certainty}", rule="certainty must be from 0.5 to 1")
    parts = score if isinstance(score, Score) else Score(lambda expert, first, last: [score(expert)], (1,))
    racers = []
    for density in sorted(set(densities)):
        made = compress(vector, density, 1.0, scale)
        racers += [_Racer(density, made.with_alpha(alpha)) for alpha in sorted(set(alphas))]
    _race(racers, parts, certainty, progress)
    points = {id(racer): _point(racer, parts.sizes) for racer in racers}
    finished = [racer for racer in racers if not racer.stopped]
    top = max(_mean(racer.scores, parts.sizes) for racer in finished)
    if not math.isfinite(top):
        found, rule = f"no finite score at {len(racers)} points", "at least one point must have a finite score"
        raise DataError("sweep", found=found, rule=rule, fix="pass smaller alphas, or check the model and the task")
    equal = [racer for racer in finished if _mean(racer.scores, parts.sizes) == top]
    lowest = min(racer.density for racer in equal)  # the size also depends on the digits in the header
    plateau = sorted((r for r in equal if r.density == lowest), key=lambda racer: racer.expert.alpha)
    best = plateau[(len(plateau) - 1) // 2]  # the middle: beyond the ends the score falls
    return Sweep(tuple(points.values()), points[id(best)], best.expert, parts.metric)


def _race(racers: list[_Racer], score: Score, certainty: float, progress: bool) -> None:
    """Score all points on more and more parts, and stop those that are significantly behind."""
    total, last = len(score.sizes), 0
    with Bar("sweep", len(racers) * sum(score.sizes), shown=progress) as bar:
        while last < total:
            first, last = last, min(total, max(_FIRST, 2 * last))
            for racer in racers:
                if racer.stopped:
                    bar.advance(sum(score.sizes[first:last]))
                    continue
                racer.scores += [float(value) for value in score.of(racer.expert, first, last)]
                note = f"density {racer.density:g}, alpha {racer.expert.alpha:g}"
                bar.advance(sum(score.sizes[first:last]), note=note)
            running = [racer for racer in racers if not racer.stopped]
            best = max(running, key=lambda racer: _mean(racer.scores, score.sizes))
            if last < total:
                for racer in running:
                    racer.stopped = racer is not best and behind(racer.scores, best.scores, certainty)


def behind(scores: Sequence[float], best: Sequence[float], certainty: float) -> bool:
    """Return whether scores are significantly below others on the same parts (test in the module's docstring).

    certainty  confidence of the test for normal differences; 1 always returns False
    """
    if not np.isfinite(scores).all():
        return bool(np.isfinite(best).all()) and certainty < 1
    if len(scores) < _FIRST or certainty == 1:
        return False
    differences = np.append(np.subtract(scores, best), 0.0)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(differences.mean() + student.ppf(certainty, len(scores)) * error < 0)


def scorer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | str,
    *,
    split: str = "validation",
    limit: int | None = None,
    batch_size: int = 64,
    max_length: int = 1024,
) -> Score:
    """Return a score for `sweep`: activate an expert in the model, evaluate it on a task, and deactivate it.

    model    that can carry the expert: with its chain, with its peft adapter, or the base of a fully fine-tuned model.
             Afterwards as after `deactivate`: a chain's links have their initial values
    task     or the name of a playground task; the score is its metric, negated if lower is better
    split    of the task
    limit    number of its first records to use; None: all of them
    returns  up to 16 parts of at least 16 records if the score is a mean over records (for perplexity, minus nats per
             token, by parts); one part for correlations
    errors   DataError for a missing split, or a limit below 1; later those of `activate` and `evaluate`
    """
    task = as_task(task)
    if limit is not None and limit < 1:
        raise DataError("scorer", found=f"limit={limit}", rule="limit must be at least 1")
    records = task.split(split)[:limit]
    pooled = task.metric in _MEANS or task.metric in LOWER_IS_BETTER
    number = min(_MOST_PARTS, max(1, len(records) // _PART)) if pooled else 1
    examples = {name: task.split(name) for name in [task.scoring.shots_split] if task.scoring.shots}
    tasks = [replace(task, splits={**examples, split: records[part::number]}) for part in range(number)]
    sign, key = (-1, "nats_per_token") if task.metric in LOWER_IS_BETTER else (1, task.metric)

    def of(expert: Expert, first: int, last: int) -> list[float]:
        activate(model, expert, verified=True)  # just coded; decoding detects later changes
        try:
            found = [
                evaluate(model, tokenizer, each, split=split, batch_size=batch_size, max_length=max_length,
                         progress=False)[task.name][key]
                for each in tasks[first:last]
            ]  # fmt: skip
        except NotFinite:
            return [-math.inf] * (last - first)
        finally:
            deactivate(model)
        return [sign * value for value in found]

    return Score(
        of, tuple(len(each.split(split)) for each in tasks), task.metric if sign > 0 else "minus nats per token"
    )


def default_alpha(parameters: int, density: float) -> float | None:
    """Return 1.0 if alpha = 1 needs no sweep, else None.

    In the paper this holds for bases of 13 B parameters and more, at densities up to 0.2 (ComPEFT §4.2).

    >>> default_alpha(13_000_000_000, 0.2), default_alpha(7_000_000_000, 0.05)
    (1.0, None)
    """
    return 1.0 if parameters >= 13e9 and density <= 0.2 else None


def _mean(scores: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean over records; minus infinity if it is not finite."""
    seen = sizes[: len(scores)]
    mean = sum(score * size for score, size in zip(scores, seen, strict=True)) / max(1, sum(seen))
    return mean if math.isfinite(mean) else -math.inf


def _point(racer: _Racer, sizes: Sequence[int]) -> Point:
    seen = sum(sizes[: len(racer.scores)])
    return Point(
        racer.density, racer.expert.alpha, _mean(racer.scores, sizes), seen, racer.stopped, racer.expert.nbytes
    )
