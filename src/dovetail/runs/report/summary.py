"""The outcome of a run in words, and its report on a terminal."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dovetail.checkpoint.footprint import Footprint
from dovetail.checkpoint.merge import MergeReport
from dovetail.display.format import SHARES, duration, format_score, metric_name, percent, size
from dovetail.display.tables import print_table
from dovetail.models.coverage import described
from dovetail.runs.report.record import Report, Row
from dovetail.tasks.task import LOWER_IS_BETTER


def verdict(merged: MergeReport | None, *, lossy: bool, quantized: bool) -> str:
    """Describe in a few sentences what merging kept and what it changed.

    merged     None where the base and the adapter were kept apart
    lossy      whether the recipe allows loss
    quantized  whether the chain has a quantizer
    """
    if merged is None:
        return "Not merged: the recipe keeps the base and the adapter apart. The adapter is in adapter/."
    if merged.given_up:
        lost = " and the ".join(merged.given_up)
        words = [f"Merged: the chain gave up the {lost} that the base had from an earlier merge."]
    elif merged.exact:
        kept = ["zeros"] if merged.sparsity_before > 0.01 else []
        kept += ["quantization grid"] if quantized else []
        words = ["Merged without loss: the merged weights are bit for bit the tuned weights."]
        words += [f"Merging preserved the {' and the '.join(kept)} of the base."] if kept else []
    elif lossy:
        words = [
            "Merged with loss, as the recipe asks: the chain does not keep the zeros or the grid of the base. Merging "
            f"changed weights by up to {merged.max_abs_weight_diff:.2g} "
            f"({merged.relative_weight_error:.1%} of the norm of the weights)."
        ]
    elif merged.max_abs_weight_diff == 0 and merged.max_abs_logit_diff:
        words = [
            "Merged, but not without loss: the merged weights are bit for bit the tuned weights, and the model "
            "computes something else with them."
        ]
    else:
        words = [
            "Merged, rounded once: the tuned chain does not store its weights, so merging rounded them to the dtype of "
            f"the model, by at most {merged.max_abs_weight_diff:.2g}."
        ]
    if merged.max_abs_logit_diff is not None:
        words.append(
            "The outputs of the model are bit for bit the same."
            if merged.max_abs_logit_diff == 0
            else f"The outputs of the model differ by at most {merged.max_abs_logit_diff:.2g}."
        )
    if merged.sparsity_before > 0.01:
        before, after = percent(merged.sparsity_before, 2), percent(merged.sparsity_after, 2)
        words.append(f"Zeros{_whole(merged.footprint)}: {before} before merging, {after} after.")
    if quantized:
        words.append(f"Weights off the quantization grid: {merged.off_grid}.")
    return " ".join(words)


def _whole(taken: Footprint) -> str:
    """Return of which weights the zeros are a share, and what share of the model these are."""
    share = taken.target_fraction
    return "" if share is None else f" among the weights under the chain ({percent(share)} of the model)"


def learned_nothing(report: Report) -> str:
    """Return a warning where training was of no use: no gain over the base, or a score at chance; else "".

    Two shares of n records count as different where they are two standard errors apart, sqrt(p (1 - p) / n) each. The
    warning compares the last stage with the stage before training, then with the base, whatever the merge did.
    """
    if not report.training:
        return ""
    metric, n = report.task.metric, report.stages[0].metrics[report.task.name].get("n") or math.inf
    trained = next((at for at, row in enumerate(report.stages) if row.name.startswith("tuned")), 0)
    base, start, end = (report.score(report.stages[at]) for at in (0, max(trained - 1, 0), -1))
    told = {name: format_score(metric, value) for name, value in (("base", base), ("start", start), ("end", end))}
    name, chance = metric_name(metric), report.task.chance
    if chance is not None and end is not None:
        error = math.sqrt(chance * (1 - chance) / n) if metric in SHARES else 1 / math.sqrt(n)
        if end <= chance + 2 * error:
            return (
                f"This run learned nothing: its {name} of {told['end']} on {n:.0f} records is at chance, which is "
                f"{format_score(metric, chance)}."
            )
    if not _better(metric, end, start, n):
        said = f"This run learned nothing: {name} is {told['start']} before training and {told['end']} after."
        noise = f" On {n:.0f} records, this difference is within two standard errors."
        return said + (noise if _better(metric, end, start, math.inf) else "")
    if not _better(metric, end, base, n):
        return (
            f"This run is no better than its base: {name} is {told['base']} for the base, {told['start']} before "
            f"training and {told['end']} after."
        )
    return ""


def _better(metric: str, score: float | None, other: float | None, n: float) -> bool:
    """Return whether a score on n records is better than another by more than its sampling error."""
    if score is None or other is None:
        return score is not None
    gain = other - score if metric in LOWER_IS_BETTER else score - other
    error = math.sqrt((score * (1 - score) + other * (1 - other)) / n) if metric in SHARES else 0.0
    return gain > 2 * error


def counted(report: Report) -> str:
    """Return which share of the model the bits per weight and the nonzero weights of a report describe."""
    base, last = report.stages[0].footprint.target_fraction, report.stages[-1].footprint.target_fraction
    if base is None or last is None:
        return ""
    told = f"Bits per weight and nonzero weights are those of the layers under the chain, {percent(last)} of the model"
    told += "." if base == last else f"; in the row base, those of all linear layers, {percent(base)}."
    taken = report.stages[-1].footprint
    if taken.covered_fraction is None:
        return told
    said = described(taken.covered_fraction, taken.left_out)
    return f"{told} {said[0].upper()}{said[1:]}."


def row_line(row: Row) -> str:
    """Return a finished row as one line, to be printed during the run."""
    task, scores = next(iter(row.metrics.items()))
    metric, value = next(iter(scores.items()))
    return (
        f"{row.name:<16} {task} {metric_name(metric)} {format_score(metric, value):>7}   "
        f"{row.footprint.bits_per_weight:6.2f} bits per weight   {duration(row.seconds)}"
    )


def print_summary(console: Console, report: Report, directory: Path) -> None:
    """Print the report of the run in that directory."""
    if warning := learned_nothing(report):
        console.print(f"\n[bold]{escape(warning)}[/bold]")
    console.print(f"\n[bold]{escape(report.chain)}[/bold]  on {escape(report.model)}", soft_wrap=True)
    for pattern, text in report.layers.items():
        console.print(f"  {escape(pattern)}: {escape(text)}", soft_wrap=True)
    scored = {report.task.name: report.task.metric}
    scored |= {name: next(iter(scores)) for name, scores in report.stages[0].metrics.items() if name not in scored}
    titles = [f"{name}\n{metric_name(metric)}" for name, metric in scored.items()]
    rows = [
        [
            row.name,
            *(format_score(metric, row.metrics[name][metric]) for name, metric in scored.items()),
            f"{row.footprint.bits_per_weight:.2f}",
            percent(row.footprint.nonzero_fraction, 0),
            size(row.footprint.nbytes),
            duration(row.seconds),
        ]
        for row in report.stages
    ]
    print_table(console, ["stage", *titles, "bits per\nweight", "nonzero\nweights", "model\nsize", "time"], rows)
    if note := counted(report):
        console.print(note)
    console.print(escape(report.verdict))
    if report.training:
        trained, peak = report.footprint.trainable_parameters, size(report.peak_memory_nbytes)
        console.print(f"Trained {trained:,} parameters; peak memory of training {peak}.")
    console.print(f"Time {duration(report.seconds)}.")
    console.print(f"Report: [bold]{escape(str(directory / 'report.html'))}[/bold]", soft_wrap=True)
    if report.checkpoint is not None:
        console.print(f"Hugging Face checkpoint: {escape(str(directory / 'model'))}", soft_wrap=True)
    if report.packed is not None:
        taken, bits = size(report.packed.nbytes), report.packed.bits_per_weight
        console.print(
            f"Packed model for Dovetail: {escape(str(directory / 'packed'))} ({taken}, {bits:.2f} bits per weight on "
            "disk)", soft_wrap=True,
        )  # fmt: skip
    for each in report.exports:
        claims = {"values": f"the same values in {each.dtype}", "codes": "the same codes and scales"}
        said = claims.get(each.claim, "the same adapter")
        console.print(f"{each.format}: {escape(str(directory / 'export' / each.name))} ({said})", soft_wrap=True)
