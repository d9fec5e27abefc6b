"""The command that writes a merged model in the format in which it is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.terminal import Json, console, print_json, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dovetail.checkpoint.export import ExportReport


CLAIMS = {"codes": "same codes and scales", "values": "same values in {}", "logits": "same logits in transformers"}


def register(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command(epilog="Example: dovetail export runs/first --to compressed-tensors --output served")(export)
    app.command(epilog="Example: dovetail verify served --against runs/first")(verify)


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The folder of a run, or of a packed or merged model, or an adapter.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help="compressed-tensors, bitsandbytes, gptq, gptq_v2, awq, mlx, gguf, or peft."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="Folder to write, new or empty; for gguf a file.")
    ],
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="Served dtype. \\[default: the model's]")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", "--for", metavar="ENGINE", help="vllm, transformers, ollama or openvino.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="FILE", help="For gguf: a file of the same model, for what is copied."),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp", metavar="DIR", help="For gguf: a checkout whose converter makes the file for --like."
        ),
    ] = None,
    requantize: Annotated[
        str | None,
        typer.Option("--requantize", metavar="QUANTIZER", help="For layers that do not fit; the error is reported."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check whether all layers fit.")] = False,
    as_json: Json = False,
) -> None:
    """Write a merged model with the same codes and scales in another format, or say why it does not fit.

    `--to peft` writes the adapter of a run that kept it apart (`--for vllm`: as plain LoRA).
    """
    quiet()
    from dataclasses import asdict

    from dovetail.checkpoint.export import export as write
    from dovetail.checkpoint.exportable import ADAPTER
    from dovetail.files import writing
    from dovetail.runs.result import load_result

    source: str | PreTrainedModel = load_result(model)[0] if to == ADAPTER else model
    with writing(output):
        report = write(
            source, to, output, dtype=dtype, engine=engine, like=like, llama_cpp=llama_cpp, requantize=requantize,
            dry_run=dry_run,
        )  # fmt: skip
    if as_json:
        print_json(asdict(report))
    else:
        print(summary(report))


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What dovetail export wrote: a folder, or a GGUF file.")
    ],
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The model that was exported: a run, packed or merged.")
    ],
    requantize: Annotated[
        str | None, typer.Option("--requantize", metavar="QUANTIZER", help="With which a GGUF file was exported.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check an exported folder against its model: codes and scales, values in the served dtype, logits.

    Exit code 1 where a claim fails.
    """
    quiet()
    from dataclasses import asdict

    from dovetail.checkpoint.verify import verify as check
    from dovetail.display.tables import print_table

    report = check(folder, against, requantize=requantize)
    if as_json:
        print_json({**asdict(report), "holds": report.holds})
    else:
        rows = [(CLAIMS[claim.name].format(report.dtype), claim.outcome, claim.detail) for claim in report.claims]
        print_table(console(), ("claim", "result", "found"), rows, words=3)
        print(f"{report.format}, decoded by {report.decoder}")
    if not report.holds:
        raise typer.Exit(1)


def summary(report: ExportReport) -> str:
    """Return the report as text: a line a kind of layer, the claim, and the notes."""
    kinds: dict[tuple[str, str], int] = {}
    for layer in report.layers.values():
        kinds[layer.quantizer, layer.kind] = kinds.get((layer.quantizer, layer.kind), 0) + 1
    lines = [f"{count} layers: {quantizer} -> {kind}" for (quantizer, kind), count in kinds.items()]
    claims = {
        "fits": "all layers fit; nothing was written",
        "values": f"the same values in {report.dtype}",
        "codes": f"the same codes and scales; {report.differing:,} values differ in {report.dtype}",
        "adapter": "the same change of the weights",
    }
    lines += [
        f"{name}: quantized anew, error {x.error:.2%}" for name, x in report.layers.items() if x.error is not None
    ]
    lines.append(f"{report.format}: {claims[report.claim]}")
    if report.claim != "fits":
        lines.append(f"{report.weights:,} weights compared by {report.decoder}; {report.nbytes:,} bytes")
        lines.append(report.output)
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
