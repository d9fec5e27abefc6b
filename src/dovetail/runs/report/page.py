"""report.html: one page that holds everything it shows. No script, no network; all text of the run is escaped."""

from __future__ import annotations

from collections import Counter
from html import escape

import yaml

from dovetail.chains.link import Adapter, Constraint, Link, Pruner, arguments
from dovetail.chains.notation import chain
from dovetail.chains.stages import stages
from dovetail.display.format import duration, figure, metric_name, size
from dovetail.display.style import STYLE
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.charts import bar, loss_curve
from dovetail.runs.report.record import Merge, Packed, Report, Row, Searched

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""


def page(report: Report, recipe: Recipe) -> str:
    """The page as HTML text."""
    title = f"{report.chain} on {report.model}"
    curve = loss_curve(report.training)
    sections = [
        _head(report),
        _section("Chain", _stages(report)),
        _section("After each stage", _table(report)),
        _section("Merge", _verdict(report)),
        _section("Training loss", curve + _rates(report)) if curve else "",
        _section("Run", _facts(report)),
        _section("Recipe", f"<pre>{escape(_recipe_text(recipe))}</pre>"),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, inside: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{inside}\n</section>"


def _head(report: Report) -> str:
    first, last = report.stages[0], report.stages[-1]
    metric = report.task.metric
    numbers = [
        (metric_name(metric), figure(metric, report.figure(first)), figure(metric, report.figure(last))),
        ("bits a weight", f"{first.footprint.bits_per_weight:.4g}", f"{last.footprint.bits_per_weight:.3g}"),
        ("model", size(first.footprint.nbytes), size(last.footprint.nbytes)),
        ("weights not zero", _percent(first.footprint.nonzero_fraction), _percent(last.footprint.nonzero_fraction)),
    ]
    cards = "".join(
        f'<div class="card"><span class="label">{escape(name)}</span>'
        f'<span class="figure">{escape(after)}</span><span class="before">{escape(before)} before</span></div>'
        for name, before, after in numbers
    )
    what = f"{escape(report.model)} on {escape(report.task.name)}, {escape(report.task.split)} split"
    return (
        f'<header>\n<p class="kind">Dovetail run</p>\n<h1><code>{escape(report.chain)}</code></h1>\n'
        f'<p class="what">{what}</p>\n<div class="cards">{cards}</div>\n</header>'
    )


def _stages(report: Report) -> str:
    """The chain drawn as boxes of stages, each with what is applied once and what is trained."""
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
    return '<div class="chain">' + '<div class="down">↓ merged into the base</div>'.join(boxes) + "</div>"


def _link(link: Link) -> str:
    kind = next((name for cls, name in _KINDS.items() if isinstance(link, cls)), "quantizer")
    said = [f"{name} {value}" for name, value in arguments(link).items() if value]
    details = f'<span class="details">{escape(", ".join(said))}</span>' if said else ""
    return f'<div class="link {kind}"><b>{escape(link.name)}</b>{details}</div>'


_KINDS: dict[type[Link], str] = {Pruner: "pruner", Adapter: "adapter", Constraint: "constraint"}


def _table(report: Report) -> str:
    task, scored = report.task, report.stages[0].metrics
    columns = [(task.name, task.metric)]
    columns += [(task.name, metric) for metric in scored[task.name] if metric not in (task.metric, "n")]
    columns += [(name, next(iter(scores))) for name, scores in scored.items() if name != task.name]
    several = len({task for task, _ in columns}) > 1
    heads = "".join(
        f'<th class="number">{escape(task) + "<br>" if several else ""}{escape(metric_name(metric))}</th>'
        for task, metric in columns
    )
    most = max(row.footprint.nbytes for row in report.stages)
    rows = "\n".join(_row(report, row, columns, most) for row in report.stages)
    return (
        f'<div class="wide"><table>\n<thead><tr><th>stage</th>{heads}<th class="number">bits a weight</th>'
        '<th class="number">not zero</th><th class="number">model</th><th class="number">trained</th>'
        f'<th class="number">time</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n{_note(report)}'
    )


def _row(report: Report, row: Row, columns: list[tuple[str, str]], most: int) -> str:
    cells = "".join(
        f'<td class="number{" main" if number == 0 else ""}">'
        f"{escape(figure(metric, row.metrics.get(task, {}).get(metric)))}</td>"
        for number, (task, metric) in enumerate(columns)
    )
    taken = row.footprint
    trained = f"{taken.trainable_parameters:,}" if taken.trainable_parameters else ""
    return (
        f"<tr><th>{escape(row.name)}</th>{cells}"
        f'<td class="number">{taken.bits_per_weight:.2f}</td><td class="number">{_percent(taken.nonzero_fraction)}</td>'
        f'<td class="number size">{size(taken.nbytes)}{bar(taken.nbytes / most, size(taken.nbytes))}</td>'
        f'<td class="number">{trained}</td><td class="number">{duration(row.seconds)}</td></tr>'
    )


def _note(report: Report) -> str:
    records = report.stages[0].metrics[report.task.name].get("n")
    scored = f"Scored on {records:.0f} records. " if records else ""
    words = scored + (
        "Bits a weight: everything stored for the weights under the chain, scales, zero points and masks included. "
        "Model: all that the model stores then, embeddings and adapters included."
    )
    return f'<p class="note">{words}</p>'


def _verdict(report: Report) -> str:
    merge, checkpoint = report.merge, report.checkpoint
    state = "apart" if merge is None else "exact" if merge.exact else "lossy"
    mark = {"exact": "✓", "lossy": "≈", "apart": "–"}[state]
    inside = f'<div class="verdict {state}"><span class="mark">{mark}</span><p>{escape(report.verdict)}</p></div>'
    if merge is not None:
        inside += _definitions(_merge_facts(merge))
    if checkpoint is not None:
        text = (
            f"model/ is a standard Hugging Face checkpoint of {size(checkpoint.nbytes)}: the merged values written out "
            f"in full, so that stock transformers loads them. Loaded again, it {_same(checkpoint.max_abs_logit_diff)}."
        )
        if report.footprint.nbytes < checkpoint.nbytes // 2:
            text += f" On their grid the same values take {size(report.footprint.nbytes)}, which the table counts."
        inside += f'<p class="note">{text}</p>'
    if report.packed is not None:
        inside += f'<p class="note">{_packed(report.packed)}</p>'
    return inside


def _packed(packed: Packed) -> str:
    return (
        f"packed/ is the same model for Dovetail, in {size(packed.nbytes)}: {packed.bits_per_weight:.2f} bits a weight "
        "on disk, where a pruned layer keeps one bit a weight and only what isn't zero. "
        f"Loaded again, it {_same(packed.max_abs_logit_diff)}."
    )


def _same(difference: float | None) -> str:
    if difference == 0:
        return "gives the same outputs to the bit"
    return "was not compared" if difference is None else f"gives outputs that differ by at most {difference:.2g}"


def _merge_facts(merge: Merge) -> list[tuple[str, str]]:
    logits = "not compared" if merge.max_abs_logit_diff is None else f"{merge.max_abs_logit_diff:.3g}"
    return [
        ("largest change of a weight", f"{merge.max_abs_weight_diff:.3g}"),
        ("largest change of an output", logits),
        ("zeros before", _percent(merge.sparsity_before, 2)),
        ("zeros after", _percent(merge.sparsity_after, 2)),
        ("weights off the grid", f"{merge.off_grid:,}"),
    ]


def _rates(report: Report) -> str:
    lines = []
    for number, stage in enumerate(report.training, 1):
        which = f"Stage {number}: " if len(report.training) > 1 else ""
        rates = ", ".join(f"{escape(part)} {rate:g}" for part, rate in stage.learning_rates.items())
        steps = stage.losses[-1][0] if stage.losses else 0
        lines.append(f"{which}{steps:,} steps in {duration(stage.seconds)}. Learning rates: {rates}.")
    return f'<p class="note">{"<br>".join(lines)}</p>'


def _facts(report: Report) -> str:
    facts = [
        ("model", report.model),
        ("seed", str(report.seed)),
        ("trained parameters", f"{report.footprint.trainable_parameters:,}"),
        ("stored bytes", f"{report.footprint.nbytes:,}"),
        (
            "peak memory of training",
            size(report.peak_memory_nbytes) if report.peak_memory_nbytes else "nothing trained",
        ),
        ("time", duration(report.seconds)),
        *_searched(report.search),
        *report.environment.items(),
    ]
    return _definitions(facts)


def _searched(search: Searched | None) -> list[tuple[str, str]]:
    if search is None:
        return []
    before, after = figure(search.metric, search.start), figure(search.metric, search.best)
    on = f"{search.samples} records of {search.split}, {search.evaluations} sub-adapters"
    ranks = ", ".join(f"{rank} x{count}" for rank, count in sorted(Counter(search.ranks.values()).items()))
    return [("search over ranks", f"{before} to {after} on {on}"), ("ranks found", ranks)]


def _definitions(facts: list[tuple[str, str]]) -> str:
    inside = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f"<dl>{inside}</dl>"


def _recipe_text(recipe: Recipe) -> str:
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
