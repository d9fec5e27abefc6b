"""Triton's kernels are the definition: on a CUDA device, or on the CPU in Triton's interpreter.

Values and rounding are compared bit for bit with the definition on the CPU, products with those in float64.
`tests/links/test_interpreted.py` runs this file in the interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dovetail
from accelerators import DEVICE, INTERPRETED, TRITON
from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.chains.packing import CODES_PER_UNIT
from dovetail.links.quantize import accelerate
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.block_float4 import MXFP4, NVFP4
from dovetail.links.quantize.hqq import HQQ
from dovetail.links.quantize.integer import Int
from dovetail.links.quantize.nf import Float4, NormalFloat, NormalFloat4
from tolerance import rounding

pytestmark = [
    pytest.mark.skipif(not TRITON, reason="triton is not installed"),
    pytest.mark.skipif(DEVICE.type != "cuda" and not INTERPRETED, reason="Triton's kernels need a CUDA device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy in the interpreter: infinity less infinity
]

AFFINE: list[Quantizer] = [
    *(Int(bits=bits, group=group, symmetric=s) for bits in (2, 3, 4, 8) for group, s in ((0, False), (32, True))),
    *(Int(bits=bits, group=24, symmetric="signed") for bits in (3, 4)),
    Int(group=32, scale_bits=4, symmetric="signed"),
    *(HQQ(bits=bits, group=32) for bits in (1, 2, 3, 4, 8)),
]
BOOKS: list[Quantizer] = [
    *(NormalFloat4(block=block, double=double) for block, double in ((32, False), (64, True), (256, False))),
    Float4(block=32),
    *(NormalFloat(bits=bits, block=32, double=bits == 3) for bits in (2, 3, 8)),
    MXFP4(),
    NVFP4(),
]
each_quantizer = pytest.mark.parametrize("quantizer", AFFINE + BOOKS, ids=str)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(13, 96), (1, 288)]
"""Of 96 inputs, blocks of 64 and 256 straddle the rows; the last block of 13 rows is short."""


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let kernels work on weights of any size; return the kernels that ran."""
    from dovetail.links.quantize import kernels

    assert accelerate.kernels_work(DEVICE)
    monkeypatch.setattr(accelerate, "DEVICES", (DEVICE.type,))
    monkeypatch.setattr(accelerate, "SMALLEST", 0)
    ran: list[Any] = []
    run = kernels._run
    monkeypatch.setattr(
        kernels, "_run", lambda kernel, *rest, **named: (ran.append(kernel), run(kernel, *rest, **named))
    )
    return ran


@contextmanager
def by_definition() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "DEVICES", ())
        patch.setattr(accelerate, "SMALLEST_FOR_LOOPS", 1 << 40)
        yield


def a_grid(quantizer: Quantizer, shape: tuple[int, int]) -> QuantizedWeight:
    """A weight whose codes take every bit pattern in an order of no period, and one row of zeros; on the CPU."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[0])[:, None]
    if shape[0] > 1:
        weight[1] = 0
    with by_definition():
        quantized = quantizer.quantize(weight)
        own, _ = quantized.codes_of(0, shape[0])
        codes = torch.randint(2**quantized.bits, shape, generator=generator, dtype=torch.uint8)
        codes[weight == 0] = own[weight == 0]
        return quantized.with_codes(codes)


def on_device(quantized: QuantizedWeight) -> QuantizedWeight:
    """The same grid on the device; the one given stays where it is."""
    return copy.deepcopy(quantized).to(DEVICE)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether the bits are equal; NaN has many."""
    found, missing = found.cpu().contiguous(), wanted.isnan()
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[wanted.element_size()]
    filled = [each.masked_fill(missing, 7).view(words) for each in (found, wanted.contiguous())]
    return found.dtype == wanted.dtype and torch.equal(found.isnan(), missing) and torch.equal(*filled)


@each_quantizer
def test_values_are_those_of_the_definition(quantizer: Quantizer, calls: list[Any]) -> None:
    for shape in SHAPES:
        if shape[1] % (getattr(quantizer, "group", 0) or 32):
            continue
        quantized = a_grid(quantizer, shape)
        there = on_device(quantized)
        for dtype in DTYPES:
            with by_definition():
                wanted = quantized.dequantize(torch.empty(shape, dtype=dtype))
            before = len(calls)
            found = there.dequantize(torch.full(shape, torch.nan, dtype=dtype, device=DEVICE))
            assert len(calls) > before
            assert same(found, wanted), (shape, dtype)
        transposed = torch.empty(shape[1], shape[0], dtype=dtype, device=DEVICE).t()
        assert same(there.dequantize(transposed), wanted), (shape, dtype)
        every_other = torch.empty(2 * shape[0], 2 * shape[1], dtype=dtype, device=DEVICE)[::2, ::2]
        assert same(there.dequantize(every_other), wanted), (shape, dtype)


@each_quantizer
def test_rounding_to_the_grid_is_that_of_the_definition(quantizer: Quantizer, calls: list[Any]) -> None:
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    shape = (32, 192)
    quantized = a_grid(quantizer, shape)
    there = on_device(quantized)
    with by_definition():
        values = quantized.dequantize(torch.empty(shape))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    halfway = values + 0.5 * (values.roll(1, 1) - values)
    for rows in (values, halfway, 1.4 * values, -0.7 * values * noise):
        rows[5, :8], rows[1, 8:16] = odd, odd
        for start in (0, 16):
            with by_definition():
                wanted_inside = torch.empty(shape[0] - start, shape[1], dtype=torch.bool)
                wanted = quantized.snap_(rows[start:].clone(), start, wanted_inside)
            before = len(calls)
            inside = torch.empty_like(wanted_inside, device=DEVICE)
            found = there.snap_(rows[start:].to(DEVICE, copy=True), start, inside)
            alone = there.snap_(rows[start:].to(DEVICE, copy=True), start)
            assert len(calls) == before + 2
            assert same(found, wanted)
            assert same(alone, wanted)
            assert torch.equal(inside.cpu(), wanted_inside)


@each_quantizer
def test_products_are_those_of_the_values(
    monkeypatch: pytest.MonkeyPatch, quantizer: Quantizer, calls: list[Any]
) -> None:
    from dovetail.links.quantize import kernels

    for (o, i), units in zip(SHAPES, (kernels._UNITS, 16), strict=True):  # all of a row at once, or in parts
        monkeypatch.setattr(kernels, "_UNITS", units)
        if i % (getattr(quantizer, "group", 0) or 32):
            continue
        quantized = a_grid(quantizer, (o, i))
        there = on_device(quantized)
        with by_definition():
            weight = quantized.dequantize(torch.empty(o, i)).double()
        block = quantized.block
        for t, dtype in ((1, torch.float32), (2, torch.bfloat16), (4, torch.float16)):
            x = torch.randn(t, 2 * i, generator=torch.Generator().manual_seed(t)).to(dtype)[:, ::2]
            found = there.product(x.to(DEVICE))
            if i % block or block % CODES_PER_UNIT[quantized.bits]:
                assert found is None
                continue
            assert found is not None
            assert found.shape == (t, o)
            assert found.dtype == torch.float32
            # Σ|x w| bounds the error of a sum in any order; a product with a zero point has terms of |code| + |zero|.
            terms = x.double().abs() @ _terms(quantized, weight).t()
            error = (found.cpu().double() - x.double() @ weight.t()).abs()
            assert (error <= rounding(torch.float32, i, 4) * terms).all()


def _terms(quantized: QuantizedWeight, weight: Tensor) -> Tensor:
    """The largest numbers that a kernel adds for a weight, (o, i)."""
    if not isinstance(quantized, AffineWeight):
        return weight.abs()
    largest = 2.0**quantized.bits * quantized.block_scales().double().abs()
    return weight.abs() + largest.view(weight.shape[0], -1).repeat_interleave(quantized.block, 1)


@pytest.mark.parametrize(
    "text", ["int(bits=4, group=32) >> lora(r=4) >> regrid", "nf4 >> lora(r=4) >> regrid", "magnitude(0.5) >> "
    "int(bits=3, group=32) >> lora(r=4) >> remask >> regrid(start=codes)"],
)  # fmt: skip
def test_a_chain_trains_and_merges_as_by_the_definition(text: str, calls: list[Any]) -> None:
    def steps() -> tuple[list[Tensor], Tensor, bool | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 32)).to(DEVICE).requires_grad_(False)
        dovetail.apply(model, text)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        outputs = []
        for _ in range(3):
            y = model(x)
            outputs.append(y.detach().clone())
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        report = dovetail.merge(model)
        return outputs, model(x).detach(), report.exact

    found = steps()
    assert calls
    with by_definition():
        wanted = steps()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], wanted[0], strict=True))
    assert torch.equal(found[1], wanted[1])
    assert found[2] == wanted[2] is True


def test_a_packed_layer_multiplies_from_codes(calls: list[Any]) -> None:
    """One token after the other, as `generate` asks, is near to the same tokens at once."""
    for text in ("int(bits=4, group=32)", "nf4", "int(bits=3, group=32)"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 64)).to(DEVICE).requires_grad_(False)
        dovetail.apply(model, text)
        dovetail.merge(model, packed=True)
        x = torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        with torch.inference_mode():
            before = len(calls)
            one = model(x)
            assert len(calls) == before + 1
            many = model(x.expand(2, 8, 128))[:, :1]
        torch.testing.assert_close(one, many, rtol=0, atol=float(many.abs().max()) * rounding(torch.float32, 128, 2))
