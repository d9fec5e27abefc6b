"""What report.html and the first line of a report say of a search over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from dovetail.display.format import format_score, metric_name
from dovetail.display.html import html_table, section
from dovetail.searches.assignment_space import AssignmentSpace, Choice
from dovetail.searches.report import SearchReport, Trial, format_objective


def references(space: AssignmentSpace, report: SearchReport) -> dict[str, Trial]:
    """Return the uniform models among the trials, by their labels, each at its highest rung."""
    known = {repr(sorted(space.params(c).items())): f"uniform {space.label(c[0])}" for c in space.uniform()}
    found: dict[str, Trial] = {}
    for trial in sorted(report.trials, key=lambda trial: trial.rung):
        label = known.get(repr(sorted(trial.params.items())))
        if label is not None and trial.state == "complete":
            found[label] = trial
    return found


def headline(space: AssignmentSpace, report: SearchReport) -> str:
    """Return the result in one sentence: the best candidate, beside the uniform models of its size."""
    winner, metric = report.trial(report.best), report.task.metric
    bits = f"{winner.details['bits_per_weight']:.3g} bits per weight"
    if "quality" not in report.objectives:
        objective = next(iter(report.objectives))
        value = format_objective(objective, winner.values[objective], metric)
        return f"The best candidate by {objective.replace('_', ' ')}: {value}, with {bits}"
    score = format_score(metric, winner.values["quality"])
    said = f"{metric_name(metric)} {score} at {bits}"
    uniform = references(space, report)
    label = next((name for name, trial in uniform.items() if trial.params == winner.params), None)
    sign = -1.0 if report.objectives["quality"] == "minimize" else 1.0
    if label is not None:
        better = any(
            trial.state == "complete"
            and trial.details["nbytes"] <= winner.details["nbytes"]
            and sign * trial.values["quality"] > sign * winner.values["quality"]
            for trial in report.trials
        )
        return f"The {label} model is the best candidate: {said}" + (
            "" if better else "; no mixture of its size is better"
        )
    as_small = {
        name: trial for name, trial in uniform.items()
        if trial.rung == winner.rung and trial.details["nbytes"] <= winner.details["nbytes"]
    }  # fmt: skip
    if not as_small:
        return f"The best mixture: {said}; no uniform model of its size was trained as long"
    name, best = max(as_small.items(), key=lambda item: sign * item[1].values["quality"])
    other = format_score(metric, best.values["quality"])
    if sign * best.values["quality"] >= sign * winner.values["quality"]:
        return f"The best mixture is not better than the {name} model of at most its size, which has {other}: {said}"
    return f"The best mixture: {said}; the {name} model, no larger, has {other}"


def sections(space: AssignmentSpace, report: SearchReport) -> list[str]:
    """Return what was chosen for each unit, and the scores of the units."""
    chosen = report.trial(report.best).details["choices"]
    found = [section("Chosen for each unit", _picture(space, space.choices_of(report.trial(report.best).params)))]
    if scores := space.prepared.get("scores"):
        found.append(section("Scores of the units", _score_table(space, scores, chosen)))
    note = "Layers are calibrated on the outputs of the original blocks, in all trials and in the final training."
    return [*found, f'<p class="note">{escape(note)}</p>']


def _picture(space: AssignmentSpace, choices: Sequence[Choice]) -> str:
    """Draw a table with a row for each block and a column for each unit in it; darker cells have larger values."""
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for unit, choice in zip(space.units, choices, strict=True):
        row, column = _place(unit.name)
        share = sum(
            index / max(1, len(values) - 1) for index, values in zip(choice, space.settings.space.values(), strict=True)
        )
        tint = f"background:color-mix(in srgb, currentColor {4 + 26 * share / len(choice):.0f}%, transparent)"
        text = "<br>".join(escape(part) for part in space.label(choice).split(", "))
        cells.setdefault(row, {})[column] = f'<td style="{tint}">{text}</td>'
        columns[column] = None
    head = "<th>block</th>" + "".join(f"<th>{escape(column)}</th>" for column in columns)
    rows = (
        f"<td>{escape(row)}</td>" + "".join(found.get(column, "<td></td>") for column in columns)
        for row, found in cells.items()
    )
    return html_table(head, rows)


def _score_table(space: AssignmentSpace, scores: Mapping[str, Sequence[float]], chosen: Mapping[str, str]) -> str:
    head = "<th>unit</th><th>chosen</th>" + "".join(
        f'<th class="number">{escape(space.label(choice))}</th>' for choice in space.choices
    )
    rows = (
        f"<td>{escape(unit.name)}</td><td>{escape(chosen[unit.name])}</td>"
        + "".join(f'<td class="number">{score:.3g}</td>' for score in scores[unit.name])
        for unit in space.units
    )
    note = (
        "Smaller is better: half of a score is the error of pruning and quantizing, half what a smaller rank "
        "leaves out; the largest values of all units add up to 1."
    )
    return html_table(head, rows) + f'\n<p class="note">{escape(note)}</p>'


def _place(name: str) -> tuple[str, str]:
    """Return the block of a unit and its name within; a unit outside of a block is one by itself."""
    parts = name.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])
