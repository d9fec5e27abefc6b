"""The table of docs/formats.md: what each format holds of each quantizer, found by decoding with the format's owner.

`python tests/format_table.py` writes it; `tests/checkpoint/test_format_table.py` compares it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import dovetail
from calibrated import gram_of
from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.checkpoint.export_tensors import proved
from dovetail.checkpoint.exportable import FORMATS
from dovetail.errors import ExportError
from dovetail.models.dtypes import FLOATS
from places import ROOT

PAGE = ROOT / "docs/formats.md"
BEGIN, END = "<!-- format table: tests/format_table.py -->\n", "<!-- end of the format table -->\n"

COLUMNS = (
    ("compressed-tensors", "bfloat16"),
    ("bitsandbytes", "bfloat16"),
    ("gptq", "float16"),
    ("gptq", "bfloat16"),
    ("awq", "float16"),
    ("mlx", "float16"),
    ("mlx", "float32"),
    ("gguf", "float32"),
)
"""Format and the dtype in which values are compared."""

ROWS = (
    "int(bits=2, group=32{})",
    "int(bits=2, group=32, symmetric=true{})",
    "int(bits=3, group=32{})",
    "int(bits=3, group=32, symmetric=signed{})",
    "int(bits=4, group=32{})",
    "int(bits=4, group=32, symmetric=true{})",
    "int(bits=4, group=64, symmetric=signed{})",
    "int(bits=4, group=0, symmetric=signed{})",
    "int(bits=8, group=32{})",
    "int(bits=8, group=32, symmetric=signed{})",
    "int(bits=8, group=0, symmetric=true{})",
    "gptq(bits=4, group=32, symmetric=signed{})",
    "hqq(bits=4, group=32, zero=exact)",
    "hqq(bits=4, group=32)",
    "hqq(bits=1, group=32)",
    "fp8",
    'fp8(scale="tensor")',
    "nf4",
    "nf4(double=true)",
    "fp4",
    "nf(bits=3)",
    "mxfp4",
    "nvfp4",
)
"""Quantizers; {} is the place of scale_bits."""


@cache
def weight() -> Tensor:
    """A matrix (64, 256) of which half is pruned."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    return values.masked_fill(values.abs() < 0.67, 0.0)


@cache
def quantized(text: str) -> QuantizedWeight:
    (link,) = dovetail.chain(text).links
    assert isinstance(link, Quantizer)
    inputs = torch.randn(400, 256, generator=torch.Generator().manual_seed(6))
    return link.quantize(weight(), gram_of(inputs) if text.startswith("gptq") else None)


def cell(to: str, dtype: str, row: str) -> tuple[str, str]:
    """Return what the table says of a format and a quantizer, and the reason for a refusal or nothing."""
    form, served = FORMATS[to], FLOATS[dtype]
    found, reason = "refused", ""
    for bits in (None, 7, 4) if "{}" in row else (None,):
        one = quantized(row.format("" if bits is None else f", scale_bits={bits}"))
        try:
            form.kind("layer", one)
            tensors, differing = proved(form, "layer", one, served)
        except ExportError as error:
            reason = reason or error.rule
            continue
        _check_zeros(form.decode(tensors, one, served), one)
        if not differing:
            return "values" if bits is None else f"values with `scale_bits={bits}`", ""
        found = "codes"
    return found, reason if found == "refused" else ""


def _check_zeros(values: Tensor, one: QuantizedWeight) -> None:
    if one.zero_codes(0, 1) is not None:
        assert not values[weight() == 0].any()


def line(row: str, reasons: list[str]) -> str:
    """Return a line of the table; reasons that are new are added to the list, which numbers them."""
    cells = []
    for to, dtype in COLUMNS:
        said, reason = cell(to, dtype, row)
        if reason and reason not in reasons:
            reasons.append(reason)
        cells.append(f"{said} ({reasons.index(reason) + 1})" if reason else said)
    return f"| `{row.format('')}` | " + " | ".join(cells) + " |"


def table() -> str:
    reasons: list[str] = []
    heads = " | ".join(f"`{to}`, {dtype}" for to, dtype in COLUMNS)
    lines = [f"| quantizer | {heads} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [line(row, reasons) for row in ROWS]
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]) + "\n"


def written() -> str:
    """Return the table that the page has."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8", newline="\n")
