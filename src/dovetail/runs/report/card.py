"""model/README.md: the model card of a merged model, as the hub shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dovetail.display.format import format_score, metric_name, percent, size
from dovetail.models.locate import PLAYGROUND
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from dovetail.runs.report.summary import counted, learned_nothing
from dovetail.runs.yaml import yaml_text
from dovetail.tasks.task import COUNTS, HEAD_KINDS

CARD = "README.md"


def card(report: Report, recipe: Recipe, *, auto: str) -> str:
    """Return the model card as Markdown with the hub's metadata: scores, sizes, the verdict of merging, the recipe.

    auto   name of the auto class of transformers that loads the model

    Of paths on this machine, only the names of files are shown.
    """
    name = _name(report.model)
    warning = learned_nothing(report)
    parts = [
        f"---\n{yaml_text(_metadata(report))}---",
        f"# {name}, {report.task.name}",
        f"{name}, adapted with Dovetail by the chain `{report.chain}`. "
        f"{'' if report.merge is None else report.verdict}".rstrip(),
        *([f"**{warning}**"] if warning else []),
        "## Use",
        _use(auto),
        "## Scores and sizes",
        _table(report),
        f"Scored on the {report.task.split} split of {report.task.name}. {counted(report)}".rstrip(),
        "## Recipe",
        f"```yaml\n{yaml_text(_named(recipe.model_dump(mode='json', exclude_defaults=True, exclude={'output'})))}```",
        "## Environment",
        ", ".join(f"{what} {value}" for what, value in report.environment.items()) + f", seed {report.seed}",
    ]
    return "\n\n".join(parts) + "\n"


def _name(model: str) -> str:
    """Return a model's name: the hub id, or the last part of a path."""
    if model.startswith("package:"):
        return model.removeprefix("package:").partition("/")[0]
    return model if _on_hub(model) else Path(model).name


def _on_hub(model: str) -> bool:
    local = model == PLAYGROUND or model.startswith("package:") or Path(model).is_absolute() or Path(model).exists()
    return not local and model.count("/") <= 1


def _metadata(report: Report) -> dict[str, Any]:
    """Return the metadata that the hub reads; a base that is on no hub is not named there."""
    found: dict[str, Any] = {"base_model": report.model} if _on_hub(report.model) else {}
    return {
        **found,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if report.task.kind in HEAD_KINDS else "text-generation",
        "tags": ["dovetail", *dict.fromkeys(part.split("(")[0].strip() for part in report.chain.split(">>"))],
    }


def _use(auto: str) -> str:
    return (
        f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'name = "..."  # this folder or this repository\n'
        f"model = {auto}.from_pretrained(name)\ntokenizer = AutoTokenizer.from_pretrained(name)\n```"
    )


def _table(report: Report) -> str:
    task, metric = report.task.name, report.task.metric
    scored = report.stages[0].metrics
    columns = [(task, metric), *((task, name) for name in scored[task] if name not in (metric, *COUNTS))]
    columns += [(other, next(iter(scores))) for other, scores in scored.items() if other != task]
    several = len(scored) > 1
    heads = [f"{name}: {metric_name(one)}" if several else metric_name(one) for name, one in columns]
    heads = ["stage", *heads, "bits per weight", "nonzero weights", "size"]
    lines = [heads, ["---", *("---:" for _ in heads[1:])]]
    for row in report.stages:
        scores = [format_score(one, row.metrics.get(name, {}).get(one)) for name, one in columns]
        taken = row.footprint
        sizes = [f"{taken.bits_per_weight:.2f}", percent(taken.nonzero_fraction), size(taken.nbytes)]
        lines.append([row.name, *scores, *sizes])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _named(value: Any) -> Any:
    """Return the values of a recipe with the last part of each absolute path."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_named(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
