"""The formats of GGUF files as grids: the values of the gguf package, bytes that survive, nearest codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.errors import DovetailError, LoadError
from dovetail.links.quantize import accelerate
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockFormat, BlockWeight

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

torch.set_num_threads(1)
ROWS, COLUMNS = 12, 512
each_format = pytest.mark.parametrize("form", BLOCK_FORMATS.values(), ids=BLOCK_FORMATS)
HOLD_ZERO = {"Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "MXFP4"}
"""Formats that represent zero exactly, written down a second time."""


def random_bytes(form: BlockFormat, seed: int = 0, rows: int = ROWS) -> Tensor:
    """Blocks of random bytes whose float16 scales are finite; some are zero, negative or subnormal."""
    numbers = np.random.default_rng(seed)
    blocks = numbers.integers(0, 256, (rows * COLUMNS // form.block, form.nbytes), dtype=np.uint8)
    for at in scale_places(form):
        scale = blocks[:, at : at + 2].copy().view(np.float16)
        scale[~np.isfinite(scale)] = 1.5
        scale[::7] = 0
        scale[1::7] = -np.abs(scale[1::7])
        scale[2::7] = 6e-8
        blocks[:, at : at + 2] = scale.view(np.uint8)
    if form.name == "MXFP4":
        blocks[:, 0] = numbers.integers(0, 250, len(blocks))
    return torch.from_numpy(blocks)


def scale_places(form: BlockFormat) -> tuple[int, ...]:
    """Where a block's float16 numbers lie, by the layout of ggml."""
    at = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}
    return at.get(form.name, (0, 2) if form.name in ("Q4_K", "Q5_K") else (0,))


def weight(form: BlockFormat, seed: int = 0) -> BlockWeight:
    return BlockWeight.from_bytes(
        "weight", random_bytes(form, seed), (ROWS, COLUMNS), form, f"keep(format={form.name})"
    )


def ordinary(form: BlockFormat) -> BlockWeight:
    """A weight whose scales are of ordinary size, as in a model."""
    blocks = random_bytes(form, 3)
    for at in scale_places(form):
        scale = np.random.default_rng(4).uniform(0.001, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = torch.from_numpy(scale.view(np.uint8))
    if form.name == "MXFP4":
        blocks[:, 0] = 120
    return BlockWeight.from_bytes("weight", blocks, (ROWS, COLUMNS), form, "keep")


def values(one: BlockWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return one.dequantize(torch.full(one.shape, torch.nan, dtype=dtype))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


@each_format
def test_values_are_those_of_the_gguf_package(form: BlockFormat) -> None:
    kind = gguf.GGMLQuantizationType[form.name]
    assert (form.number, gguf.GGML_QUANT_SIZES[kind]) == (kind.value, (form.block, form.nbytes))
    for seed in range(3):
        blocks = random_bytes(form, seed)
        expected = gguf.dequantize(blocks.numpy().reshape(ROWS, -1), kind)
        assert torch.equal(bits(values(weight(form, seed))), bits(torch.from_numpy(expected)))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(values(weight(form), dtype), values(weight(form)).to(dtype))


@each_format
def test_bytes_survive(form: BlockFormat) -> None:
    blocks = random_bytes(form)
    one = weight(form)
    assert one.nbytes == blocks.nbytes == ROWS * COLUMNS // form.block * form.nbytes
    assert torch.equal(one.block_bytes(), blocks.view(ROWS, -1))
    assert torch.equal(one.block_bytes(slice(2, 5)), blocks.view(ROWS, -1)[2:5])
    assert torch.equal(one.rows(2, 5).block_bytes(), blocks.view(ROWS, -1)[2:5])
    codes, _ = one.codes_of(0, ROWS)
    assert int(codes.max()) == 2**form.bits - 1
    assert torch.equal(one.with_codes(codes).block_bytes(), blocks.view(ROWS, -1))
    other = torch.randint(0, 2**form.bits, (ROWS, COLUMNS), dtype=torch.uint8)
    again, _ = one.with_codes(other).codes_of(0, ROWS)
    assert torch.equal(again, other)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(one.encode(values(one, dtype)).block_bytes(), one.block_bytes())
    empty = BlockWeight.empty((ROWS, COLUMNS), form, one.identity)
    empty.load_state_dict(one.state_dict())
    assert torch.equal(empty.block_bytes(), one.block_bytes())


@each_format
def test_snap_finds_the_nearest_value(form: BlockFormat) -> None:
    one = ordinary(form)
    other = values(one) + 0.01 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    snapped = one.snap_(other.clone(), 0)
    assert torch.equal(snapped, values(one.encode(other)))
    assert torch.equal(one.snap_(snapped.clone(), 0), snapped)
    assert torch.equal(one.snap_(values(one), 0), values(one))
    assert one.off_grid(snapped) == 0
    every = torch.stack(
        [values(one.with_codes(torch.full(one.shape, code, dtype=torch.uint8))) for code in range(2**form.bits)]
    )
    best = (every - other).abs().amin(0)
    assert ((snapped - other).abs() <= best * (1 + 1e-4) + 1e-9).all()
    low, high = every.amin(0), every.amax(0)
    inside = one.inside(other, 0)
    scaled = (other > low) & (other < high)
    assert inside[scaled].all() or (every.amax(0) == every.amin(0))[scaled & ~inside].all()
    span = (high - low) / (2**form.bits - 1)
    assert not inside[(other > high + 4 * span) | (other < low - 4 * span)].any()
    nan = one.snap_(torch.full((ROWS, COLUMNS), torch.nan), 0)
    assert nan.isnan().all()


@each_format
def test_any_scale_gives_values_that_stay(form: BlockFormat) -> None:
    """Zero, negative, subnormal and huge scales: snapping a value of the grid gives it again."""
    one = weight(form)
    dense = values(one)
    assert torch.equal(one.snap_(dense.clone(), 0), dense)
    assert one.off_grid(dense) == 0
    dead = one.block_bytes()
    scale, _ = form.scales(one.scales)
    rows = (scale == 0).reshape(ROWS, -1).repeat_interleave(form.group, dim=1)
    if form.name != "MXFP4":
        assert rows.any()
    assert not one.inside(dense, 0)[rows].any()
    assert torch.equal(one.encode(dense).block_bytes(), dead)


@each_format
def test_compiled_loops_give_the_same_bits(form: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (weight(form), ordinary(form)):
        other = values(one) * 1.1 + 0.004
        inside = torch.empty(one.shape, dtype=torch.bool)
        plain = one.snap_(other.clone(), 0, inside)
        monkeypatch.setattr(accelerate, "SMALLEST_FOR_LOOPS", 1)
        again = torch.empty(one.shape, dtype=torch.bool)
        assert torch.equal(one.snap_(other.clone(), 0, again), plain)
        assert torch.equal(again, inside)
        monkeypatch.undo()


@each_format
def test_which_hold_zero(form: BlockFormat) -> None:
    one = ordinary(form)
    assert (one.zero_codes(0, 1) is not None) == form.has_zero == (form.name in HOLD_ZERO)
    keep = torch.rand(one.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    if form.has_zero:
        pruned = values(one.with_zeros(keep))
        assert (pruned[~keep] == 0).all()
        assert torch.equal(pruned[keep], values(one)[keep])
    else:
        with pytest.raises(DovetailError, match="without an exact zero"):
            one.with_zeros(keep)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused(bad: float) -> None:
    for form in BLOCK_FORMATS.values():
        for at in scale_places(form):
            blocks = random_bytes(form)
            blocks[3, at : at + 2] = torch.from_numpy(np.array([bad], np.float16).view(np.uint8))
            with pytest.raises(LoadError, match=f"(?s)blk.0.*{form.name} whose scales are NaN"):
                BlockWeight.from_bytes("blk.0", blocks, (ROWS, COLUMNS), form, "keep")
    blocks = random_bytes(BLOCK_FORMATS["MXFP4"])
    blocks[0, 0] = 255
    with pytest.raises(LoadError, match="MXFP4"):
        BlockWeight.from_bytes("blk.0", blocks, (ROWS, COLUMNS), BLOCK_FORMATS["MXFP4"], "keep")
