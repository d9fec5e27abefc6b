"""The command evaluate: a model, a run or an adapter, on tasks, recipes' data, MMLU's files and lm-eval's tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.terminal import Json, console, find_task, print_json, quiet
from dovetail.errors import DataError

if TYPE_CHECKING:
    from dovetail.runs.report.record import Example
    from dovetail.tasks.task import Task

_MMLU, _LM_EVAL = "mmlu:", "lm-eval:"
_SHOWN = 3
"""Sample outputs of each task that are printed unless the command says how many."""

Scores = dict[str, dict[str, float]]


def register(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command(epilog="Example: dovetail evaluate runs/quickstart --task word_problems --task multiple_choice")(
        evaluate
    )


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, a model (also a packed one), or the adapter of a run.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="TASK",
            help="A playground task, a recipe, mmlu:FOLDER or lm-eval:NAME. \\[default: the data of the run]",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FOLDER", help="A saved adapter, attached to the model first.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="SPLIT", help="\\[default: test, or validation without a test split]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Score only the first N records.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", min=0, metavar="N", help="Answered examples in the prompt. \\[default: the task's]"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Rows of a batch.")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, metavar="N", help="Tokens of a row. \\[default: 1024, or fewer]"),
    ] = None,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="FOLDER", help="YAML tasks for lm-eval:NAME, read offline.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=0, metavar="N", help="Sample outputs of a task. \\[default: 3, with --json 0]"),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Score a model on tasks, and show samples of what it answers."""
    quiet()
    import torch

    from dovetail import processes
    from dovetail.checkpoint.config import best_device
    from dovetail.cli.tables import print_samples, print_scores
    from dovetail.runs.report.record import Example, finite
    from dovetail.runs.result import load_result
    from dovetail.tasks.scoring import evaluate as evaluate_model
    from dovetail.tasks.scoring.harness import evaluate_lm_eval

    names = task or [_data_of(model)]
    if any(name.startswith(_LM_EVAL) for name in names):
        processes.refuse("evaluate", DataError)
    theirs = [name.removeprefix(_LM_EVAL) for name in names if name.startswith(_LM_EVAL)]
    groups = [_tasks(name) for name in names if not name.startswith(_LM_EVAL)]
    tasks = [each for group in groups for each in group]
    if shots is not None:
        tasks = [replace(each, scoring=each.scoring.model_copy(update={"shots": shots})) for each in tasks]
    loaded, tokenizer = load_result(model, adapter=adapter, task_kind=tasks[0].kind if tasks else None)
    torch.nn.Module.to(loaded, best_device())
    shown = samples if samples is not None else 0 if as_json else _SHOWN
    scores: Scores = {}
    examples: dict[str, list[Example]] = {}
    if tasks:
        chosen = split or next((name for name in ("test", "validation") if name in tasks[0].splits), "test")
        outputs: dict[str, list[str]] = {}
        scores = evaluate_model(
            loaded, tokenizer, tasks, split=chosen, limit=limit, batch_size=batch_size, max_length=max_length or 1024,
            on_outputs=outputs.__setitem__ if shown else None, in_parts=True, progress=processes.first(),
        )  # fmt: skip
        for group in groups:
            scores |= _mean(group, scores)
        for each in tasks:
            found = zip(each.split(chosen), outputs.get(each.name, [])[:shown], strict=False)
            examples[each.name] = [Example.of(each, record, "", said) for record, said in found]
    if theirs:
        more, logged = evaluate_lm_eval(
            loaded, tokenizer, theirs, include=include, limit=limit, shots=shots, batch_size=batch_size,
            max_length=max_length,
        )  # fmt: skip
        scores |= more
        for name, found in logged.items():
            examples[name] = [
                Example(prompt=Example.shorten(prompt), expected=Example.shorten(right), before="",
                        after=Example.shorten(said))
                for prompt, right, said in found[:shown]
            ]  # fmt: skip
    if not processes.first():
        return
    if not as_json:
        print_scores(console(), scores)
        print_samples(console(), examples)
        return
    said = {name: {metric: finite(score) for metric, score in found.items()} for name, found in scores.items()}
    if samples:
        lines = {
            name: [{"prompt": each.prompt, "expected": each.expected, "output": each.after} for each in found]
            for name, found in examples.items()
        }
        print_json({"scores": said, "samples": lines})
    else:
        print_json(said)


def _data_of(model: str) -> str:
    """Return the recipe of a run, whose data are scored where no task is named; DataError for what is no run."""
    from dovetail.runs.folder import RECIPE

    path = Path(model)
    for folder in (path, path.parent):  # a run, or its folder model, packed or adapter
        if (folder / RECIPE).is_file():
            return str(folder / RECIPE)
    rule, fix = "a model that is no run has no data of its own", "pass --task TASK"
    raise DataError(f"evaluate {model}", found="no task", rule=rule, fix=fix)


def _tasks(name: str) -> list[Task]:
    if name.startswith(_MMLU):
        from dovetail.tasks.mmlu import mmlu_tasks

        return mmlu_tasks(name.removeprefix(_MMLU))
    return [find_task(name)]


def _mean(group: list[Task], scores: Scores) -> Scores:
    """Return the score over all records of the tasks of MMLU, as lm-eval weighs them; nothing for other tasks."""
    if len(group) < 2:
        return {}
    found = [scores[task.name] for task in group]
    n = sum(each["n"] for each in found)
    return {"mmlu": {"accuracy": sum(each["accuracy"] * each["n"] for each in found) / n, "n": n}}
