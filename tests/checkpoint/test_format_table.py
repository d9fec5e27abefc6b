"""The table of docs/formats.md against the decoders of the formats' owners, and the words of GPTQ and MLX."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import format_table
from dovetail.chains.packing import pack
from dovetail.checkpoint.exportable import FORMATS
from dovetail.checkpoint.formats.words import from_words, to_words
from dovetail.links.quantize.affine import AffineWeight
from exported import available
from golden.gptq_words_reference import layer

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("to", sorted({to for to, _ in format_table.COLUMNS}))
def test_the_table_of_the_page_is_what_the_owners_decode(to: str) -> None:
    """Cell by cell, for a half-pruned matrix whose zeros stay zero; the reasons below the table are numbered."""
    available(to)
    written = format_table.written()
    rows = [line.strip("|\n ").split(" | ") for line in written.splitlines() if line.startswith("| `")]
    reasons = [line.partition(". ")[2] for line in written.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == [f"`{row.format('')}`" for row in format_table.ROWS]
    for place, (name, dtype) in enumerate(format_table.COLUMNS, 1):
        if name != to:
            continue
        for text, row in zip(format_table.ROWS, rows, strict=True):
            said, reason = format_table.cell(to, dtype, text)
            expected = f"{said} ({reasons.index(reason) + 1})" if reason else said
            assert row[place] == expected, (text, dtype)


def test_both_versions_of_gptq_hold_the_same() -> None:
    for row in format_table.ROWS:
        assert format_table.cell("gptq", "float16", row) == format_table.cell("gptq_v2", "float16", row)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_are_those_of_gptqmodel(bits: int) -> None:
    golden = json.loads((GOLDEN / "gptq_words.json").read_text(encoding="utf-8"))[str(bits)]
    code_oi, zero_go = layer(bits)
    assert to_words(code_oi, bits).t().tolist() == golden["qweight"]
    assert to_words(zero_go, bits).tolist() == golden["qzeros"]


def test_awq_words_are_those_of_gptqmodel() -> None:
    golden = json.loads((GOLDEN / "gptq_words.json").read_text(encoding="utf-8"))["awq"]
    code_oi, zero_go = layer(4)
    grid = AffineWeight(
        pack(code_oi, 4), {"scale_og": torch.ones(32, 2, dtype=torch.float16)}, pack(zero_go.t().contiguous(), 4),
        shape=(32, 64), block=32, bits=4, identity="int(bits=4, group=32)",
    )  # fmt: skip
    tensors = FORMATS["awq"].encode(grid, torch.float16)
    assert tensors["qweight"].tolist() == golden["qweight"]
    assert tensors["qzeros"].tolist() == golden["qzeros"]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_words_give_their_codes_back(bits: int) -> None:
    code_ri = torch.randint(0, 2**bits, (5, 96), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    words = to_words(code_ri, bits)
    assert words.shape == (5, 3 * bits)
    assert words.dtype == torch.int32
    assert torch.equal(from_words(words, bits), code_ri)
