"""Output of the expert commands: facts, timings and similarities, for JSON, for the terminal and as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.text import Text

from dovetail.display.format import size
from dovetail.display.style import INK
from dovetail.display.tables import print_table
from dovetail.errors import LoadError
from dovetail.experts.codec.codec import counts_of
from dovetail.experts.expert import Expert, load, similarity, verify
from dovetail.experts.file import read_header
from dovetail.experts.store.backends import LocalFolder

_MODES = {0: "empty", 1: "Rice", 2: "Rice/4096", 3: "full"}
_BARS = 40


def entropy(density: float) -> float:
    """Return the bits per value of independent ternary values with equally likely signs (ComPEFT §2.2)."""
    if density <= 0:
        return 0.0
    rest = 0.0 if density >= 1 else -(1 - density) * math.log2(1 - density)
    return rest - density * math.log2(density / 2)


def check_expert(path: Path) -> None:
    """Raise LoadError for a folder, with the command for its content."""
    if not path.is_dir():
        return
    found, fix = "a folder", "pass a .dvt file"
    for name, kind, way in (
        ("packed.safetensors", "the folder of a packed model", "load it with dovetail.load"),
        ("adapter.json", "the folder of a Dovetail adapter", f"make an expert of it with `dovetail pack {path}`"),
        ("adapter_config.json", "the folder of a peft adapter", f"make an expert of it with `dovetail pack {path}`"),
        ("config.json", "the folder of a model", f"make an expert of it with `dovetail pack {path} --base MODEL`"),
    ):
        if (path / name).is_file():
            found, fix = kind, way
            break
    raise LoadError(str(path), found=f"not an expert but {found}", rule="an expert must be a .dvt file", fix=fix)


def facts(expert: Expert) -> dict[str, Any]:
    """Return the facts that `inspect` shows, for JSON."""
    tensors = []
    for name, coded in expert.coded.items():
        modes = sorted({_MODES[int(mode)] for mode in coded.directory["mode"] & 15})
        tensors.append({
            "name": name, "shape": list(coded.shape), "dtype": str(expert.dtypes[name]).removeprefix("torch."),
            "kept": coded.kept, "bits": 8 * coded.nbytes / coded.numel if coded.numel else 0.0,
            "scale": expert.scales[name], "order": coded.order, "modes": modes,
        })  # fmt: skip
    plain = sum(expert.dtypes[name].itemsize * coded.numel for name, coded in expert.coded.items())
    share = expert.kept / expert.numel if expert.numel else 0.0
    return {
        "values": expert.numel, "kept": expert.kept, "share": share, "nbytes": expert.nbytes,
        "bits": 8 * expert.nbytes / expert.numel if expert.numel else 0.0, "entropy_bits": entropy(share),
        "uncompressed_nbytes": plain, "initial": expert.origin.initial, "base": expert.origin.base,
        "chain": expert.origin.chain, "peft_type": (expert.origin.peft or {}).get("peft_type"),
        "density": expert.density, "alpha": expert.alpha, "scale": expert.header.scale,
        "provenance": expert.header.provenance, "tensors": tensors, "histogram": histogram(expert),
    }  # fmt: skip


def histogram(expert: Expert, bins: int = 10) -> dict[str, list[float]]:
    """Return a histogram of the blocks' densities: `edges`, and `values` in the blocks between them."""
    shares, weights = [], []
    for coded in expert.coded.values():
        sizes = np.full(len(coded.directory), 1 << 16)
        if len(sizes) and coded.numel % (1 << 16):
            sizes[-1] = coded.numel % (1 << 16)
        shares.extend(counts_of(coded.directory) / sizes)
        weights.extend(sizes)
    top = min(1.0, max(shares, default=0.0)) or 1.0
    counts, edges = np.histogram(shares, bins=bins, range=(0.0, top), weights=weights or None)
    return {"edges": [float(edge) for edge in edges], "values": [int(count) for count in counts]}


def print_expert(console: Console, path: Path, expert: Expert, rows: int) -> None:
    """Print the facts, a table of the `rows` tensors with most kept values, and the histogram."""
    said = facts(expert)
    times = said["uncompressed_nbytes"] / said["nbytes"]
    of = said["chain"] or (f"peft {said['peft_type']}" if said["peft_type"] else f"initial {said['initial']}")
    for line in (
        f"[bold]{escape(path.name)}[/bold]: {len(said['tensors'])} tensors, "
        f"{said['kept']:,} of {said['values']:,} values kept ({100 * said['share']:.3g} %)",
        f"{size(said['nbytes'])}, 1/{times:.3g} of {size(said['uncompressed_nbytes'])} uncompressed; "
        f"{said['bits']:.3f} bits per value (entropy {said['entropy_bits']:.3f})",
        f"origin {escape(str(of))}, for base {said['base'] or 'unknown'}",
        f"alpha {said['alpha']:g}, density {said['density']:g}, "
        f"{'one scale per tensor' if said['scale'] == 'tensor' else 'one scale for all'}\n",
    ):
        console.print(line, soft_wrap=True)
    order = sorted(said["tensors"], key=lambda tensor: -tensor["kept"])
    cells = []
    for tensor in order[:rows]:
        numel = math.prod(tensor["shape"])
        coded = ", ".join(tensor["modes"]) + (", columns" if tensor["order"] == "columns" else "")
        share = f"{100 * tensor['kept'] / numel:.2f}" if numel else ""
        cells.append((
            tensor["name"], coded, "x".join(map(str, tensor["shape"])), f"{tensor['kept']:,}", share,
            f"{tensor['bits']:.3f}", f"{tensor['scale']:.3g}",
        ))  # fmt: skip
    print_table(console, ("tensor", "coded", "shape", "kept", "%", "bits", "scale"), cells, words=2)
    if len(order) > rows:
        console.print(f"and {len(order) - rows} more (--rows)\n")
    drawn = said["histogram"]
    console.print("values by the density of their block (of up to 65,536 values)")
    most = max(drawn["values"]) or 1
    for low, high, count in zip(drawn["edges"], drawn["edges"][1:], drawn["values"], strict=False):
        bar = "█" * round(_BARS * count / most) or ("▏" if count else "")
        console.print(f"{100 * low:6.2f} - {100 * high:6.2f} %  {bar} {count:,}")


def listed(place: str) -> list[dict[str, Any]]:
    """Return the experts of a folder, from their headers, or of an HTTP server, from its index."""
    if "://" in place:
        from dovetail.experts.store.http import HttpFolder  # imports httpx

        web = HttpFolder(place, timeout=30.0, max_nbytes=1, retries=2)  # reads only the index
        return [{"name": name, "nbytes": web.stamp(name)[0], "values": None, "kept": None, "of": "", "base": None}
                for name in web.names()]  # fmt: skip
    rows = []
    folder = LocalFolder(Path(place))
    for path in (folder.path / f"{name}.dvt" for name in folder.names()):
        row: dict[str, Any] = {"name": path.stem, "nbytes": path.stat().st_size}
        try:
            header, kept = read_header(path)
        except LoadError as error:  # a damaged file must not hide others
            rows.append(row | {"values": None, "kept": None, "of": f"damaged: {error.found}"[:200], "base": None})
            continue
        of = header.chain or (f"peft {header.peft.get('peft_type')}" if header.peft else header.initial)
        values = sum(math.prod(entry.shape) for entry in header.tensors)
        rows.append(row | {"values": values, "kept": sum(kept), "of": of, "base": header.base})
    if not rows:
        rule, fix = "the folder must contain experts", "make one with `dovetail pack`"
        raise LoadError(place, found="no .dvt file", rule=rule, fix=fix)
    return rows


def similarities(files: Sequence[Path]) -> list[list[dict[str, float]]]:
    """Return the `similarity` of each pair of experts."""
    masks = [load(path).masks() for path in files]
    found: list[list[dict[str, float]]] = [[{} for _ in masks] for _ in masks]
    for row, one in enumerate(masks):
        for column in range(row, len(masks)):
            found[row][column] = found[column][row] = similarity(one, masks[column])
    return found


def print_list(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of experts."""
    cells = []
    for row in rows:
        share = "" if not row["values"] else f"{100 * row['kept'] / row['values']:.3g}"
        values = "" if row["values"] is None else f"{row['values']:,}"
        cells.append((row["name"], row["of"], (row["base"] or "")[:19], size(row["nbytes"]), values, share))
    print_table(console, ("expert", "origin", "base", "size", "values", "kept %"), cells, words=3)


def print_matrix(console: Console, names: Sequence[str], matrix: np.ndarray, what: str) -> None:
    """Print a symmetric matrix with shaded cells."""
    console.print(what)
    rows = [
        (f"{number} {name}", *(_cell(float(value)) for value in matrix[number - 1]))
        for number, name in enumerate(names, 1)
    ]
    print_table(console, ("", *(str(number) for number in range(1, len(names) + 1))), rows)


def _cell(value: float) -> Text:
    strength = min(abs(value), 1.0)
    there = (47, 111, 98) if value >= 0 else (180, 86, 47)
    red, green, blue = (round(255 - strength * (255 - part)) for part in there)
    ink = "#ffffff" if strength > 0.5 else INK
    return Text(f" {value:.2f} ", style=Style(color=ink, bgcolor=f"#{red:02x}{green:02x}{blue:02x}"))


def matrix_plot(names: Sequence[str], matrix: np.ndarray, what: str) -> bytes:
    """Draw the matrix as PNG."""
    from dovetail.display.plots import empty, png  # imports matplotlib

    side = 2.6 + 0.55 * len(names)
    drawing, axes = empty(side + 0.8, side)
    shown = axes.imshow(matrix, cmap="BrBG", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), list(names), rotation=40, ha="right", color=INK, fontsize=8)
    axes.set_yticks(range(len(names)), list(names), color=INK, fontsize=8)
    if len(names) <= 24:
        for row in range(len(names)):
            for column in range(len(names)):
                value = matrix[row, column]
                ink = "white" if abs(value) > 0.6 else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
    axes.set_title(what, color=INK, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    drawing.colorbar(shown, shrink=0.8).outline.set_visible(False)  # type: ignore[operator]
    return png(drawing)


def measure(path: Path, rounds: int = 5, threads: int = 1) -> dict[str, Any]:
    """Time the parts of decoding an expert, and return medians of `rounds` interleaved rounds after a warm-up round.

    returns  `uncompressed_nbytes`, `nbytes`, and the `seconds` to copy the uncompressed bytes in memory ("copy"), to
             read the file ("load"), to check it ("verify"), to decode it into reused tensors ("dense") and to two bits
             per value ("masks")
    """
    expert = load(path)
    out = {name: torch.zeros(shape, dtype=expert.dtypes[name]) for name, shape in expert.shapes.items()}
    copies = {name: tensor.clone() for name, tensor in out.items()}

    def copy() -> None:
        for name, tensor in out.items():
            tensor.copy_(copies[name])

    parts: dict[str, Callable[[], object]] = {
        "copy": copy,
        "load": lambda: load(path),
        "verify": lambda: verify(expert, threads=threads),
        "dense": lambda: expert.dense(into=out, threads=threads),
        "masks": lambda: expert.masks(threads=threads),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number in range(rounds + 1):
            for name, part in parts.items():
                started = perf_counter()
                part()
                if number:
                    times[name].append(perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return {
        "nbytes": expert.nbytes,
        "uncompressed_nbytes": sum(tensor.nbytes for tensor in out.values()),
        "threads": threads,
        "seconds": {name: median(values) for name, values in times.items()},
    }


def print_timings(console: Console, found: dict[str, Any]) -> None:
    """Print a table of the result of `measure`."""
    said = {
        "copy": "copy the uncompressed bytes in memory",
        "load": "read the file",
        "verify": "check every block",
        "dense": "decode into reused tensors, with checks",
        "masks": "decode to two bits per value, with checks",
    }
    threads = f"{found['threads']} thread" + ("s" if found["threads"] > 1 else "")
    console.print(f"{size(found['nbytes'])}, uncompressed {size(found['uncompressed_nbytes'])}; {threads}")
    copied = found["seconds"]["copy"]
    rows = []
    for name, seconds in found["seconds"].items():
        rate = found["uncompressed_nbytes"] / seconds / 1e9
        rows.append((said[name], f"{1000 * seconds:.2f}", f"{rate:.2f}", f"{seconds / copied:.2f}"))
    print_table(console, ("", "ms", "GB/s of uncompressed", "of a copy"), rows)
