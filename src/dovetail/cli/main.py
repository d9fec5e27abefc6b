"""The command `dovetail`. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail.cli import experts as cli_experts
from dovetail.cli import pack as cli_pack
from dovetail.cli.terminal import Json, console, find_task, print_json, quiet
from dovetail.errors import DovetailError

app = typer.Typer(
    name="dovetail", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt language models on small hardware: adapters, quantization and pruning as one chain, merged without "
    "loss.\n\nStart with [bold]dovetail quickstart[/bold]: one model pruned, quantized, fine-tuned, merged and "
    "reported in a few minutes, offline.",
)  # fmt: skip

Output = Annotated[Path | None, typer.Option(help="Folder for the results, new or empty. \\[default: runs/NAME]")]
Resume = Annotated[bool, typer.Option(help="Go on where a killed run with the same recipe and output stopped.")]
Targets = Annotated[str, typer.Option(help="Layers: labels (query, value, up, ...), globs or all-linear.")]
TaskName = Annotated[str, typer.Option("--task", help="A task of the playground, or a recipe whose data is taken.")]


@app.command(epilog="Example: dovetail quickstart --output runs/first")
def quickstart(output: Output = None, resume: Resume = True, as_json: Json = False) -> None:
    """Prune, quantize, fine-tune, merge and report the playground's model. Offline, a few minutes on two cores."""
    import yaml

    from dovetail.runs.quickstart import RECIPE

    _run(yaml.safe_load(RECIPE), "quickstart", output, resume, as_json)


@app.command(epilog="Example: dovetail run examples/minilm_stsb.yaml --output runs/stsb")
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; docs/recipes.md lists its keys.")],
    output: Output = None,
    resume: Resume = True,
    as_json: Json = False,
) -> None:
    """Do what a recipe says: load, evaluate, prune, quantize, train, merge, save and report."""
    _run(recipe, recipe.stem, output, resume, as_json)


@app.command(epilog="Example: dovetail study examples/sqft/table.yaml --output runs/sqft")
def study(
    recipe: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file; docs/study.md lists its keys.")],
    output: Annotated[Path, typer.Option(help="Folder for everything: new, empty, or an earlier start's.")],
    resume: Annotated[bool, typer.Option(help="Keep finished runs and go on; else throw away what is there.")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, a process and a thread each.")] = 1,
    as_json: Json = False,
) -> None:
    """Run many recipes with several seeds, beside each other: tables of quality and of measured cost, and curves."""
    quiet()
    from time import perf_counter

    from dovetail.studies import study as run_study
    from dovetail.studies.tables import event_line, print_study

    started = perf_counter()
    found = run_study(
        recipe, output=output, resume=resume, jobs=jobs,
        on_run=lambda event: print(event_line(event, perf_counter() - started), file=sys.stderr, flush=True),
    )  # fmt: skip
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_study(console(), found)
        print(f"\n{output / 'study.html'} is the page of this study")


@app.command(epilog='Example: dovetail plan "wanda(0.5) >> nf4 >> lora(r=16) >> remask >> regrid" --task word_problems')
def plan(
    chain: Annotated[str, typer.Argument(help='The chain, in quotes: "nf4 >> lora(r=16) >> regrid".')],
    model: Annotated[str, typer.Option(help="playground, a folder, package:NAME/FOLDER or a hub id.")] = "playground",
    targets: Targets = "all-linear",
    task: Annotated[str, typer.Option(help="A playground task or a recipe: its longest records set the batch.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row, where no task is named.")] = 128,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory.")] = False,
    memory: Annotated[bool, typer.Option(help="Predict the memory of training: minutes for large models.")] = True,
    as_json: Json = False,
) -> None:
    """Say what a chain will do, from the model's config alone: legality, stages, exact bits, memory of training."""
    quiet()
    from dataclasses import asdict

    from dovetail.cli.tables import print_plan
    from dovetail.runs.plan import plan as make_plan
    from dovetail.tasks.find import number_of_labels

    found = find_task(task) if task else None
    made = make_plan(
        chain, model, targets=[part.strip() for part in targets.split(",")], task=found, batch_size=batch_size,
        length=length, bf16=bf16, gradient_checkpointing=gradient_checkpointing, memory=memory,
        num_labels=None if found is None else number_of_labels(found),
    )  # fmt: skip
    if as_json:
        print_json(asdict(made))
    elif made.legal:
        print_plan(console(), made)
    if not made.legal:
        print(made.problem, file=sys.stderr)
        raise typer.Exit(2)


@app.command(epilog="Example: dovetail methods --json")
def methods(as_json: Json = False) -> None:
    """List the links that a chain is made of, with their arguments and what they keep."""
    from dovetail.cli.tables import method_rows, print_methods

    rows = method_rows()
    if as_json:
        print_json(rows)
    else:
        print_methods(console(), rows)


@app.command(epilog="Example: dovetail evaluate runs/quickstart/model --task word_problems --task multiple_choice")
def evaluate(
    model: Annotated[str, typer.Argument(help="playground, a folder, package:NAME/FOLDER or a hub id.")],
    task: Annotated[list[str], typer.Option(help="A task of the playground, or a recipe whose data is taken.")],
    adapter: Annotated[Path | None, typer.Option(help="A saved adapter to put on the model first.")] = None,
    split: Annotated[str | None, typer.Option(help="\\[default: test, or validation where there is no test]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 64,
    as_json: Json = False,
) -> None:
    """Score a model on tasks."""
    quiet()
    from dovetail.checkpoint.adapter import load_adapter
    from dovetail.checkpoint.load import load
    from dovetail.cli.tables import print_scores
    from dovetail.runs.report.record import finite
    from dovetail.tasks.scoring import evaluate as evaluate_model

    tasks = [find_task(name) for name in task]
    chosen = split or next((name for name in ("test", "validation") if name in tasks[0].splits), "test")
    loaded, tokenizer = load(model, task_kind=tasks[0].kind)
    if adapter is not None:
        load_adapter(loaded, adapter)
    scores = evaluate_model(loaded, tokenizer, tasks, split=chosen, limit=limit, batch_size=batch_size)
    if as_json:
        print_json({name: finite(found) for name, found in scores.items()})
    else:
        print_scores(console(), scores)


@app.command(epilog="Example: dovetail report runs/quickstart")
def report(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder that a run wrote.")],
    as_json: Json = False,
) -> None:
    """Show the report of a run again, and write its page anew."""
    from dovetail.runs.folder import PAGE, RECIPE, write_whole
    from dovetail.runs.recipe import Recipe
    from dovetail.runs.report.page import page
    from dovetail.runs.report.record import Report
    from dovetail.runs.report.summary import print_summary

    found = Report.load(directory)
    write_whole(directory / PAGE, page(found, Recipe.load(directory / RECIPE)))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_summary(console(), found, directory)


cli_pack.register(app)
app.add_typer(cli_experts.experts_app)


def main() -> None:
    """Entry point: bad input is one message on standard error and exit code 2."""
    try:
        app()
    except DovetailError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def _run(recipe: Path | dict[str, Any], name: str, output: Path | None, resume: bool, as_json: bool) -> None:
    quiet()
    from dovetail.runs.flow import run as run_recipe
    from dovetail.runs.folder import choose_output
    from dovetail.runs.recipe import Recipe
    from dovetail.runs.report.summary import print_summary, row_line

    loaded = Recipe.load(recipe) if isinstance(recipe, Path) else Recipe.parse(recipe)
    output = choose_output(output or loaded.output, name)
    if not as_json:
        print(f"{loaded.chain}  on {loaded.model}, written to {output}", file=sys.stderr)
    found = run_recipe(
        loaded, output=output, resume=resume,
        on_row=None if as_json else lambda row: print(row_line(row), file=sys.stderr, flush=True),
    )  # fmt: skip
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_summary(console(), found, output)


if __name__ == "__main__":
    main()
