"""The commands for task experts: `dovetail experts ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.pack import Base, Density, File
from dovetail.cli.terminal import Commands, Json, console, find_task, print_json, quiet

if TYPE_CHECKING:
    import numpy as np

    from dovetail.experts import TaskVector

experts_app = typer.Typer(
    name="experts", cls=Commands, no_args_is_help=True, rich_markup_mode="rich",
    help="Task experts: task vectors as signs and a scale, at a fiftieth of their size. `dovetail pack` makes one.",
    epilog="Example: dovetail experts similarity store/*.dvt",
)  # fmt: skip

Alpha = Annotated[
    float | None,
    typer.Option("--alpha", metavar="NUMBER", help="Alpha of the new expert. \\[default: the one of the least error]"),
]
Files = Annotated[list[Path], typer.Argument(metavar="EXPERT...", help=".dvt files.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="PATH", help="A .dvt file, or a folder to unpack into.")
]


_MEASURES = {
    "cosine": "cosine",
    "sign_agreement": "share of equal signs among the values that both keep",
    "hamming": "share of equal values: 1 - Hamming distance / values",
}
"""Measures of `similarity`, with their titles."""


@experts_app.command("list", epilog="Example: dovetail experts list store/")
def list_experts(
    place: Annotated[str, typer.Argument(metavar="STORE", help="A folder of .dvt files, or an http(s) address.")],
    as_json: Json = False,
) -> None:
    """List the experts of a folder or an HTTP server."""
    from dovetail.cli.expert_tables import listed, print_list

    rows = listed(place)
    if as_json:
        print_json(rows)
    else:
        print_list(console(), rows)


@experts_app.command(epilog="Example: dovetail experts similarity a.dvt b.dvt c.dvt --plot matrix.png")
def similarity(
    files: Files,
    what: Annotated[
        str, typer.Option("--what", metavar="MEASURE", help="cosine, sign_agreement or hamming.")
    ] = "cosine",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write the matrix to this PNG file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the similarity of experts, computed on their masks."""
    from dovetail.cli.expert_tables import matrix_plot, print_matrix, similarities
    from dovetail.errors import DataError
    from dovetail.files import check_file, write_bytes

    if what not in _MEASURES:
        raise DataError("--what", found=what, rule="the measure must be cosine, sign_agreement or hamming",
                        fix="pass --what cosine")  # fmt: skip
    if plot is not None:
        check_file(plot)
    names = [path.stem for path in files]
    every = similarities(files)
    matrix, title = _matrix(every, what), _MEASURES[what]
    if plot is not None:
        write_bytes(plot, matrix_plot(names, matrix, title))
    if as_json:
        print_json({"names": names, "pairs": [[dict(cell) for cell in row] for row in every]})
    else:
        print_matrix(console(), names, matrix, title)


def _matrix(every: list[list[dict[str, float]]], what: str) -> np.ndarray:
    import numpy as np

    return np.array(
        [[1 - c["hamming"] / max(c["numel"], 1) if what == "hamming" else c[what] for c in row] for row in every]
    )


@experts_app.command(epilog="Example: dovetail experts merge a.dvt b.dvt --method ties -o both.dvt")
def merge(
    files: Files,
    output: Output,
    method: Annotated[
        str, typer.Option("--method", metavar="METHOD", help="average, task_arithmetic, ties, dare or dare_ties.")
    ] = "average",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="NUMBERS", help="One per expert, with commas. \\[default: 1 each]"),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", metavar="SHARE", min=0, max=1, help="Share of values that ties and dare keep."),
    ] = None,
    density: Density = 0.2,
    alpha: Alpha = None,
    base: Base = None,
    seed: Annotated[int, typer.Option("--seed", metavar="SEED", help="Seed of dare's random draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Merge experts into an expert (with --density and --alpha), or into a folder with the exact merged values."""
    from dovetail.errors import DataError

    _check_output(output)
    if method in ("dare", "dare_ties") and not keep:
        rule = f"the probability with which {method} keeps a value must be above 0"
        raise DataError("--keep", found=str(keep), rule=rule, fix="pass --keep 0.5")
    if keep is not None and method in ("average", "task_arithmetic"):
        raise DataError("--keep", found=f"--method {method}", rule="--keep needs ties, dare or dare_ties",
                        fix="pass --density for the density of the new expert")  # fmt: skip
    chosen = None if weights is None else _numbers(weights)
    quiet()
    from dovetail import experts

    loaded = [experts.load(path) for path in files]
    merged = experts.merge(loaded, method, weights=chosen, density=keep, seed=seed)
    facts = {"merged": [path.name for path in files], "method": method}
    written = str(_write(merged, output, density, alpha, base, facts))
    if as_json:
        print_json({"output": written, **facts})
    else:
        print(written)


@experts_app.command(
    epilog="Example: dovetail experts compose a.dvt b.dvt --base playground --task multiple_choice -o c.dvt"
)
def compose(
    files: Files,
    output: Output,
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The base model of the experts.")],
    task: Annotated[str, typer.Option("--task", metavar="TASK", help="A playground task, or a recipe for its data.")],
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=1, help="Training records to use.")] = 32,
    budget: Annotated[int, typer.Option("--budget", metavar="N", min=1, help="Compositions to try.")] = 40,
    density: Density = 0.2,
    alpha: Alpha = None,
    seed: Annotated[int, typer.Option("--seed", metavar="SEED", help="Seed of the search.")] = 0,
    as_json: Json = False,
) -> None:
    """Find weights of experts for a new task from a few examples, without gradients (LoraHub)."""
    _check_output(output)
    quiet()
    from dovetail import experts
    from dovetail.experts.sources import base_of
    from dovetail.experts.unpacking import ready

    found = find_task(task)
    loaded = [experts.load(path) for path in files]
    model, tokenizer = base_of(loaded[0], base)
    model = ready(model, loaded[0])
    made = experts.compose(loaded, model, tokenizer, found, limit=examples, budget=budget, seed=seed)
    named = {path.stem: round(weight, 4) for path, weight in zip(files, made.weights, strict=True)}
    written = _write(made.task_vector, output, density, alpha, base, {"composed": named})
    if as_json:
        print_json({"output": str(written), "weights": named, "loss": made.loss})
    else:
        print(
            f"{written}: loss {made.loss:.4f}, " + ", ".join(f"{name} {weight:+.2f}" for name, weight in named.items())
        )


def _check_output(output: Path) -> None:
    from dovetail.files import check_file, check_folder

    if output.suffix == ".dvt":
        check_file(output)
    else:
        check_folder(output)


def _write(
    vector: TaskVector, output: Path, density: float, alpha: float | None, base: str | None, provenance: dict[str, Any]
) -> Path:
    from dovetail import experts
    from dovetail.files import writing

    if output.suffix != ".dvt":
        with writing(output):
            return experts.unpack(vector, output, base)
    made = experts.compress(vector, density, 1.0 if alpha is None else alpha, provenance=provenance)
    if alpha is None:  # a sum of experts is sparse, so its standard deviation is far below its values
        scale, nearest = made.header.scales[0], experts.baselines.stc(vector, density).header.scales[0]
        made = made.with_alpha(nearest / scale) if nearest else made
    made.save(output)
    return output


@experts_app.command(epilog="Example: dovetail experts verify store/*.dvt")
def verify(files: Files, as_json: Json = False) -> None:
    """Check all checksums and blocks of expert files. The exit code is 2 if a file is damaged."""
    from dovetail import experts
    from dovetail.errors import DovetailError

    problems: dict[str, str | None] = {}
    for path in files:
        try:
            experts.verify(experts.load(path))
            problems[str(path)] = None
            if not as_json:
                print(f"{path}: complete")
        except DovetailError as error:
            problems[str(path)] = str(error)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    if as_json:
        print_json([{"file": path, "complete": error is None, "error": error} for path, error in problems.items()])
    if any(problems.values()):
        raise typer.Exit(2)


@experts_app.command(epilog="Example: dovetail experts index store/")
def index(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of .dvt files.")]) -> None:
    """Write index.json into a folder, so that any HTTP server of the folder is a store."""
    from dovetail.experts import Store

    print(Store.write_index(folder))


@experts_app.command(epilog="Example: dovetail experts bench french.dvt")
def bench(
    expert: File,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Measurements of each part.")] = 5,
    threads: Annotated[int, typer.Option("--threads", metavar="N", min=1, help="Threads of the decoder.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure reading, checking and decoding of an expert, compared with a copy of its uncompressed bytes."""
    from dovetail.cli.expert_tables import measure, print_timings

    found = measure(expert, rounds, threads)
    if as_json:
        print_json(found)
    else:
        print_timings(console(), found)


def _numbers(text: str) -> list[float]:
    from dovetail.errors import DataError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise DataError("--weights", found=repr(text), rule="weights must be numbers with commas",
                        fix="pass --weights 1,0.5,0.5") from None  # fmt: skip
