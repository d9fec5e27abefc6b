"""The commands of experts: pack, unpack, inspect, and `dovetail experts ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.terminal import Json, console, find_task, print_json, quiet

if TYPE_CHECKING:
    import numpy as np

    from dovetail.experts import TaskVector

experts_app = typer.Typer(
    name="experts", no_args_is_help=True, rich_markup_mode="rich",
    help="Experts: task vectors as signs and a scale, a fiftieth of their size. `dovetail pack` makes one.",
)  # fmt: skip

Base = Annotated[str | None, typer.Option(help="The base model: playground, a folder, package:NAME/FOLDER, a hub id.")]
File = Annotated[Path, typer.Argument(metavar="EXPERT", help="A .dvt file.")]
Files = Annotated[list[Path], typer.Argument(metavar="EXPERT...", help=".dvt files.")]
Density = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of values to keep.")]
Scale = Annotated[str, typer.Option(help='"vector": one scale; "tensor": one for each tensor.')]


def register(app: typer.Typer) -> None:
    """Adds these commands to the program."""
    app.command(epilog="Example: dovetail pack runs/french/adapter --base playground --density 0.05")(pack)
    app.command(epilog="Example: dovetail unpack french.dvt --base playground --output french")(unpack)
    app.command(epilog="Example: dovetail inspect french.dvt")(inspect)
    app.add_typer(experts_app)


def pack(
    source: Annotated[Path, typer.Argument(help="A Dovetail or peft adapter folder, or a fine-tuned checkpoint's.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="[default: SOURCE's name with .dvt]")] = None,
    base: Base = None,
    density: Density = 0.05,
    alpha: Annotated[float | None, typer.Option(help="Scale over standard deviation. [default: 1]")] = None,
    scale: Scale = "vector",
    sweep: Annotated[str | None, typer.Option(help="Choose density and alpha on this task's validation split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Validation records of the sweep. [default: all]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the sweep's plot here, as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Compress an adapter, or a checkpoint's difference to its base, into one expert file."""
    quiet()
    from dovetail import experts
    from dovetail.experts.show import facts

    output = output or source.with_suffix(".dvt")
    vector = experts.task_vector(source, base)
    provenance: dict[str, Any] = {"source": source.name}
    if sweep is not None:
        density, alpha = _sweep(vector, base, sweep, limit, plot, scale)
        provenance["sweep"] = {"task": sweep, "limit": limit}
    elif alpha is None:
        _advise(base, density)
    made = experts.compress(vector, density, 1.0 if alpha is None else alpha, _scale(scale), provenance=provenance)
    made.save(output)
    if as_json:
        print_json({"output": str(output), **facts(made)})
    else:
        said = facts(made)
        times = said["uncompressed_nbytes"] / said["nbytes"]
        print(f"{output}: {said['nbytes']:,} bytes, 1/{times:.3g} of the task vector; density {density:g}, "
              f"alpha {made.alpha:g}")  # fmt: skip


def _scale(text: str) -> Any:
    from dovetail.errors import DataError

    if text not in ("vector", "tensor"):
        raise DataError("--scale", found=text, rule='"vector" or "tensor"')
    return text


def _advise(base: str | None, density: float) -> None:
    """Says whether alpha 1 will do (ComPEFT §4.2)."""
    from dovetail.experts import default_alpha
    from dovetail.load import empty_model

    count = 0 if base is None else sum(p.numel() for p in empty_model(base).parameters())
    if default_alpha(count, density) is None:
        print("alpha 1: good for bases of 13 B parameters and more at densities up to 0.2. For this one a sweep is "
              "advised: --sweep TASK", file=sys.stderr)  # fmt: skip


def _sweep(
    vector: TaskVector, base: str | None, task: str, limit: int | None, plot: Path | None, scale: str
) -> tuple[float, float]:
    from dovetail import experts
    from dovetail.errors import DataError
    from dovetail.experts.unpack import ready
    from dovetail.load import load

    if base is None:
        raise DataError("--sweep", found="no --base", rule="a sweep scores the expert on its base")
    found = find_task(task)
    model, tokenizer = load(base, task_kind=found.kind)
    model = ready(model, vector)
    score = experts.scorer(model, tokenizer, found, limit=limit)
    result = experts.sweep(vector, score, scale=_scale(scale))
    for point in result.points:
        print(f"density {point.density:<5g} alpha {point.alpha:<4g} {point.score:.4f} on {point.records} records"
              f"{', given up' if point.stopped else ''}", file=sys.stderr)  # fmt: skip
    if plot is not None:
        result.plot(plot)
    return result.best.density, result.best.alpha


def unpack(
    expert: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    base: Base = None,
) -> None:
    """Write an expert as what it was made from: an adapter folder or a checkpoint."""
    quiet()
    from dovetail import experts

    print(experts.unpack(experts.load(expert), output, base))


def inspect(
    expert: File,
    rows: Annotated[int, typer.Option(min=0, help="Tensors to show, those with most kept values first.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what an expert holds: a table of its tensors and a histogram of densities."""
    from dovetail import experts
    from dovetail.experts.show import facts, print_expert

    loaded = experts.load(expert)
    if as_json:
        print_json({"file": str(expert), **facts(loaded)})
    else:
        print_expert(console(), expert, loaded, rows)


@experts_app.command("list", epilog="Example: dovetail experts list store/")
def list_experts(
    place: Annotated[str, typer.Argument(metavar="STORE", help="A folder of .dvt files, or an http(s) address.")],
    as_json: Json = False,
) -> None:
    """List the experts of a folder or an HTTP origin."""
    from dovetail.experts.show import listed, print_list

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
    from dovetail.experts.show import matrix_plot, print_matrix, similarities
    from dovetail.run_folder import write_whole

    names = [path.stem for path in files]
    every = similarities(files)
    matrix = _matrix(every, what)
    if plot is not None:
        write_whole(plot, matrix_plot(names, matrix, what))
    if as_json:
        print_json({"names": names, "pairs": [[dict(cell) for cell in row] for row in every]})
    else:
        print_matrix(console(), names, matrix, what)


def _matrix(every: list[list[dict[str, float]]], what: str) -> np.ndarray:
    import numpy as np

    from dovetail.errors import DataError

    if what not in ("cosine", "sign_agreement", "hamming"):
        raise DataError("--what", found=what, rule="cosine, sign_agreement or hamming")
    # Of a distance, the share of values that are the same.
    return np.array(
        [[1 - c["hamming"] / max(c["numel"], 1) if what == "hamming" else c[what] for c in row] for row in every]
    )


@experts_app.command(epilog="Example: dovetail experts merge a.dvt b.dvt --method ties -o both.dvt")
def merge(
    files: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .dvt file, or a folder to unpack into.")],
    method: Annotated[str, typer.Option(help="average, task_arithmetic, ties or dare.")] = "average",
    weights: Annotated[str | None, typer.Option(help="One for each, with commas. [default: 1 each]")] = None,
    keep: Annotated[float | None, typer.Option(help="Of ties and dare: the share of values to keep.")] = None,
    density: Density = 0.2,
    alpha: Annotated[float, typer.Option(help="Of the merged expert.")] = 1.0,
    base: Base = None,
    seed: Annotated[int, typer.Option(help="Of dare's draws.")] = 0,
) -> None:
    """Merge experts into one: an expert again (--density, --alpha), or a folder with the merged values exactly."""
    quiet()
    from dovetail import experts

    chosen = None if weights is None else _numbers(weights)
    loaded = [experts.load(path) for path in files]
    merged = experts.merge(loaded, method, weights=chosen, density=keep, seed=seed)
    _write(merged, output, density, alpha, base, {"merged": [path.name for path in files], "method": method})


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
    alpha: Annotated[float, typer.Option(help="Of the composed expert.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    as_json: Json = False,
) -> None:
    """Weigh experts for a new task by a few examples, without gradients (LoraHub)."""
    quiet()
    from dovetail import experts
    from dovetail.experts.unpack import ready
    from dovetail.load import load

    found = find_task(task)
    loaded = [experts.load(path) for path in files]
    model, tokenizer = load(base, task_kind=found.kind)
    model = ready(model, loaded[0])
    made = experts.compose(loaded, model, tokenizer, found, limit=examples, budget=budget, seed=seed)
    named = {path.stem: round(weight, 4) for path, weight in zip(files, made.weights, strict=True)}
    _write(made.task_vector, output, density, alpha, base, {"composed": named})
    if as_json:
        print_json({"weights": named, "loss": made.loss})
    else:
        print(f"loss {made.loss:.4f}: " + ", ".join(f"{name} {weight:+.2f}" for name, weight in named.items()))


def _write(
    vector: TaskVector, output: Path, density: float, alpha: float, base: str | None, provenance: dict[str, Any]
) -> None:
    from dovetail import experts

    if output.suffix == ".dvt":
        print(experts.compress(vector, density, alpha, provenance=provenance).save(output))
    else:
        print(experts.unpack(vector, output, base))


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
            print(error, file=sys.stderr)
            wrong += 1
    if wrong:
        raise typer.Exit(2)


@experts_app.command(epilog="Example: dovetail experts bench french.dvt")
def bench(
    expert: File,
    rounds: Annotated[int, typer.Option(min=1, help="Times to repeat.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the decoder.")] = 1,
    as_json: Json = False,
) -> None:
    """Time reading, checking and decoding an expert on this machine, beside a copy of its uncompressed bytes."""
    from dovetail.experts.timing import measure, print_timings

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
        raise DataError("--weights", found=text, rule="numbers with commas: 1,0.5,0.5") from None
