"""The tables of a study, as texts with the numbers behind them; and on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from dovetail.display.format import SHARES, duration, format_score, metric_name, percent, size
from dovetail.display.tables import print_table
from dovetail.studies.axes import Value
from dovetail.studies.matrix import label
from dovetail.studies.report import Event, Result, Spread, StudyReport
from dovetail.studies.standing import AVERAGE, Board, Standing, boards

_LISTED = 4
"""Names in a list before the rest is counted."""
NOTES = {
    "quality": "Mean ± sample standard deviation over n seeds. Zeros: measured sparsity of the weights of the target "
    "layers. Mergeable: the merge was run, and it changed no weight, no logit, no zero and no score.",
    "lossy": " Merged anyway: the score after a lossy merge, which re-imposes zeros and grid.",
    "stable": " Without diverged: the same without the runs whose loss rose or was not finite.",
    "average": "Scores are averaged over the tasks seed by seed: mean ± sample standard deviation over n seeds.",
    "sizes": "Means over the seeds. Sizes of the whole model in memory: before anything, pruned and quantized but not "
    "tuned, and as shown. Bits per weight: of the target layers. Bit reduction: nonzero bits of the target layers and "
    "their adapters against 16 bits per weight. Share: of all parameters, adapters included. Adapter: its file, and "
    "the trained parameters at 16 bits.",
    "training": "Means over the seeds. Peak memory: live tensors of the first training steps, or allocated memory on a "
    "GPU; planned: predicted from the configuration alone. Time: wall time of training, and of a step on average. "
    "Diverged: runs whose loss was not finite, or higher at the end than at the start.",
    "cost": "First seed. Storage: weights on disk, as shipped. Step: processor seconds of a training step. Speeds: "
    "tokens per second of processor time with one thread, medians of interleaved rounds. Memory: peak of live "
    "tensors, including the model.",
    "compare": "Seeds are paired: mean ± standard deviation of the differences, and the 95 % confidence interval of "
    "their mean. p: paired t-test, and corrected for all tests of this table (Holm); none with one seed.",
}


@dataclass(frozen=True)
class Shown:
    """A cell of a table: its text, and the number behind it, by which a page sorts."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table. The first `words` columns hold text, the others numbers. A head may have two lines."""

    title: str
    heads: list[str]
    rows: list[list[Shown]]
    words: int
    note: str
    remarks: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[list[str]]:
        """The rows as texts."""
        return [[cell.text for cell in row] for row in self.rows]


def tables(report: StudyReport) -> list[Table]:
    """Return the tables of quality on each task and on average, and of cost and differences where asked for."""
    every = boards(report)
    found = [_quality(report, board, number == 0) for number, board in enumerate(every) if board.task != AVERAGE]
    found += [_average(report, board) for board in every if board.task == AVERAGE]
    if report.cost:
        found.append(_cost(report))
    if report.compare:
        found.append(_compare(report))
    return found


def measure_tables(report: StudyReport) -> list[Table]:
    """Return the tables of the measures of every run: sizes and parameters, and memory and time of training."""
    every = boards(report)
    shown, found = [board for board in every if board.task == AVERAGE] or every, []
    if report.cells:
        found.append(_sizes(report, shown))
    if any(cell.steps for cell in report.cells):
        found.append(_training(report, shown))
    return found


def spread(metric: str, value: Spread, *, signed: bool = False) -> str:
    """Format a mean and its deviation, 97.3 ± 1.7 %: shares in percent, differences of shares (signed) in points."""
    if value.mean is None:
        return "–"
    share = metric in SHARES
    scale, digits = (100, 1) if share else (1, 3)
    text = f"{scale * value.mean:{'+' if signed else ''}.{digits}f}"
    if value.sd is not None:
        text += f" ± {scale * value.sd:.{digits}f}"
    return text + ((" points" if signed else " %") if share else "")


def _text(*texts: str) -> list[Shown]:
    return [Shown(text) for text in texts]


def _number(value: float | None, text: str) -> Shown:
    """Return a cell of a number; a number that is not finite is shown as missing."""
    return Shown("–") if value is None or not math.isfinite(value) else Shown(text, value)


def _bytes(value: float | None) -> Shown:
    return _number(value, size(value or 0))


def _axes(report: StudyReport, points: Sequence[dict[str, Value]]) -> tuple[list[str], list[list[Shown]]]:
    """Return the titles of the axes, and the values of each line on them."""
    axes = [axis for axis in report.vary if any(axis in point for point in points)]
    return axes, [[_axis_value(point.get(axis)) for axis in axes] for point in points]


def _axis_value(value: Value | None) -> Shown:
    return Shown("–" if value is None else str(value), None if isinstance(value, str) else value)


def _quality(report: StudyReport, board: Board, first: bool) -> Table:
    """Return the table of one task; that of the first one lists the points that were not run."""
    metric, results = board.metric, [line.results[0] for line in board.lines]
    axes, values = _axes(report, [result.point for result in results])
    lossy, unstable = any(result.merged_lossy for result in results), any(result.stable for result in results)
    heads = ["row", *axes, "mergeable", "final\nprecision", "zeros", board.title, "n"]
    heads += [*(["merged\nanyway"] if lossy else []), *(["without\ndiverged"] if unstable else [])]
    rows = []
    for result, at in zip(results, values, strict=True):
        mergeable = {True: "yes", False: "no", None: "–"}[result.mergeable]
        told = spread(metric, result.figure) if result.figure.n or not result.failed else "failed"
        more = [*([result.merged_lossy] if lossy else []), *([result.stable or result.figure] if unstable else [])]
        rows.append([
            Shown(result.row), *at, *_text(mergeable, result.precision or "–"),
            _number(result.sparsity, percent(result.sparsity or 0)), Shown(told, result.figure.mean),
            Shown(str(result.figure.n), result.figure.n),
            *(Shown("") if one is None else Shown(spread(metric, one), one.mean) for one in more),
        ])  # fmt: skip
    task = board.task if len({result.task for result in report.results}) > 1 else report.task
    note = NOTES["quality"] + (NOTES["lossy"] if lossy else "") + (NOTES["stable"] if unstable else "")
    remarks = [remark for result in results for remark in _remarks(report, result)] + _unmergeable(results)
    illegal = [f"{label(one.row, one.point)} was not run, because it is illegal: {one.why}" for one in report.illegal]
    title = f"{board.title} on {task}"
    return Table(title, heads, rows, 3 + len(axes), note, [*remarks, *(illegal if first else [])])


def _remarks(report: StudyReport, result: Result) -> list[str]:
    name = label(result.row, result.point)
    remarks = [f"{name}, seed {one.seed} failed: {' '.join(one.problem.split())}" for one in result.failed]
    remarks += [
        f"{name}, seed {cell.seed} diverged: {cell.diverged}"
        for cell in report.cells
        if cell.diverged and (cell.row, cell.point, cell.task) == (result.row, result.point, result.task)
    ]
    return remarks


def _unmergeable(results: Sequence[Result]) -> list[str]:
    """Return why lines are not mergeable, once for all lines with the same reason."""
    names: dict[str, list[str]] = {}
    for result in results:
        if result.why:
            names.setdefault(result.why, []).append(label(result.row, result.point))
    return [f"{listed(same)} {'is' if len(same) == 1 else 'are'} not mergeable: {why}." for why, same in names.items()]


def listed(names: Sequence[str]) -> str:
    """Join names with commas and an "and"; of more than five, the first four and a count of the rest."""
    rest = len(names) - _LISTED
    if rest > 1:
        return ", ".join(names[:_LISTED]) + f" and {rest} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _average(report: StudyReport, board: Board) -> Table:
    axes, values = _axes(report, [line.point for line in board.lines])
    rows = [
        [
            Shown(line.row), *at, Shown(spread(board.metric, line.figure), line.score),
            Shown(str(line.figure.n), line.figure.n),
        ]
        for line, at in zip(board.lines, values, strict=True)
    ]  # fmt: skip
    heads = ["row", *axes, board.title, "n"]
    return Table(f"average over {len(report.metrics)} tasks", heads, rows, 1 + len(axes), NOTES["average"])


def _lines(
    report: StudyReport, every: Sequence[Board]
) -> tuple[list[str], list[list[Shown]], list[tuple[Board, Standing]]]:
    """Return the heads and the cells that name each line, with the task where the boards are several; and the lines."""
    lines = [(board, line) for board in every for line in board.lines]
    axes, values = _axes(report, [line.point for _, line in lines])
    task = ["task"] if len(every) > 1 else []
    names = [
        [Shown(line.row), *at, *(_text(board.task) if task else [])]
        for (board, line), at in zip(lines, values, strict=True)
    ]
    return ["row", *axes, *task], names, lines


def _sizes(report: StudyReport, every: Sequence[Board]) -> Table:
    heads, names, lines = _lines(report, every)
    rows = []
    for (board, line), name in zip(lines, names, strict=True):
        means = line.means
        untuned = Spread.of([math.nan if cell.score_untuned is None else cell.score_untuned for cell in line.cells])
        reduction, share = means["bit_reduction"], means["trained_share"]
        rows.append([
            *name, _bytes(means["nbytes_base"]), _bytes(means["nbytes_untuned"]), _bytes(means["nbytes"]),
            _number(means["bits_per_weight"], f"{means['bits_per_weight'] or 0:.2f}"),
            _number(reduction, percent(reduction or 0)),
            Shown(spread(board.metric, untuned), untuned.mean),
            _number(means["trained_parameters"], f"{means['trained_parameters'] or 0:,.0f}"),
            _number(share, percent(share or 0, 2)), _bytes(means["adapter_nbytes"]),
            _bytes(means["adapter_nbytes_16_bit"]),
        ])  # fmt: skip
    heads += ["size\nbefore", "size\nuntuned", "size", "bits per\nweight", "bit\nreduction", "score\nuntuned",
              "trained\nparameters", "share", "adapter\non disk", "adapter\n16 bits"]  # fmt: skip
    return Table("Sizes and parameters", heads, rows, len(names[0]) if names else 1, NOTES["sizes"])


def _training(report: StudyReport, every: Sequence[Board]) -> Table:
    heads, names, lines = _lines(report, every)
    rows = []
    for (_, line), name in zip(lines, names, strict=True):
        means, trained = line.means, [cell for cell in line.cells if cell.steps]
        peak, planned = means["peak_memory_nbytes"], means["planned_memory_nbytes"]
        if not trained:
            continue
        steps, bad = trained[0].steps, sum(bool(cell.diverged) for cell in trained)
        rows.append([
            *name, Shown(f"{steps:,}", steps), _bytes(peak), _bytes(planned),
            _number(planned, f"{(planned or 0) / (peak or 1):.2f}") if peak else Shown("–"),
            _number(means["training_seconds"], duration(means["training_seconds"] or 0)),
            _number(means["step_seconds"], f"{1000 * (means['step_seconds'] or 0):.0f} ms"),
            Shown(f"{bad} of {len(trained)}", bad),
        ])  # fmt: skip
    heads += ["steps", "peak\nmemory", "planned\nmemory", "planned /\npeak", "time", "step", "diverged"]
    return Table("Memory and time of training", heads, rows, len(names[0]) if names else 1, NOTES["training"])


def _cost(report: StudyReport) -> Table:
    axes, values = _axes(report, [cost.point for cost in report.cost])
    heads = ["row", *axes, "shipped", "storage", "tuning\nstep", "tuning\nmemory", "prefill\ntokens/s",
             "decoding\ntokens/s", "inference\nmemory"]  # fmt: skip
    rows = [
        [
            Shown(cost.row), *at, Shown(cost.shipped), _bytes(cost.storage_nbytes),
            Shown(f"{1000 * cost.step_seconds:.0f} ms", cost.step_seconds), _bytes(cost.tuning_nbytes),
            Shown(f"{cost.prefill_tokens_a_second:,.0f}", cost.prefill_tokens_a_second),
            _number(cost.decode_tokens_a_second, f"{cost.decode_tokens_a_second or 0:,.0f}"),
            _bytes(cost.inference_nbytes),
        ]
        for cost, at in zip(report.cost, values, strict=True)
    ]  # fmt: skip
    return Table("Cost", heads, rows, 2 + len(axes), NOTES["cost"])


def _compare(report: StudyReport) -> Table:
    axes, values = _axes(report, [found.point for found in report.compare])
    several = len(report.metrics) > 1
    heads = [
        "row",
        "minus",
        *axes,
        *(["task"] if several else []),
        "difference",
        "95 %\ninterval",
        "p",
        "p\n(Holm)",
        "n",
    ]
    rows = []
    for found, at in zip(report.compare, values, strict=True):
        metric = report.metrics.get(found.task, report.metric)
        scale, digits = (100, 1) if metric in SHARES else (1, 3)
        low, high = found.interval or (math.nan, math.nan)
        rows.append([
            *_text(found.row, found.minus), *at, *(_text(found.task) if several else []),
            Shown(spread(metric, found.figure, signed=True), found.figure.mean),
            _number(low, f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}"),
            *(_number(p, "< 0.001" if (p or 0) < 0.001 else f"{p or 0:.3f}") for p in (found.p, found.p_holm)),
            Shown(str(found.figure.n), found.figure.n),
        ])  # fmt: skip
    return Table("Differences", heads, rows, 2 + len(axes) + several, NOTES["compare"])


def event_line(event: Event, elapsed: float) -> str:
    """Return the current state of the study as one line; `elapsed` in seconds since its start."""
    place = f"{f'[{event.number} of {event.total}]':<12} {duration(elapsed):>12}  {event.name}"
    if event.state == "begins":
        return f"{place} ..."
    if event.state == "measures":
        return f"{'':<12} {duration(elapsed):>12}  measures {event.name} ..."
    left = f", about {duration(event.left_seconds)} left" if event.left_seconds and event.state != "kept" else ""
    if event.state == "failed":
        return f"{place} failed: {event.problem}{left}"
    was = ", from an earlier start" if event.state == "kept" else f" in {duration(event.seconds)}"
    return f"{place}: {metric_name(event.metric)} {format_score(event.metric, event.score)}{was}{left}"


def print_study(console: Console, report: StudyReport) -> None:
    """Print the summary and the tables of a study, without those of the measures of every run, which are wide."""
    for sentence in report.summary:
        console.print(escape(sentence), soft_wrap=True)
    for table in tables(report):
        console.print(f"\n[bold]{escape(table.title)}[/bold]")
        print_table(console, table.heads, table.texts, words=table.words)
        for remark in table.remarks:
            console.print(escape(remark), style="dim", soft_wrap=True)
