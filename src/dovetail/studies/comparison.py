"""Whether two lines of a study differ: differences paired by seed, a paired t-test, an interval, Holm's correction.

The test is Student's t-test of the differences, whose mean is 0 under the null hypothesis. Where all differences are
equal, which happens on few records, their variance says nothing: the p-value is then that of the exact sign-flip test,
2 / 2^n. With one seed there is no p-value and no interval. All p-values of one study are corrected together (Holm
1979): the i-th smallest of m is multiplied by m - i + 1. Differences at several points that are tested together count
as independent, also those of one seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from dovetail.studies.axes import Value
from dovetail.studies.report import Difference, Result, Spread

LEVEL = 0.05
"""Two lines are told apart where the corrected p-value is at most this; intervals have a confidence of 1 - LEVEL."""
ALL = "all"
"""The value of the axes over which differences are pooled."""


def paired_test(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of paired differences; None for fewer than two.

    >>> paired_test([0.02, 0.02, 0.02])
    0.25
    """
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return None
    mean, sd = statistics.mean(differences), statistics.stdev(differences)
    if _equal(differences):
        return 2 / 2**n if mean else 1.0
    return float(2 * t.sf(abs(mean) / (sd / math.sqrt(n)), n - 1))


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of the mean difference from Student's t; None where all are equal."""
    from scipy.stats import t

    n = len(differences)
    if n < 2 or _equal(differences):
        return None
    mean = statistics.mean(differences)
    half = float(t.ppf(1 - LEVEL / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean - half, mean + half


def _equal(differences: Sequence[float]) -> bool:
    """Return whether two or more differences are equal but for rounding."""
    return statistics.stdev(differences) <= 1e-12 * max(map(abs, differences))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values with Holm's correction, in their order; None, where no test was possible, does not count.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, at) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - place) * p))
        found[at] = largest
    return found


def compare(
    results: Sequence[Result], pairs: Sequence[tuple[str, str]] | Mapping[str, Value]
) -> list[Difference]:  # fmt: skip
    """Return the differences of lines at the same point and task, where all runs of both have a score.

    pairs   (row, the row that is subtracted), or axis -> the value whose line is subtracted from those of other values
    returns one for each point; then, of several points, one for all of their differences together, unless a line stands
            on one side of several of them
    """
    found: list[Difference] = []
    together: dict[tuple[str, str, str, str], list[Difference]] = {}
    sides: dict[tuple[str, str, str, str], list[int]] = {}
    for ours, theirs, name, kind in _paired(results, pairs):
        a, b = ours.figure, theirs.figure
        if a.n == b.n > 0 and not ours.failed and not theirs.failed:
            values = [x - y for x, y in zip(a.values, b.values, strict=True)]
            one = _difference(ours.row, name, ours.task, theirs.point | ours.point, values, tested=len(values) > 1)
            found.append(one)
            key = ours.row, name, ours.task, kind
            together.setdefault(key, []).append(one)
            sides.setdefault(key, []).extend([id(ours), id(theirs)])
    for key, group in together.items():
        row, name, task, _ = key
        if len(group) > 1 and len(set(sides[key])) == 2 * len(group):
            values = [value for one in group for value in one.figure.values]
            tested = all(one.figure.n > 1 for one in group)
            found.append(_difference(row, name, task, _pooled([one.point for one in group]), values, tested=tested))
    corrected = holm([one.p for one in found])
    return [one.model_copy(update={"p_holm": p}) for one, p in zip(found, corrected, strict=True)]


def _difference(
    row: str, minus: str, task: str, point: dict[str, Value], values: list[float], *, tested: bool
) -> Difference:
    return Difference(
        row=row, minus=minus, task=task, point=point, figure=Spread.of(values),
        p=paired_test(values) if tested else None, interval=interval(values) if tested else None,
    )  # fmt: skip


def _pooled(points: list[dict[str, Value]]) -> dict[str, Value]:
    """Return the point that they share, with `ALL` on the axes along which they differ."""
    axes = dict.fromkeys(axis for point in points for axis in point)
    values = {axis: [point.get(axis, ALL) for point in points] for axis in axes}
    return {axis: each[0] if len(set(each)) == 1 else ALL for axis, each in values.items()}


def _paired(
    results: Sequence[Result], pairs: Sequence[tuple[str, str]] | Mapping[str, Value]
) -> Iterator[tuple[Result, Result, str, str]]:
    """Yield a line, the line that is subtracted, the name of that one, and what is pooled over points."""
    if isinstance(pairs, Mapping):
        ((axis, value),) = pairs.items()
        for ours, theirs in product(results, results):
            rest = {key: at for key, at in ours.point.items() if key != axis}
            same = theirs.point == rest | {axis: value} and ours.row == theirs.row and ours.task == theirs.task
            if same and ours.point.get(axis, value) != value:
                yield ours, theirs, f"{axis} {value}", str(ours.point[axis])
        return
    for first, second in pairs:
        for ours, theirs in product(results, results):
            same = all(ours.point.get(axis, value) == value for axis, value in theirs.point.items())
            if (ours.row, theirs.row) == (first, second) and same and ours.task == theirs.task:
                yield ours, theirs, second, ""
