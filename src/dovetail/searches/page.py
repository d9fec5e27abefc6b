"""report.html of a search: the front with its table, how it grew, what the kind of search adds, and all trials."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dovetail.display.format import SHARES, duration, metric_name
from dovetail.display.html import definitions, html_page, html_table, section
from dovetail.display.svg import STYLE, Point, scatter
from dovetail.runs.recipe import Recipe
from dovetail.runs.yaml import yaml_text
from dovetail.searches.report import SearchReport, Trial, format_objective, growth

NAMES = {
    "nbytes": "model size in bytes", "peak_memory": "peak memory in bytes",
    "trainable_parameters": "trained parameters",
}  # fmt: skip


def page(report: SearchReport, recipe: Recipe, sections: Sequence[str]) -> str:
    """Return the page as HTML text; `sections` are those of the kind of search."""
    text = yaml_text(recipe.model_dump(mode="json", exclude_defaults=True))
    parts = [
        _head(report),
        section("Front" if len(report.objectives) > 1 else "Candidates", _plot(report) + _front(report)),
        *sections,
        section("Progress", _growth(report)),
        section("Trials", _table(report, report.trials)),
        section("Run", definitions(_facts(report))),
        section("Recipe", f"<pre>{escape(text)}</pre>"),
    ]
    return html_page(f"search on {report.model}", parts, style=STYLE)


def _head(report: SearchReport) -> str:
    what = f"{report.model} on {report.task.name}, {len(report.trials)} trials, {report.sampler}"
    return (
        f'<header>\n<p class="kind">Dovetail search over {escape(report.kind)}</p>\n'
        f'<h1>{escape(report.headline)}</h1>\n<p class="what">{escape(what)}</p>\n</header>'
    )


def _name(report: SearchReport, objective: str) -> str:
    if objective != "quality":
        return NAMES[objective]
    metric = report.task.metric
    return f"{metric_name(metric)}{' (%)' if metric in SHARES else ''} on the {report.task.split} split"


def _shown(report: SearchReport, objective: str, value: float) -> float:
    """Return the value as the plots show it: shares in percent."""
    return 100 * value if objective == "quality" and report.task.metric in SHARES else value


def _axes(report: SearchReport) -> tuple[str, str]:
    """Return what the plot shows from left to right, and from bottom to top."""
    names = list(report.objectives)
    if len(names) == 1:
        return "nbytes" if report.kind == "layers" else "trainable_parameters", names[0]
    others = [name for name in names if name != "quality"]
    return (others[0], "quality") if "quality" in names else (names[1], names[0])


def _at(trial: Trial, name: str) -> float | None:
    value = trial.values.get(name, trial.details.get(name))
    return None if value is None else float(value)


def _plot(report: SearchReport) -> str:
    """Draw the trials, and the models that the kind of search shows beside them."""
    across, up = _axes(report)
    points, line = [], []
    for trial in report.trials:
        x, y = _at(trial, across), trial.values.get(up)
        if x is None or y is None:
            continue
        x, y = _shown(report, across, x), _shown(report, up, y)
        chosen = trial.number in report.front
        points.append(Point(x, y, _title(report, trial), "chosen" if chosen else ""))
        if chosen:
            line.append((x, y))
    for name, values in report.finish.get("references", {}).items():
        if across in values and up in values:
            x, y = _shown(report, across, values[across]), _shown(report, up, values[up])
            points.append(Point(x, y, name, "reference"))
    lines = [sorted(line)] if len(report.objectives) > 1 else []
    return scatter(points, lines, _name(report, across), _name(report, up))


def _title(report: SearchReport, trial: Trial) -> str:
    values = [f"{name} {format_objective(name, value, report.task.metric)}" for name, value in trial.values.items()]
    params = [f"{name}: {value}" for name, value in trial.params.items()]
    return "\n".join([f"trial {trial.number}", *values, trial.chain, *params])


def _front(report: SearchReport) -> str:
    trials = [report.trial(number) for number in report.front]
    note = (
        f"best.yaml is the recipe of trial {report.best}, and front/NUMBER.yaml that of each trial of the table above. "
        "`dovetail run` trains them."
    )
    return f'\n{_table(report, trials)}\n<p class="note">{escape(note)}</p>'


def _table(report: SearchReport, trials: Sequence[Trial]) -> str:
    objectives = list(report.objectives)
    heads = "".join(f'<th class="number">{escape(_name(report, name))}</th>' for name in objectives)
    extra = [] if "trainable_parameters" in objectives else ["trainable_parameters"]
    heads += "".join(f'<th class="number">{escape(NAMES[name])}</th>' for name in extra)
    layers = report.kind == "layers"
    what = "units with each value" if layers else "chain"
    heads += '<th class="number">bits per weight</th><th class="number">steps</th>' if layers else ""
    last_head = "" if layers else "<th>factor of learning rates</th>"
    head = f'<th>trial</th>{heads}<th class="number">time</th><th>{what}</th>{last_head}'
    rows = []
    for trial in trials:
        best = " main" if trial.number == report.best else ""
        cells = ""
        for name in [*objectives, *extra]:
            value = _at(trial, name)
            said = trial.state if value is None else format_objective(name, value, report.task.metric)
            cells += f'<td class="number{best if name in objectives else ""}">{escape(said)}</td>'
        if layers:
            bits = f"{trial.details['bits_per_weight']:.3g}" if trial.details else ""
            cells += f'<td class="number">{bits}</td><td class="number">{trial.details.get("steps", "")}</td>'
            last = ""
        else:
            rates = trial.recipe.get("train", {})
            last = f"<td>{escape(str(rates.get('link_learning_rate') or rates.get('lr_scale', '')))}</td>"
        rows.append(
            f'<th>{trial.number}</th>{cells}<td class="number">{duration(trial.seconds)}</td>'
            f"<td><code>{escape(trial.summary)}</code></td>{last}"
        )
    return html_table(head, rows)


def _growth(report: SearchReport) -> str:
    """Draw how the front grew with trials and with time."""
    grown = growth(report.trials, report.objectives)
    if len(report.objectives) == 1:
        (objective,) = report.objectives
        title = f"best {_name(report, objective)}"
        grown = [(number, seconds, _shown(report, objective, value)) for number, seconds, value in grown]
    else:
        title = "hypervolume of the front, each objective scaled to [0, 1], reference 1.1"
    against = [[(float(number), value) for number, _, value in grown], [(at, value) for _, at, value in grown]]
    titles = ("trials", "seconds since the search began")
    return "\n".join(scatter([], [line], name, title) for line, name in zip(against, titles, strict=True) if line)


def _facts(report: SearchReport) -> dict[str, str]:
    states = [trial.state for trial in report.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return {
        "trials": counts,
        "time of all trials": duration(report.seconds),
        "seed": str(report.seed),
        **report.environment,
    }
