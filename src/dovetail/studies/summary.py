"""The outcome of a study in words: what won under which constraint, and what cannot be told apart."""

from __future__ import annotations

from collections.abc import Callable

from dovetail.display.format import duration, size
from dovetail.studies.comparison import LEVEL, holm, paired_test
from dovetail.studies.report import StudyReport
from dovetail.studies.standing import AVERAGE, Board, Standing, boards
from dovetail.studies.tables import listed, spread

_LEAST: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bits_per_weight", "Fewest bits per weight", lambda value: f"{value:.2f} bits per weight"),
    ("nbytes", "Smallest model in memory", size),
    ("peak_memory_nbytes", "Least memory of training", size),
    ("training_seconds", "Least time of training", duration),
)


def summary(report: StudyReport) -> list[str]:
    """Return the sentences: of the average over tasks, then of each task in short; of each task without an average.

    A line with a run that failed or has no finite score wins nothing. The line with the best mean is compared with
    every other one by the test of `dovetail.studies.comparison`, corrected over these.
    """
    found = []
    every = boards(report)
    for board in reversed(every):
        if board.task == AVERAGE or every[-1].task != AVERAGE:
            place = f" on the average of {len(every) - 1} tasks" if board.task == AVERAGE else f" on {board.task}"
            found += _sentences(board, place if len(every) > 1 else "")
        else:  # in short
            found.append(" ".join(_quality(board, f" on {board.task}")))
    return found


def told_apart(board: Board, best: Standing) -> tuple[list[Standing], list[Standing], list[Standing]]:
    """Return the other lines that differ from the best one, those that may not, and those without a test."""
    others = [line for line in board.scored if line is not best]
    p_values = holm([paired_test(_differences(best, line)) for line in others])
    apart = [line for line, p in zip(others, p_values, strict=True) if p is not None and p <= LEVEL]
    close = [line for line, p in zip(others, p_values, strict=True) if p is not None and p > LEVEL]
    return apart, close, [line for line, p in zip(others, p_values, strict=True) if p is None]


def _differences(one: Standing, other: Standing) -> list[float]:
    return [score - other.scores[seed] for seed, score in one.scores.items() if seed in other.scores]


def _quality(board: Board, place: str) -> list[str]:
    """Return which line is the best, and from which others it can be told apart."""
    scored = board.scored
    if not scored:
        return [f"No line has a score{place}."]
    best = scored[0]
    found = [f"Best {board.title}{place}: {_named(board, best)}."]
    apart, close, untested = told_apart(board, best)
    equal = [line for line in untested if line.score == best.score]
    if close:
        found.append(f"It cannot be told apart from {listed([line.name for line in close])}.")
    if apart:
        found.append(f"It differs from {listed([line.name for line in apart])} (p at most {LEVEL}, corrected).")
    if untested:
        said = "With one seed no test is possible, so no difference to the other lines is claimed."
        found.append(said if len(untested) == len(scored) - 1 else f"No test is possible for {len(untested)} lines.")
    if equal:
        found.append(f"The same score has {listed([line.name for line in equal])}.")
    return found


def _sentences(board: Board, place: str) -> list[str]:
    """Return all that is said of a board."""
    scored, found = board.scored, _quality(board, place)
    missing = [line.name for line in board.lines if line.score is None]
    lost = [f"Without a score for every seed, and therefore in no comparison: {listed(missing)}."] if missing else []
    if not scored:
        return [*found, *lost]
    best = scored[0]
    _, close, _ = told_apart(board, best)
    for measure, title, written in _LEAST:
        known = [line for line in scored if line.means[measure] is not None]
        if len({line.means[measure] for line in known}) > 1:
            least = min(known, key=lambda line: line.means[measure] or 0.0)  # of equal ones, the best score comes first
            found.append(f"{title}: {least.name}, {written(least.means[measure] or 0.0)}, with {_score(board, least)}.")
            level = [line for line in [best, *close] if line.means[measure] is not None]
            cheapest = min(level, key=lambda line: line.means[measure] or 0.0, default=None)
            if close and cheapest is not None and cheapest is not least and len(level) > 1:
                told = written(cheapest.means[measure] or 0.0)
                found.append(f"{title} among those that cannot be told apart from the best: {cheapest.name}, {told}.")
    front = board.front("nbytes")
    if len(front) > 1:
        steps = [f"{size(line.means['nbytes'] or 0.0)} {line.name} ({_score(board, line)})" for line in front]
        found.append(f"Best {board.title} at each size in memory: {'; '.join(steps)}.")
    return found + lost


def _score(board: Board, line: Standing) -> str:
    return spread(board.metric, line.figure)


def _named(board: Board, line: Standing) -> str:
    count = line.figure.n
    return f"{line.name}, {_score(board, line)} ({count} seed{'s' if count > 1 else ''})"
