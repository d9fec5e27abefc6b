"""The commands that make, unpack and show one expert: pack, unpack, inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dovetail.cli.terminal import Json, console, find_task, print_json, quiet

if TYPE_CHECKING:
    from dovetail.experts import Sweep, TaskVector

Base = Annotated[str | None, typer.Option(help="The base model: playground, a folder, package:NAME/FOLDER, a hub id.")]
File = Annotated[Path, typer.Argument(metavar="EXPERT", help="A .dvt file.")]
Density = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of values to keep.")]
Scale = Annotated[str, typer.Option(help='"vector": one scale; "tensor": one for each tensor.')]


def register(app: typer.Typer) -> None:
    """Adds these commands to the program."""
    app.command(epilog="Example: dovetail pack runs/french/adapter --base playground --density 0.05")(pack)
    app.command(epilog="Example: dovetail unpack french.dvt --base playground --output french")(unpack)
    app.command(epilog="Example: dovetail inspect french.dvt")(inspect)


def pack(
    source: Annotated[Path, typer.Argument(help="A Dovetail or peft adapter folder, or a fine-tuned checkpoint's.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="\\[default: SOURCE.dvt, beside it]")] = None,
    base: Base = None,
    density: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share to keep. \\[default: 0.05]")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale over standard deviation. \\[default: 1]")] = None,
    scale: Scale = "vector",
    sweep: Annotated[str | None, typer.Option(help="Choose what isn't given by this task's validation.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Validation records of the sweep. \\[default: all]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the sweep's plot here, as PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Compress an adapter, or a checkpoint's difference to its base, into one expert file."""
    from dovetail.errors import DataError
    from dovetail.files import check_file

    whole = source.absolute()
    output = output or whole.parent / f"{whole.name}.dvt"
    for path in (output, plot):
        if path is not None:
            check_file(path)
    kind = _scale(scale)
    if sweep is None and (plot is not None or limit is not None):
        raise DataError("--plot" if limit is None else "--limit", found="no --sweep", rule="it is of a sweep")
    if sweep is not None and base is None:
        raise DataError("--sweep", found="no --base", rule="a sweep scores the expert on its base", fix="--base MODEL")
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
        raise DataError("--scale", found=text, rule='"vector" or "tensor"')
    return text


def _advise(base: str | None, density: float) -> None:
    """Says whether alpha 1 will do (ComPEFT §4.2)."""
    from dovetail.checkpoint.load import empty_model, load_config
    from dovetail.experts import default_alpha

    count = 0 if base is None else sum(p.numel() for p in empty_model(load_config(base)).parameters())
    if default_alpha(count, density) is None:
        print("alpha 1: good for bases of 13 B parameters and more at densities up to 0.2. For this one a sweep is "
              "advised: --sweep TASK", file=sys.stderr)  # fmt: skip


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
        load_adapter(model, source)  # with what an expert doesn't hold: masks and bases that were fitted to data
    else:
        model = ready(model, vector)
    score = experts.scorer(model, tokenizer, found, limit=limit)
    result = experts.sweep(
        vector, score, densities=DENSITIES if density is None else [density],
        alphas=ALPHAS if alpha is None else [alpha], scale=scale,
    )  # fmt: skip
    for point in result.points:
        print(f"density {point.density:<5g} alpha {point.alpha:<4g} {point.score:.4f} on {point.records} records"
              f"{', given up' if point.stopped else ''}", file=sys.stderr)  # fmt: skip
    return result


def unpack(
    expert: File,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, new or empty.")],
    base: Base = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter of the same chain, for masks and bases that were fitted to data.")
    ] = None,
) -> None:
    """Write an expert as what it was made from: an adapter folder or a checkpoint."""
    from dovetail.errors import DataError
    from dovetail.files import check_folder, writing

    check_folder(output)
    if adapter is not None and base is None:
        raise DataError("--adapter", found="no --base", rule="an adapter is loaded onto its base", fix="--base MODEL")
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
    rows: Annotated[int, typer.Option(min=0, help="Tensors to show, those with most kept values first.")] = 20,
    as_json: Json = False,
) -> None:
    """Show what an expert holds: a table of its tensors and a histogram of densities."""
    from dovetail import experts
    from dovetail.cli.expert_tables import facts, print_expert

    loaded = experts.load(expert)
    if as_json:
        print_json({"file": str(expert), **facts(loaded)})
    else:
        print_expert(console(), expert, loaded, rows)
