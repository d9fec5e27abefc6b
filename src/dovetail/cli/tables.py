"""Tables of the commands plan, methods and evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any, get_args

from rich.markup import escape
from rich.text import Text

from dovetail.chains.link import Adapter, Kind, Link, Quantizer, argument_fields
from dovetail.chains.notation import chain, format_value
from dovetail.chains.registry import links
from dovetail.chains.stages import stages
from dovetail.display.format import format_score, metric_name, percent, size
from dovetail.display.tables import print_table
from dovetail.models.coverage import described
from dovetail.tasks.task import COUNTS

if TYPE_CHECKING:
    from rich.console import Console

    from dovetail.runs.plan import Plan
    from dovetail.runs.report.record import Example


def method_rows() -> list[dict[str, Any]]:
    """Return what each registered link declares, by kind and name."""
    kinds = get_args(Kind)  # in the order in which chains have them
    return [
        {
            "name": name,
            "kind": link.kind,
            "arguments": {
                argument: None if f.default is MISSING else f.default for argument, f in argument_fields(link).items()
            },
            "notation": _notation(link),
            "keeps_zeros": _keeps_zeros(link),
            "keeps_grid": link.keeps_grid,
            "mergeable": link.mergeable,
            "calibrated": bool(link.statistics),
            "learning_rate": link.learning_rate if issubclass(link, Adapter) else None,
            "summary": link.summary,
            "source": link.source,
        }
        for name, link in sorted(links().items(), key=lambda item: (kinds.index(item[1].kind), item[0]))
    ]


def _keeps_zeros(link: type[Link]) -> bool:
    """Return whether the link keeps zeros; of a quantizer, with its default arguments."""
    required = any(f.default is MISSING for f in argument_fields(link).values())
    return link.keeps_zeros and (required or not issubclass(link, Quantizer) or link().has_zero)


def _notation(link: type[Link]) -> str:
    parts = [
        format_value(f.default) if f.metadata.get("positional") else f"{name}={format_value(f.default)}"
        for name, f in argument_fields(link).items()
    ]
    return f"{link.name}({', '.join(parts)})" if parts else link.name


def print_methods(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the table of links."""
    cells: list[list[str | Text]] = []
    for row in rows:
        keeps = "\n".join(what for what in ("zeros", "grid") if row[f"keeps_{what}"])
        rate = f"{row['learning_rate']:g}" if row["learning_rate"] is not None else ""
        about = Text.assemble(f"{row['summary']}\n", (f"{row['notation']}\n", "bold"), (row["source"], "dim"))
        cells.append([row["name"], row["kind"], keeps, "yes" if row["mergeable"] else "no", rate, about])
    heads = ["link", "kind", "keeps", "merges", "rate", "what it does; its arguments and their defaults"]
    kinds = [row["kind"] for row in rows]
    sections = [kinds.index(kind) for kind in kinds]
    print_table(console, heads, cells, words=len(heads), sections=sections)


def untrained_notes(text: str) -> list[str]:
    """Return a note for each stage of a legal chain whose constraints follow no adapter: it trains nothing."""
    return [
        f"note: stage {number} trains nothing: {stage.trained[0].name} follows no adapter. Add one, as in "
        f"lora(r=16) >> {stage.trained[0].name}, or remove it."
        for number, stage in enumerate(stages(chain(text)), 1)
        if stage.trained and not stage.adapters
    ]


def print_layers(console: Console, layers: Mapping[str, str]) -> None:
    """Print the chains of the layers that have their own."""
    for pattern, text in layers.items():
        console.print(f"  {escape(pattern)}: {escape(text)}", soft_wrap=True)


def print_plan(console: Console, plan: Plan) -> None:
    """Print a legal plan: one row per stage, and whether it merges."""
    console.print(f"\n[bold]{escape(plan.chain)}[/bold]", soft_wrap=True)
    print_layers(console, plan.layers)
    heads = [
        "stage", "applied once", "trained", "bits per\nweight", "bytes", "trainable\nparameters",
        "peak\nmemory",
    ]  # fmt: skip
    cells = [
        [
            str(number),
            "\n".join(stage.applied),
            "\n".join(stage.trained),
            f"{stage.bits_per_weight:.4g}",
            f"{stage.nbytes:,}",
            f"{stage.trainable_parameters:,}",
            size(stage.predicted_peak_memory_nbytes) if stage.predicted_peak_memory_nbytes else "",
        ]
        for number, stage in enumerate(plan.stages, 1)
    ]
    print_table(console, heads, cells, words=3)
    for note in untrained_notes(plan.chain):
        console.print(escape(note), soft_wrap=True)
    share = "" if plan.target_fraction is None else f", {percent(plan.target_fraction)} of the model"
    console.print(f"{plan.layer_count} layers, {plan.weights:,} weights in them{share}", soft_wrap=True)
    if plan.covered_fraction is not None:
        console.print(described(plan.covered_fraction, plan.left_out), soft_wrap=True)
    if plan.predicted_peak_memory_nbytes is None:
        console.print("memory of training not predicted", soft_wrap=True)
    else:
        console.print(f"memory for batches of {plan.batch_size} rows of {plan.length} tokens", soft_wrap=True)
        console.print(escape(_fit(plan)), soft_wrap=True)
    if plan.mergeable:
        console.print(f"merges; {plan.merge_advice}" if plan.merge_advice else "merges without loss", soft_wrap=True)
    else:
        console.print(f"does not merge without loss: {escape(plan.merge_advice)}", soft_wrap=True)
    for kind, layers in plan.export_kinds.items():
        console.print(f"exports {layers} layers as {kind}", soft_wrap=True)
    for reason in plan.export_refused:
        console.print(escape(reason), soft_wrap=True)


def _fit(plan: Plan) -> str:
    """Return the peak and its parts in words, and whether it fits."""
    names = {"activations": "activations and gradients"}
    parts = ", ".join(f"{names.get(part, part)} {size(nbytes)}" for part, nbytes in plan.memory_parts.items())
    peak = plan.predicted_peak_memory_nbytes or plan.nbytes
    said = f"{size(peak)} at the peak ({parts})" if parts else f"trains nothing; the model takes {size(peak)}"
    if plan.gpu_nbytes is None:
        return said
    said = f"fits {size(plan.gpu_nbytes)}: {'yes' if plan.fits else 'no'}, {said}"
    return f"{said}\n{plan.change}" if plan.change else said


def print_scores(console: Console, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print one row per task and metric."""
    cells = [
        [task, metric_name(metric), format_score(metric, value), f"{metrics['n']:.0f}"]
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if metric not in COUNTS
    ]
    print_table(console, ["task", "metric", "score", "records"], cells, words=2)


def print_samples(console: Console, examples: Mapping[str, Sequence[Example]]) -> None:
    """Print prompts with the expected answer and the model's, of each task."""
    for task, found in examples.items():
        for number, example in enumerate(found, 1):
            console.print(f"\n[bold]{escape(task)}, record {number}[/bold]", soft_wrap=True)
            texts = (
                ("prompt", example.prompt),
                ("expected", example.expected.strip()),
                ("output", example.after.strip()),
            )
            for name, text in texts:
                if text:
                    console.print(f"[dim]{name:<9}[/dim] {escape(text)}", soft_wrap=True)
