"""The command compress: a checkpoint of any size, pruned and quantized block by block."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.terminal import Json, LayersFile, Targets, console, find_task, print_json, quiet, resumable

if TYPE_CHECKING:
    from dovetail.tasks.task import Task


def register(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command(
        epilog='Example: dovetail compress models/llama "wanda(0.5) >> gptq(bits=4)" -o small --calibration texts.txt'
    )(compress)


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder in transformers' format, with safetensors.")],
    chain: Annotated[str, typer.Argument(metavar="CHAIN", help='Pruners and quantizers, in quotes: "nf4".')],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="The packed model, in a new or empty folder.")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="DATA",
            help="For links that need activations: a text file with a passage per line, a playground task or a recipe.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Rows to calibrate on.")] = 128,
    length: Annotated[int, typer.Option("--length", min=2, metavar="N", help="Most tokens of a row.")] = 512,
    layers: LayersFile = None,
    targets: Targets = "all-linear",
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Of the weights. \\[default: as stored]")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Draws the rows.")] = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Prune and quantize a checkpoint of any size: its weights stay on disk, and a killed run goes on."""
    quiet()
    from dataclasses import asdict

    from dovetail.checkpoint.stream import compress as compress_model
    from dovetail.display.format import size
    from dovetail.runs.recipe import read_layers

    data: Path | Task | None = None
    if calibration is not None:
        is_text = Path(calibration).is_file() and not calibration.endswith((".yaml", ".yml"))
        data = Path(calibration) if is_text else find_task(calibration)
    with resumable(sys.argv[1:]):
        made = compress_model(
            model, chain, output, calibration=data, samples=samples, max_length=length,
            layers=None if layers is None else read_layers(layers),
            targets=[part.strip() for part in targets.split(",")], dtype=dtype, seed=seed, progress=True,
        )  # fmt: skip
    if as_json:
        print_json({"output": str(output), **asdict(made)})
        return
    shown = console()
    shown.print(f"{made.chain}  on {model}", soft_wrap=True)
    shown.print(f"{size(made.size.nbytes)} on disk, {made.size.bits_per_weight:.2f} bits per weight")
    shown.print(f"{made.merge.sparsity_after:.1%} zeros, {made.merge.off_grid} weights off the grid")
    shown.print(f"wrote [bold]{output}[/bold]; next: dovetail evaluate {output}", soft_wrap=True)
