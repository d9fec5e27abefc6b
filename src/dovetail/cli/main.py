"""The command `dovetail`. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dovetail import processes
from dovetail.cli import compress as cli_compress
from dovetail.cli import evaluate as cli_evaluate
from dovetail.cli import experts as cli_experts
from dovetail.cli import export as cli_export
from dovetail.cli import own as cli_own
from dovetail.cli import pack as cli_pack
from dovetail.cli.terminal import Commands, Json, LayersFile, Targets, console, find_task, print_json, quiet, resumable
from dovetail.errors import DovetailError
from dovetail.progress import Bar

app = typer.Typer(
    name="dovetail", cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich", epilog="Example: dovetail quickstart --output runs/first",
    help="Adapt language models on small hardware: adapters, quantization and pruning as one chain, merged without "
    "loss.\n\nStart with [bold]dovetail quickstart[/bold]: it prunes, quantizes, fine-tunes, merges and reports one "
    "model, offline, in a few minutes.",
)  # fmt: skip

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Results, new or empty. \\[default: runs/NAME]"),
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Resume a stopped run with the same recipe and output.")
]
Model = Annotated[
    str,
    typer.Option("--model", metavar="MODEL", help="playground, a folder, FILE.gguf, package:NAME/FOLDER or a hub id."),
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"dovetail {version('dovetail')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options of the program itself."""


@app.command(epilog="Example: dovetail quickstart --output runs/first")
def quickstart(output: Output = None, resume: Resume = True, as_json: Json = False) -> None:
    """Prune, quantize, fine-tune, merge and report the playground's model: offline, a few minutes on two cores."""
    import yaml

    from dovetail.runs.quickstart import RECIPE

    _run(yaml.safe_load(RECIPE), "quickstart", output, resume, as_json, ["quickstart"])


@app.command(epilog="Example: dovetail run examples/minilm_stsb.yaml --output runs/stsb")
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; docs/recipes.md lists its keys.")],
    output: Output = None,
    resume: Resume = True,
    as_json: Json = False,
) -> None:
    """Run a recipe: load, evaluate, prune, quantize, train, merge, save and report."""
    _run(recipe, recipe.stem, output, resume, as_json, ["run", str(recipe)])


@app.command(epilog="Example: dovetail study examples/sqft/table.yaml --output runs/sqft")
def study(
    recipe: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file; docs/study.md lists its keys.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Results: new, empty, or of an earlier start."),
    ],
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep the finished runs of an earlier start; else delete them.")
    ] = True,
    jobs: Annotated[
        int,
        typer.Option("--jobs", min=1, metavar="N", help="Runs at a time, each in a process of one thread."),
    ] = 1,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="Database that processes share, and --output with it."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run the part of the study that its key `quick` keeps.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run many recipes with several seeds and write tables of quality and measured cost, and curves."""
    quiet()
    from dovetail.cli.study_progress import printed_events
    from dovetail.studies import Study
    from dovetail.studies import study as run_study
    from dovetail.studies.tables import print_study

    options = [*(["--jobs", str(jobs)] if jobs > 1 else []), *(["--storage", storage] if storage else [])]
    options += ["--quick"] if quick else []
    with resumable(["study", str(recipe), "--output", str(output), *options]), printed_events() as show:
        asked = Study.load(recipe)
        found = run_study(
            asked.quickly() if quick else asked, output=output, storage=storage, resume=resume, jobs=jobs, on_run=show,
            progress=not sys.stderr.isatty(),
        )  # fmt: skip
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_study(console(), found)
        print(f"\nSizes, memory and time of every run: {output / 'table.csv'}")
        print(f"The page of this study is {output / 'study.html'}")


@app.command(epilog="Example: dovetail search examples/chains.yaml --output runs/chains --workers 2")
def search(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file with `search`; see docs/search.md.")],
    output: Output = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", metavar="URL", help="Database that all workers share. \\[default: SQLite in the output]"
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes on this machine.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue a stopped search; else delete its trials.")
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the space, the trials, predicted time and memory; run nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search the best chain: train many candidates, and write the best ones as recipes."""
    quiet()
    from dataclasses import asdict

    from dovetail.cli.search_tables import print_preview, print_search, trial_line
    from dovetail.runs.folder import choose_output
    from dovetail.runs.recipe import Recipe
    from dovetail.searches.flow import preview
    from dovetail.searches.flow import search as run_search

    loaded = Recipe.load(recipe)
    if plan:
        cost = preview(loaded)
        if as_json:
            print_json(asdict(cost))
        else:
            print_preview(console(), cost)
        return
    output = choose_output(output or loaded.output, recipe.stem)
    options = [*(["--storage", storage] if storage else []), *(["--workers", str(workers)] if workers > 1 else [])]
    with resumable(["search", str(recipe), "--output", str(output), *options]):
        found = run_search(
            loaded, output=output, storage=storage, workers=workers, resume=resume,
            on_trial=None if as_json else lambda trial: print(trial_line(trial), file=sys.stderr, flush=True),
        )  # fmt: skip
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_search(console(), found, output)


@app.command(epilog='Example: dovetail plan "wanda(0.5) >> nf4 >> lora(r=16) >> remask >> regrid" --task word_problems')
def plan(
    chain: Annotated[str, typer.Argument(metavar="CHAIN", help='In quotes: "nf4 >> lora(r=16) >> regrid".')],
    model: Model = "playground",
    layers: LayersFile = None,
    targets: Targets = "all-linear",
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="TASK", help="A playground task or a recipe: its longest records set the batch."
        ),
    ] = "",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Rows of a batch.")] = 32,
    length: Annotated[int, typer.Option("--length", min=2, metavar="N", help="Tokens of a row, without a task.")] = 128,
    packing: Annotated[
        bool, typer.Option("--packing", help="Rows of several texts, as long as a row may be: 512 tokens.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, slower.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Predict the memory of training.")] = True,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SIZE", help="24GB, 80GiB: does the training fit, and if not, what to change?"),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FORMAT", help="Which layers fit this format of `dovetail export`?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a chain does to a model, from its config alone: legality, stages, exact bits, memory of training."""
    quiet()
    from dataclasses import asdict

    from dovetail.cli.tables import print_plan
    from dovetail.runs.plan import plan as make_plan
    from dovetail.runs.recipe import read_layers
    from dovetail.tasks.find import number_of_labels

    found = find_task(task) if task else None
    with Bar("plan", delay=1.0) as bar:
        made = make_plan(
            chain, model, layers=None if layers is None else read_layers(layers),
            targets=[part.strip() for part in targets.split(",")], task=found, batch_size=batch_size,
            length=length, packing=packing, bf16=bf16, gradient_checkpointing=gradient_checkpointing, memory=memory,
            gpu=gpu, to=to, num_labels=None if found is None else number_of_labels(found),
            on_step=lambda text: bar.advance(note=text),
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
    """List the links for chains, with their arguments and what they keep."""
    from dovetail.cli.tables import method_rows, print_methods

    rows = method_rows()
    if as_json:
        print_json(rows)
    else:
        print_methods(console(), rows)


@app.command(epilog="Example: dovetail report runs/quickstart")
def report(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a finished run.")],
    as_json: Json = False,
) -> None:
    """Print the report of a run and rewrite its page."""
    from dovetail.files import write_whole
    from dovetail.runs.folder import PAGE, RECIPE
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


cli_evaluate.register(app)
cli_compress.register(app)
cli_own.register(app)
cli_pack.register(app)
cli_export.register(app)
app.add_typer(cli_experts.experts_app)


def main() -> None:
    """Run the command line: bad input is one message on standard error and exit code 2."""
    gc.set_threshold(100_000)  # importing transformers creates objects that all stay: collecting took a quarter of it
    atexit.register(gc.freeze)  # the last collection would visit them all again: a fifth of the time of a plan
    try:
        with Bar(" ".join(["dovetail", *sys.argv[1:2]])):
            app(prog_name="dovetail")
    except DovetailError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def _run(
    recipe: Path | dict[str, Any], name: str, output: Path | None, resume: bool, as_json: bool, command: list[str]
) -> None:
    """Run a recipe; `command` is what the user typed, without its options."""
    quiet()
    from dovetail.runs.recipe import Recipe

    loaded = Recipe.read(recipe)
    from dovetail.cli.tables import untrained_notes
    from dovetail.runs.flow import run as run_recipe
    from dovetail.runs.folder import choose_output
    from dovetail.runs.report.summary import print_summary, row_line

    if not processes.first():
        run_recipe(loaded, output=output, resume=resume, progress=False)
        return
    output = choose_output(output or loaded.output, name)
    if not as_json:
        print(f"{loaded.chain}  on {loaded.model}, written to {output}", file=sys.stderr)
        for note in untrained_notes(loaded.chain):
            print(note, file=sys.stderr)
    with resumable([*command, "--output", str(output)]):
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
