"""report.html: the report of a run as one page that loads nothing. All text of the run is escaped."""

from __future__ import annotations

import math
from collections import Counter
from html import escape

from dovetail.chains.link import Link, arguments
from dovetail.chains.notation import chain
from dovetail.chains.stages import stages
from dovetail.display.format import SHARES, duration, format_score, metric_name, percent, size
from dovetail.display.html import definitions, html_page, html_table, section
from dovetail.display.svg import ticks
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Example, Report, Row
from dovetail.runs.report.summary import counted, learned_nothing
from dovetail.runs.yaml import yaml_text
from dovetail.tasks.task import COUNTS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 64, 16, 14, 54
"""The size of a plot of training, and its margins."""
MOST_POINTS = 400


def page(report: Report, recipe: Recipe) -> str:
    """Return the page as HTML text."""
    text = yaml_text(recipe.model_dump(mode="json", exclude_defaults=True))
    curves = _curves(report)
    parts = [
        _head(report),
        section("Chain", _stages(report)),
        section("After each stage", _table(report)),
        section("Examples", _examples(report)) if report.examples else "",
        section("Merge", _merge(report)),
        section("Training", curves + _rates(report)) if curves else "",
        section("First training row", _rendered(report)) if report.rendered else "",
        section("Run", definitions(_facts(report))),
        section("Recipe", f"<pre>{escape(text)}</pre>"),
    ]
    return html_page(f"{report.chain} on {report.model}", parts)


def _head(report: Report) -> str:
    first, last = report.stages[0], report.stages[-1]
    metric = report.task.metric
    numbers = [
        (metric_name(metric), format_score(metric, report.score(first)), format_score(metric, report.score(last))),
        ("bits per weight", f"{first.footprint.bits_per_weight:.4g}", f"{last.footprint.bits_per_weight:.3g}"),
        ("model size", size(first.footprint.nbytes), size(last.footprint.nbytes)),
        ("nonzero weights", percent(first.footprint.nonzero_fraction), percent(last.footprint.nonzero_fraction)),
    ]
    cards = "".join(
        f'<div class="card"><span class="label">{escape(name)}</span>'
        f'<span class="score">{escape(after)}</span><span class="before">{escape(before)} before</span></div>'
        for name, before, after in numbers
    )
    warning = learned_nothing(report)
    what = f"{escape(report.model)} on {escape(report.task.name)}, {escape(report.task.split)} split"
    return (
        "<header>\n"
        + (_banner("lossy", "!", warning) if warning else "")
        + f'<p class="kind">Dovetail run</p>\n<h1><code>{escape(report.chain)}</code></h1>\n'
        f'<p class="what">{what}</p>\n<div class="cards">{cards}</div>\n</header>'
    )


def _banner(state: str, mark: str, text: str) -> str:
    return f'<div class="verdict {state}"><span class="mark">{mark}</span><p>{escape(text)}</p></div>\n'


def _stages(report: Report) -> str:
    """Draw the stages of the chain as boxes of links, those applied once and those trained."""
    boxes = []
    parts = stages(chain(report.chain))
    for number, stage in enumerate(parts, 1):
        groups = [("applied once", stage.applied), ("trained together", stage.trained)]
        inside = '<span class="arrow">→</span>'.join(
            f'<div class="group"><span class="label">{label}</span><div class="links">'
            + "".join(_link(link) for link in links)
            + "</div></div>"
            for label, links in groups
            if links
        )
        name = f'<span class="stage-name">stage {number}</span>' if len(parts) > 1 else ""
        boxes.append(f'<div class="stage">{name}<div class="groups">{inside}</div></div>')
    drawn = '<div class="chain">' + '<div class="down">↓ merged into the base</div>'.join(boxes) + "</div>"
    if not report.layers:
        return drawn
    rows = (f"<td>{escape(one)}</td><td><code>{escape(text)}</code></td>" for one, text in report.layers.items())
    return drawn + html_table("<th>layers</th><th>their chain</th>", rows)


def _link(link: Link) -> str:
    said = [f"{name} {value}" for name, value in arguments(link).items() if value]
    details = f'<span class="details">{escape(", ".join(said))}</span>' if said else ""
    return f'<div class="link {link.kind}"><b>{escape(link.name)}</b>{details}</div>'


def _table(report: Report) -> str:
    task, scored = report.task, report.stages[0].metrics
    columns = [(task.name, task.metric)]
    columns += [(task.name, metric) for metric in scored[task.name] if metric not in (task.metric, *COUNTS)]
    columns += [(name, next(iter(scores))) for name, scores in scored.items() if name != task.name]
    several = len({task for task, _ in columns}) > 1
    titles = [(escape(task) + "<br>" if several else "") + escape(metric_name(metric)) for task, metric in columns]
    titles += ["bits per weight", "nonzero weights", "model size", "trained parameters", "time"]
    head = "<th>stage</th>" + "".join(f'<th class="number">{title}</th>' for title in titles)
    most = max(row.footprint.nbytes for row in report.stages)
    records, cut, windows = (scored[task.name].get(count) for count in COUNTS)
    note = (
        (f"Scored on {records:.0f} records. " if records else "")
        + (f"{cut:.0f} prompts or texts are cut. " if cut else "")
        + (f"Long texts are scored in disjoint windows, {windows:.0f} in all. " if windows else "")
        + f"{counted(report)} ".lstrip()
        + "Bits per weight: everything stored for the weights under the chain, including scales, zero points and "
        + "masks. "
        + "Model size: everything that the model stores after the stage, including embeddings and adapters."
    )
    return html_table(head, [_row(row, columns, most) for row in report.stages]) + f'\n<p class="note">{note}</p>'


def _row(row: Row, columns: list[tuple[str, str]], most: int) -> str:
    cells = "".join(
        f'<td class="number{" main" if number == 0 else ""}">'
        f"{escape(format_score(metric, row.metrics.get(task, {}).get(metric)))}</td>"
        for number, (task, metric) in enumerate(columns)
    )
    taken = row.footprint
    trained = f"{taken.trainable_parameters:,}" if taken.trainable_parameters else ""
    return (
        f"<th>{escape(row.name)}</th>{cells}"
        f'<td class="number">{taken.bits_per_weight:.2f}</td><td class="number">{percent(taken.nonzero_fraction)}</td>'
        f'<td class="number size">{size(taken.nbytes)}{_bar(taken.nbytes / most, size(taken.nbytes))}</td>'
        f'<td class="number">{trained}</td><td class="number">{duration(row.seconds)}</td>'
    )


def _bar(share: float, label: str) -> str:
    """Draw a horizontal bar from 0 to 1 for a cell of a table."""
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<rect class="track" width="100" height="8" rx="2"/>'
        f'<rect class="fill" width="{100 * share:.1f}" height="8" rx="2"/></svg>'
    )


def _examples(report: Report) -> str:
    note = f'<p class="note">The first {len(report.examples)} records of the split, in order.</p>'
    return "\n".join(map(_example, report.examples)) + note


def _example(example: Example) -> str:
    expected, before, after = example.expected.strip(), example.before.strip(), example.after.strip()
    outputs = [("expected", expected, "")]
    outputs += [
        (title, text, " right" if text == expected else "")
        for title, text in (("before tuning", before), ("after tuning", after))
    ]
    columns = "".join(
        f'<div><span class="label">{title}</span><div class="text{style}">{escape(text) or "(empty)"}</div></div>'
        for title, text, style in outputs
    )
    prompt = f'<div class="text">{escape(example.prompt)}</div>'
    return f'<div class="example">{prompt}\n<div class="outputs">{columns}</div></div>'


def _rendered(report: Report) -> str:
    parts = (f"<mark>{escape(text)}</mark>" if counted else escape(text) for text, counted in report.rendered)
    note = '<p class="note">The loss counts the marked tokens.</p>'
    return f'<div class="example"><div class="text">{"".join(parts)}</div></div>\n{note}'


def _merge(report: Report) -> str:
    merge, checkpoint, packed = report.merge, report.checkpoint, report.packed
    state = "apart" if merge is None else "exact" if merge.exact else "lossy"
    inside = _banner(state, {"exact": "✓", "lossy": "≈", "apart": "–"}[state], report.verdict)
    if merge is not None:
        logits = "not compared" if merge.max_abs_logit_diff is None else f"{merge.max_abs_logit_diff:.3g}"
        inside += definitions({
            "largest change of a weight": f"{merge.max_abs_weight_diff:.3g}",
            "largest change of a logit": logits,
            "zeros before merging": percent(merge.sparsity_before, 2),
            "zeros after merging": percent(merge.sparsity_after, 2),
            "weights off the grid": f"{merge.off_grid:,}",
        })  # fmt: skip
    if checkpoint is not None:
        text = (
            f"model/ is a standard Hugging Face checkpoint of {size(checkpoint.nbytes)}. It stores the merged values "
            f"in full, so that stock transformers loads it. {_reloaded(checkpoint.max_abs_logit_diff)}"
        )
        if report.footprint.nbytes < checkpoint.nbytes // 2:
            text += (
                f" As codes on the grid, the same values take {size(report.footprint.nbytes)}, as in the table above."
            )
        inside += f'<p class="note">{text}</p>'
    if packed is not None:
        text = (
            f"packed/ is the same model for Dovetail in {size(packed.nbytes)}, {packed.bits_per_weight:.2f} bits per "
            f"weight on disk. A pruned layer stores one bit per weight and its nonzero weights. "
            f"{_reloaded(packed.max_abs_logit_diff)}"
        )
        inside += f'<p class="note">{text}</p>'
    return inside


def _reloaded(difference: float | None) -> str:
    if difference is None:
        return "Its logits after loading were not compared."
    if difference == 0:
        return "After loading, its logits are bit for bit those of the merged model."
    return f"After loading, its logits differ from those of the merged model by at most {difference:.2g}."


def _rates(report: Report) -> str:
    lines = []
    for number, stage in enumerate(report.training, 1):
        which = f"Stage {number}: " if len(report.training) > 1 else ""
        rates = ", ".join(f"{escape(part)} {rate:g}" for part, rate in stage.learning_rates.items())
        steps = stage.losses[-1][0] if stage.losses else 0
        lines.append(f"{which}{steps:,} steps in {duration(stage.seconds)}. Learning rates: {rates}.")
    return f'<p class="note">{"<br>".join(lines)}</p>'


def _facts(report: Report) -> dict[str, str]:
    facts = {
        "model": report.model,
        "seed": str(report.seed),
        "trained parameters": f"{report.footprint.trainable_parameters:,}",
        "stored bytes": f"{report.footprint.nbytes:,}",
        "peak memory of training": size(report.peak_memory_nbytes) if report.peak_memory_nbytes else "nothing trained",
        "time": duration(report.seconds),
    }
    if (search := report.search) is not None:
        before, after = format_score(search.metric, search.start), format_score(search.metric, search.best)
        on = f"{search.samples} records of {search.split}, {search.evaluations} sub-adapters"
        facts["search over ranks"] = f"{before} to {after} on {on}"
        counts = sorted(Counter(search.ranks.values()).items())
        facts["ranks found"] = ", ".join(f"{rank} x{count}" for rank, count in counts)
    return facts | report.environment


def _curves(report: Report) -> str:
    """Draw the training loss, and the validation score where there is one; "" where nothing was trained."""
    losses = [_finite(stage.losses) for stage in report.training]
    if not any(losses):
        return ""
    ends = [points[-1][0] if points else 0 for points in losses]
    legend = "".join(
        f'<span><svg viewBox="0 0 32 12"><polyline class="{style}" points="0,6 32,6"/></svg>{name}</span>'
        for style, name in (("raw", "loss of a step"), ("mean", "running mean"))
    )
    raw, mean = ("raw", losses), ("mean", [running_mean(points) for points in losses])
    drawn = f'<div class="legend">{legend}</div>\n' + draw_curves([raw, mean], ends, "loss against training steps")
    scale = 100 if report.task.metric in SHARES else 1
    scores = [[(step, scale * score) for step, score in _finite(stage.validation)] for stage in report.training]
    if any(scores):
        title = f"{metric_name(report.task.metric)} on the validation split{' (%)' if scale == 100 else ''}"
        drawn += f'\n<div class="legend">{escape(title)}</div>\n' + draw_curves([("validation", scores)], ends, title)
    return drawn


def draw_curves(curves: list[tuple[str, list[list[tuple[int, float]]]]], ends: list[int], label: str) -> str:
    """Draw curves against the training steps of all stages as SVG.

    curves  (style, points of each stage as (step, value)); the style is a class of the style sheet
    ends    last step of each stage; the next stage starts there
    label   for readers that do not see the plot
    """
    total = sum(ends)
    values = [value for _, stages in curves for points in stages for _, value in points]
    levels = ticks(min(0.0, *values), max(values))
    low, high = levels[0], levels[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, total)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def text(at: float, height: float, anchor: str, label: str) -> str:
        return f'<text class="tick" x="{at:.1f}" y="{height:.1f}" text-anchor="{anchor}">{label}</text>'

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in levels:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text(LEFT - 8, y(tick) + 4, "end", f"{tick:g}"))
    for tick in (tick for tick in ticks(0, total) if tick <= total):
        inside = x(tick) <= WIDTH - RIGHT - 24  # a label at the right border ends there
        parts.append(text(x(tick), HEIGHT - 32, "middle" if inside else "end", f"{tick:g}"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle", "training step"))
    begins = [sum(ends[:number]) for number in range(len(ends))]
    for begin in begins[1:]:
        at = f"{x(begin):.1f}"
        parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for style, trained in curves:
        for begin, points in zip(begins, trained, strict=True):
            thinned = dict.fromkeys(points[:: max(1, len(points) // MOST_POINTS)] + points[-1:])
            drawn = [(f"{x(begin + step):.1f}", f"{y(value):.1f}") for step, value in thinned]
            if drawn:
                parts.append(f'<polyline class="{style}" points="{" ".join(map(",".join, drawn))}"/>')
            if style == "validation":
                parts += [f'<circle class="validation" cx="{at}" cy="{height}" r="3"/>' for at, height in drawn]
    return "\n".join([*parts, "</svg>"])


def _finite(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, loss) for step, loss in losses if math.isfinite(loss)]


def running_mean(losses: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return an exponential mean over about a fiftieth of the steps, initialised with the first loss."""
    weight = 1 / max(1.0, len(losses) / 50)
    found, mean = [], losses[0][1] if losses else 0.0
    for step, loss in losses:
        mean += weight * (loss - mean)
        found.append((step, mean))
    return found
