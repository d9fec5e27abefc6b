"""The commands of many experts: `dovetail experts ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.pack import Base, Density, File
from dovetail.cli.terminal import Json, console, find_task, print_json, quiet

if TYPE_CHECKING:
    import numpy as np

    from dovetail.experts import TaskVector

experts_app = typer.Typer(
    name="experts", no_args_is_help=True, rich_markup_mode="rich",
    help="Experts: task vectors as signs and a scale, a fiftieth of their size. `dovetail pack` makes one.",
)  # fmt: skip

Alpha = Annotated[float | None, typer.Option(help="Of the new expert. \\[default: of the scale nearest to its values]")]
Files = Annotated[list[Path], typer.Argument(metavar="EXPERT...", help=".dvt files.")]


_MEASURES = {
    "cosine": "cosine",
    "sign_agreement": "share of the same signs, of values that both keep",
    "hamming": "share of the same values: 1 - Hamming distance / values",
}
"""What `similarity` draws, and how it is called there."""


@experts_app.command("list", epilog="Example: dovetail experts list store/")
def list_experts(
    place: Annotated[str, typer.Argument(metavar="STORE", help="A folder of .dvt files, or an http(s) address.")],
    as_json: Json = False,
) -> None:
    """List the experts of a folder or an HTTP origin."""
    from dovetail.cli.expert_tables import listed, print_list

    rows = listed(place)
    if as_json:
        print_json(rows)
    else:
        print_list(console(), rows)


@experts_app.command(epilog="Example: dovetail experts similarity a.dvt b.dvt c.dvt --plot matrix.png")
def similarity(
    files: Files,
    what: Annotated[str, typer.Option(help="cosine, sign_agreement or hamming.")] = "cosine",
    plot: Annotated[Path | None, typer.Option(help="Write the matrix here, as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Draw how alike experts are, counted on their masks."""
    from dovetail.cli.expert_tables import matrix_plot, print_matrix, similarities
    from dovetail.errors import DataError
    from dovetail.files import check_file, write_bytes

    if what not in _MEASURES:
        raise DataError("--what", found=what, rule="cosine, sign_agreement or hamming")
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
    output: Annotated[Path, typer.Option("--output", "-o", help="A .dvt file, or a folder to unpack into.")],
    method: Annotated[str, typer.Option(help="average, task_arithmetic, ties, dare or dare_ties.")] = "average",
    weights: Annotated[str | None, typer.Option(help="One for each, with commas. \\[default: 1 each]")] = None,
    keep: Annotated[float | None, typer.Option(min=0, max=1, help="Of ties and dare: share of values to keep.")] = None,
    density: Density = 0.2,
    alpha: Alpha = None,
    base: Base = None,
    seed: Annotated[int, typer.Option(help="Of dare's draws.")] = 0,
) -> None:
    """Merge experts into one: an expert again (--density, --alpha), or a folder with the merged values exactly."""
    from dovetail.errors import DataError

    _check_output(output)
    if method in ("dare", "dare_ties") and not keep:
        rule = f"{method} keeps a value with a chance above 0"
        raise DataError("--keep", found=str(keep), rule=rule, fix="--keep 0.5")
    if keep is not None and method in ("average", "task_arithmetic"):
        raise DataError("--keep", found=f"--method {method}", rule="it is of ties, dare and dare_ties",
                        fix="--density is that of the new expert")  # fmt: skip
    chosen = None if weights is None else _numbers(weights)
    quiet()
    from dovetail import experts

    loaded = [experts.load(path) for path in files]
    merged = experts.merge(loaded, method, weights=chosen, density=keep, seed=seed)
    done = _write(merged, output, density, alpha, base, {"merged": [path.name for path in files], "method": method})
    print(done)


@experts_app.command(
    epilog="Example: dovetail experts compose a.dvt b.dvt --base playground --task multiple_choice -o c.dvt"
)
def compose(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .dvt file, or a folder to unpack into.")],
    base: Annotated[str, typer.Option(help="The base model of the experts.")],
    task: Annotated[str, typer.Option(help="A task of the playground, or a recipe whose data is taken.")],
    examples: Annotated[int, typer.Option(min=1, help="Training records to look at.")] = 32,
    budget: Annotated[int, typer.Option(min=1, help="Weights to try.")] = 40,
    density: Density = 0.2,
    alpha: Alpha = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    as_json: Json = False,
) -> None:
    """Weigh experts for a new task by a few examples, without gradients (LoraHub)."""
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
    if alpha is None:  # sums of experts are sparse: their standard deviation would be a fraction of their values
        scale, nearest = made.header.scales[0], experts.baselines.stc(vector, density).header.scales[0]
        made = made.with_alpha(nearest / scale) if nearest else made
    made.save(output)
    return output


@experts_app.command(epilog="Example: dovetail experts verify store/*.dvt")
def verify(files: Files) -> None:
    """Check every checksum and every block of expert files. Exit code 2 where one is damaged."""
    from dovetail import experts
    from dovetail.errors import DovetailError

    wrong = 0
    for path in files:
        try:
            experts.verify(experts.load(path))
            print(f"{path}: whole")
        except DovetailError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            wrong += 1
    if wrong:
        raise typer.Exit(2)


@experts_app.command(epilog="Example: dovetail experts index store/")
def index(folder: Annotated[Path, typer.Argument(help="A folder of .dvt files.")]) -> None:
    """Write index.json, with which any HTTP server of the folder is a store."""
    from dovetail.experts import Store

    print(Store.write_index(folder))


@experts_app.command(epilog="Example: dovetail experts bench french.dvt")
def bench(
    expert: File,
    rounds: Annotated[int, typer.Option(min=1, help="Times to repeat.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the decoder.")] = 1,
    as_json: Json = False,
) -> None:
    """Time reading, checking and decoding an expert on this machine, beside a copy of its uncompressed bytes."""
    from dovetail.cli.expert_timing import measure, print_timings

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
        raise DataError("--weights", found=repr(text), rule="numbers with commas: 1,0.5,0.5") from None
