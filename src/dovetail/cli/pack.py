"""The commands for one task expert: pack, unpack, inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.terminal import Json, console, find_task, print_json, quiet

if TYPE_CHECKING:
    from dovetail.experts import Sweep, TaskVector

Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="The base model: playground, a folder, FILE.gguf, package:NAME/FOLDER or a hub id.",
    ),
]
File = Annotated[Path, typer.Argument(metavar="EXPERT", help="A .dvt file.")]
Density = Annotated[
    float, typer.Option("--density", metavar="SHARE", min=0.0, max=1.0, help="Share of values to keep.")
]
Scale = Annotated[str, typer.Option("--scale", metavar="KIND", help="vector: one scale; tensor: one scale per tensor.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the program."""
    app.command(epilog="Example: dovetail pack runs/french/adapter --base playground --density 0.05")(pack)
    app.command(epilog="Example: dovetail unpack french.dvt --base playground --output french")(unpack)
    app.command(epilog="Example: dovetail inspect french.dvt")(inspect)


def pack(
    source: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A Dovetail adapter, a peft adapter or a fine-tuned checkpoint.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write. \\[default: FOLDER.dvt]")
    ] = None,
    base: Base = None,
    density: Annotated[
        float | None,
        typer.Option("--density", metavar="SHARE", min=0.0, max=1.0, help="Share of values to keep. \\[default: 0.05]"),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", metavar="NUMBER", help="Scale / standard deviation. \\[default: 1]")
    ] = None,
    scale: Scale = "vector",
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="TASK", help="Choose density and alpha, unless given, by validation on this task."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="Validation records of the sweep. \\[default: all]"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write the plot of the sweep to this PNG file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress an adapter, or the difference of a checkpoint to its base, into one expert file."""
    from dovetail.errors import DataError
    from dovetail.files import check_file

    whole = source.absolute()
    output = output or whole.parent / f"{whole.name}.dvt"
    for path in (output, plot):
        if path is not None:
            check_file(path)
    kind = _scale(scale)
    if sweep is None and (plot is not None or limit is not None):
        raise DataError(
            "--plot" if limit is None else "--limit",
            found="no --sweep",
            rule="the option needs a sweep",
            fix="pass --sweep TASK",
        )
    if sweep is not None and base is None:
        raise DataError("--sweep", found="no --base", rule="a sweep needs the base model", fix="pass --base MODEL")
    quiet()
    from dovetail import experts
    from dovetail.cli.expert_tables import facts

    vector = experts.task_vector(source, base)
    provenance: dict[str, Any] = {"source": whole.name}
    if sweep is not None and base is not None:
        result = _sweep(source, vector, base, sweep, limit, density, alpha, kind)
        if plot is not None:
            result.plot(plot)
        density, alpha = result.best.density, result.best.alpha
        provenance["sweep"] = {"task": sweep, "limit": limit}
    density = 0.05 if density is None else density
    if alpha is None:
        _advise(base, density)
    made = experts.compress(vector, density, 1.0 if alpha is None else alpha, kind, provenance=provenance)
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
        raise DataError("--scale", found=text, rule="scale must be vector or tensor", fix="pass --scale vector")
    return text


def _advise(base: str | None, density: float) -> None:
    """Advise a sweep on standard error, unless alpha 1 suffices (ComPEFT §4.2)."""
    from dovetail.checkpoint.config import empty_model, load_config
    from dovetail.experts import default_alpha

    count = 0 if base is None else sum(p.numel() for p in empty_model(load_config(base)).parameters())
    if default_alpha(count, density) is None:
        print("alpha 1 suffices for bases of 13 B parameters and more at densities up to 0.2. For this base, a sweep "
              "is advised: pass --sweep TASK", file=sys.stderr)  # fmt: skip


def _sweep(
    source: Path,
    vector: TaskVector,
    base: str,
    task: str,
    limit: int | None,
    density: float | None,
    alpha: float | None,
    scale: Any,
) -> Sweep:
    from dovetail import experts
    from dovetail.checkpoint.adapter import load_adapter
    from dovetail.experts.sources import base_of
    from dovetail.experts.sweeping import ALPHAS, DENSITIES
    from dovetail.experts.unpacking import ready

    found = find_task(task)
    model, tokenizer = base_of(vector, base)
    if (source / "adapter.json").is_file():
        load_adapter(model, source)  # with masks and fitted bases, which an expert does not hold
    else:
        model = ready(model, vector)
    score = experts.scorer(model, tokenizer, found, limit=limit)
    result = experts.sweep(
        vector, score, densities=DENSITIES if density is None else [density],
        alphas=ALPHAS if alpha is None else [alpha], scale=scale,
    )  # fmt: skip
    for point in result.points:
        print(f"density {point.density:<5g} alpha {point.alpha:<4g} {point.score:.4f} on {point.records} records"
              f"{', stopped early' if point.stopped else ''}", file=sys.stderr)  # fmt: skip
    return result


def unpack(
    expert: File,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write, new or empty.")],
    base: Base = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", metavar="FOLDER", help="An adapter of the same chain, for masks and bases fitted to data."
        ),
    ] = None,
) -> None:
    """Convert an expert back to its source format: an adapter folder or a checkpoint."""
    from dovetail.errors import DataError
    from dovetail.files import check_folder, writing

    check_folder(output)
    if adapter is not None and base is None:
        raise DataError("--adapter", found="no --base", rule="an adapter needs its base model", fix="pass --base MODEL")
    quiet()
    from dovetail import experts
    from dovetail.checkpoint.adapter import load_adapter
    from dovetail.experts.sources import base_of

    loaded = experts.load(expert)
    model = base
    if adapter is not None and base is not None:
        model = load_adapter(base_of(loaded, base)[0], adapter)
    with writing(output):
        print(experts.unpack(loaded, output, model))


def inspect(
    expert: File,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, help="Tensors to show, sorted by kept values.")
    ] = 20,
    as_json: Json = False,
) -> None:
    """Show an expert: a table of its tensors and a histogram of densities."""
    from dovetail import experts
    from dovetail.cli.expert_tables import check_expert, facts, print_expert

    check_expert(expert)
    loaded = experts.load(expert)
    if as_json:
        print_json({"file": str(expert), **facts(loaded)})
    else:
        print_expert(console(), expert, loaded, rows)
