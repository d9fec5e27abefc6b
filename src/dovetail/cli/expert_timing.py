"""Time to read, check and decode an expert on this machine, compared with a copy of its uncompressed bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dovetail.display.format import size
from dovetail.experts.expert import load, verify


def measure(path: Path, rounds: int = 5, threads: int = 1) -> dict[str, Any]:
    """Return medians of `rounds` interleaved rounds, after one warm-up round.

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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "ms", "GB/s of uncompressed", "of a copy"):
        table.add_column(column, justify="left" if not column else "right")
    copied = found["seconds"]["copy"]
    for name, seconds in found["seconds"].items():
        rate = found["uncompressed_nbytes"] / seconds / 1e9
        table.add_row(said[name], f"{1000 * seconds:.2f}", f"{rate:.2f}", f"{seconds / copied:.2f}")
    console.print(table)
