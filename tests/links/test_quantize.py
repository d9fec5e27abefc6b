"""Quantizers: the contract of every grid, bitsandbytes' bytes, packing, bad input."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer, Site, identity_of
from dovetail.chains.notation import chain
from dovetail.chains.packing import unpack
from dovetail.chains.registry import links
from dovetail.errors import ChainError, DovetailError
from dovetail.links.quantize import accelerate, dynamic8, hqq, nearest
from dovetail.links.quantize.block_float4 import E2M1, MXFP4, NVFP4
from dovetail.links.quantize.codebook import Book
from dovetail.links.quantize.fp8 import Float8
from dovetail.links.quantize.gptq import GPTQ
from dovetail.links.quantize.hqq import HQQ
from dovetail.links.quantize.integer import Int
from dovetail.links.quantize.nf import FP4, NF4, Float4, NormalFloat, NormalFloat4, normal_float
from places import GOLDEN

CONFIGURATIONS: list[Quantizer] = [
    *(Int(bits=bits, group=group, symmetric=s) for bits in (2, 3, 4, 8) for group in (0, 32) for s in (False, True)),
    *(Int(bits=bits, group=32, symmetric="signed") for bits in (2, 3, 4, 8)),
    Int(group=32, symmetric="signed", scale_bits=4),
    Int(group=32, scale_bits=7, scales="search"),
    *(
        cls(block=block, double=double)
        for cls in (NormalFloat4, Float4)
        for block in (32, 64)
        for double in (False, True)
    ),
    Float8(),
    Float8(scale="tensor"),
    *(NormalFloat(bits=bits, block=32, double=bits == 3) for bits in (2, 3, 4, 8)),
    MXFP4(),
    NVFP4(),
    *(HQQ(bits=bits, group=32) for bits in (1, 2, 3, 4, 8)),
    *(HQQ(bits=bits, group=0, zero="exact") for bits in (1, 4)),
]
BOOKS = [NF4, FP4, E2M1, *map(normal_float, (2, 3, 8))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPE = (24, 96)  # blocks of 64 straddle its rows

each_quantizer = pytest.mark.parametrize("quantizer", CONFIGURATIONS, ids=str)
each_with_zero = pytest.mark.parametrize("quantizer", [q for q in CONFIGURATIONS if q.has_zero], ids=str)


def a_weight(shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Half zeros, a row of zeros, an outlier; nothing else on a grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.04
    weight[torch.rand(shape, generator=generator) < 0.5] = 0
    weight[1 % shape[0]] = 0
    weight[-1, -1] = 1.5
    return weight.to(dtype)


def values(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return weight.dequantize(torch.full(weight.shape, torch.nan, dtype=dtype))


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def test_every_registered_quantizer_is_tested():
    registered = {cls for cls in links().values() if issubclass(cls, Quantizer) and "quantize" in cls.__module__}
    files = ("integer", "nf", "fp8", "hqq", "block_float4")
    ours = {cls for cls in registered if cls.__module__.rsplit(".", 1)[-1] in files}
    assert ours == {type(q) for q in CONFIGURATIONS}
    assert all(cls.summary and cls.source for cls in ours)


@each_quantizer
def test_zeros_stay_and_values_are_near(quantizer: Quantizer):
    for dtype in DTYPES:
        weight = a_weight(dtype=dtype)
        result = values(quantizer.quantize(weight))
        if quantizer.has_zero:
            assert (result[weight == 0] == 0).all()
        assert result.isfinite().all()
        error = (result - weight.float()).norm() / weight.float().norm()
        assert error < {1: 1.0, 2: 0.6}.get(getattr(quantizer, "bits", 4), 0.3), dtype


@each_quantizer
def test_dequantize_rounds_once_and_takes_any_strides(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    for dtype in DTYPES:
        expected = values(weight).to(dtype)
        assert same_bits(values(weight, dtype), expected), dtype
        transposed = torch.empty(SHAPE[1], SHAPE[0], dtype=dtype).t()
        assert same_bits(weight.dequantize(transposed), expected)
        every_other = torch.empty(2 * SHAPE[0], 2 * SHAPE[1], dtype=dtype)[::2, ::2]
        assert same_bits(weight.dequantize(every_other), expected)


@each_quantizer
def test_snap_is_encode_then_dequantize(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    for dtype in DTYPES[:2]:
        other = a_weight(dtype=dtype) + 0.02 * torch.randn(
            SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1)
        )
        snapped = weight.snap_(other.clone(), 0)
        assert same_bits(snapped, values(weight.encode(other), dtype))
        assert same_bits(weight.snap_(snapped.clone(), 0), snapped)
        # No value of the same row is nearer: the grid's values of a block are those that snapping finds.
        grid = weight.snap_(snapped.clone(), 0)
        assert ((other - grid).abs() <= (other - values(weight, dtype)).abs() * (1 + 1e-5) + 1e-9).all()


@each_quantizer
def test_snap_by_chunks(quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch):
    weight = quantizer.quantize(a_weight())
    other = a_weight(seed=2)
    whole, inside = weight.snap_(other.clone(), 0), weight.inside(other, 0)
    dense = values(weight)
    monkeypatch.setattr("dovetail.chains.grid.CPU_CHUNK", SHAPE[1] * 2)
    step = weight.rows_per_chunk
    assert step < SHAPE[0]
    parts = [weight.snap_(other[at : at + step].clone(), at) for at in range(0, SHAPE[0], step)]
    assert same_bits(torch.cat(parts), whole)
    assert same_bits(weight.snap_(other.clone(), 0), whole)
    assert torch.equal(torch.cat([weight.inside(other[a : a + step], a) for a in range(0, SHAPE[0], step)]), inside)
    assert same_bits(values(weight), dense)


def test_snap_refuses_half_a_block():
    weight = NormalFloat4(block=64).quantize(a_weight())
    with pytest.raises(ValueError, match="blocks"):
        weight.snap_(torch.zeros(1, SHAPE[1]), 0)


@each_quantizer
def test_off_grid(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    for dtype in DTYPES:
        dense = values(weight, dtype)
        assert weight.off_grid(dense) == 0, dtype
        nudged = dense.clone()
        index = tuple((dense.abs() > dense.abs().median()).nonzero()[0])
        # Half a step of the block away: no grid is that fine in any dtype.
        nudged[index] *= 1.1 if isinstance(quantizer, NormalFloat4 | Float4) else 1.04
        if isinstance(quantizer, Int | HQQ):
            step = weight.get_buffer("scale_og").float().view(SHAPE[0], -1)[index[0], index[1] // weight.block]
            nudged[index] = (dense[index].float() + 0.4 * step).to(dtype)
        if isinstance(quantizer, NormalFloat | MXFP4 | NVFP4):
            nudged[index] = 2 * dense.abs().max()  # beyond the range of its block
        assert weight.off_grid(nudged) == 1, dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_off_grid_where_the_dtype_is_coarser_than_the_grid(dtype: torch.dtype):
    weight = Int(bits=8, group=0).quantize(torch.rand(64, 512) * torch.logspace(-3, 3, 64)[:, None])
    assert weight.off_grid(values(weight, dtype)) == 0


@each_quantizer
def test_stored_nbytes_and_state_dict(quantizer: Quantizer):
    for shape in [SHAPE, (1, 32), (7, 96), (33, 160)]:
        weight = quantizer.quantize(a_weight(shape))
        state = weight.state_dict()
        site = Site("layer", out_features=shape[0], in_features=shape[1])
        assert quantizer.stored_nbytes(site) == weight.nbytes == sum(t.nbytes for t in state.values())
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())  # no larger tensor behind a view
        restored = quantizer.empty(shape)
        assert restored.nbytes == weight.nbytes
        restored.load_state_dict(state)
        assert restored.identity == weight.identity
        assert same_bits(values(restored), values(weight))
        with torch.device("meta"):
            on_meta = quantizer.empty(shape)
        assert {k: (v.shape, v.dtype) for k, v in on_meta.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }
        on_meta.load_state_dict(state, assign=True)
        assert same_bits(values(on_meta), values(weight))


@each_quantizer
def test_fake_tensors(quantizer: Quantizer):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = quantizer.empty(SHAPE)
        assert weight.dequantize(torch.empty(SHAPE, dtype=torch.bfloat16)).shape == SHAPE
    assert values(quantizer.quantize(a_weight())).isfinite().all()  # nothing fake was kept


@each_with_zero
def test_with_zeros(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    keep = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5
    pruned = weight.with_zeros(keep)
    assert torch.equal(values(pruned), values(weight) * keep)
    assert weight.off_grid(values(pruned)) == 0
    assert pruned.nbytes == weight.nbytes


@each_quantizer
def test_inside(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    dense = values(weight)
    inside = weight.inside(dense, 0)
    if quantizer.has_zero:
        assert torch.equal(inside | (dense == 0), torch.ones_like(inside))
    else:
        scale = weight.get_buffer("scale_og").float().repeat_interleave(weight.block, dim=1)
        assert torch.equal(inside, scale != 0)
    far = weight.inside(dense * 0 + 100.0, 0)
    assert not far.any()
    assert not weight.inside(dense * 0 - 100.0, 0).any()


@each_quantizer
def test_moving_a_model_keeps_the_grid(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    expected = values(weight)
    moved = torch.nn.Sequential(weight).to(torch.bfloat16).half().double()
    assert same_bits(values(moved[0]), expected)  # type: ignore[arg-type]


@each_quantizer
def test_zero_and_tiny_weights(quantizer: Quantizer):
    assert (values(quantizer.quantize(torch.zeros(SHAPE))) == 0).all()
    weight = quantizer.quantize(a_weight() * 1e-37)
    dense = values(weight)
    assert dense.abs().max() < 1e-36
    assert weight.off_grid(dense) == 0


def test_int_codes_are_the_nearest():
    weight = a_weight((16, 128))
    for symmetric in (False, True):
        quantized = Int(bits=3, group=32, symmetric=symmetric).quantize(weight)
        scale = quantized.scale_og.float().repeat_interleave(32, dim=1)
        zero = torch.full((16, 4), 4.0)
        if not symmetric:
            assert quantized.zero_og is not None
            zero = unpack(quantized.zero_og, 3, 0, 64).float().view(16, 4)
        grid = (torch.arange(8.0) - zero.repeat_interleave(32, dim=1)[..., None]) * scale[..., None]
        best = (grid - weight[..., None]).abs().amin(dim=2)
        assert torch.allclose((values(quantized) - weight).abs(), best, atol=1e-7)


def error(quantizer: Int) -> float:
    """The error of a normal weight, in percent of its norm."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    return 100 * float((values(quantizer.quantize(weight)) - weight).norm() / weight.norm())


def test_signed_scales_and_scales_of_few_bits_err_as_documented():
    assert error(Int(group=32, symmetric=True)) == pytest.approx(9.49, abs=0.04)
    assert error(Int(group=32, symmetric="signed")) == pytest.approx(8.60, abs=0.04)
    assert error(Int()) == pytest.approx(9.12, abs=0.04)
    assert error(Int(scale_bits=7)) == pytest.approx(9.12, abs=0.04)
    assert error(Int(scale_bits=4)) == pytest.approx(9.18, abs=0.04)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True, "signed"])
@pytest.mark.parametrize("scale_bits", [None, 4, 7])
def test_searched_scales_err_less(bits: int, symmetric: Any, scale_bits: int | None):
    plain = Int(bits=bits, group=32, symmetric=symmetric, scale_bits=scale_bits)
    searched = Int(bits=bits, group=32, symmetric=symmetric, scale_bits=scale_bits, scales="search")
    weight = a_weight((24, 128)) + 0.001
    of_group = [(values(each.quantize(weight)) - weight).view(-1, 32).square().sum(dim=1) for each in (plain, searched)]
    assert bool((of_group[1] <= of_group[0] * (1 + 1e-5)).all())
    assert error(searched) < error(plain)


@pytest.mark.parametrize("symmetric", [False, True, "signed"])
def test_scales_of_few_bits_are_exact_in_narrow_dtypes(symmetric: Any):
    for scale_bits, dtype in ((4, torch.bfloat16), (4, torch.float16), (7, torch.float16)):
        quantized = Int(group=32, symmetric=symmetric, scale_bits=scale_bits).quantize(a_weight())
        assert torch.equal(values(quantized, dtype).float(), values(quantized))
        mantissa = torch.frexp(quantized.scale_og.float()).mantissa * 2**scale_bits
        assert torch.equal(mantissa, mantissa.round())
        assert not (torch.signbit(quantized.scale_og) & (quantized.scale_og == 0)).any()
        assert not (torch.signbit(values(quantized)) & (values(quantized) == 0)).any()  # no negative zero


def test_a_signed_scale_makes_the_largest_weight_the_lowest_code():
    weight = a_weight() + 0.001
    quantized = Int(group=32, symmetric="signed").quantize(weight)
    assert (quantized.codes_of(0, SHAPE[0])[0].view(-1, 32) == 0).any(dim=1).all()
    assert bool((quantized.scale_og < 0).any() and (quantized.scale_og > 0).any())


def test_a_subnormal_scale_that_would_lose_bits_is_refused():
    weight = torch.ones(1, 32) * 8.125 * 2.0**-24 * 7.5  # float16 rounds the scale to a multiple of 2^-24
    assert values(Int(group=32, symmetric=True).quantize(weight)).any()
    assert values(Int(group=32, symmetric=True, scale_bits=4).quantize(weight)).any()
    with pytest.raises(DovetailError, match=r"(?s)fewer than 7 significant bits.*leave out scale_bits"):
        Int(group=32, symmetric=True, scale_bits=7).quantize(weight)


@pytest.mark.parametrize("name", ["int", "gptq"])
def test_arguments_that_are_new_leave_earlier_chains_as_they_were(name: str):
    (plain,) = chain(f"{name}(bits=4, group=64)")
    assert isinstance(plain, Quantizer)
    assert "scale" not in identity_of(plain)
    assert str(plain) == f"{name}(bits=4, group=64)"
    assert chain("gptq(4, 64, false, false)").links[0] == GPTQ(bits=4, group=64, symmetric=False, act_order=False)
    text = f"{name}(bits=4, group=32, symmetric=signed, scale_bits=4, scales=search)"
    assert str(chain(text)) == text
    (new,) = chain(text)
    assert isinstance(new, Quantizer)
    assert chain(identity_of(new)).links == (new,)
    for bad in ("symmetric=maybe", "scale_bits=5", "scales=best", "scale_bits=true"):
        with pytest.raises(ChainError):
            chain(f"{name}({bad})")


# ---- bitsandbytes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("cls", [NormalFloat4, Float4])
@pytest.mark.parametrize("shape", [(64, 128), (3, 5), (7, 33), (64, 100), (257, 513), (1, 1)], ids=str)
def test_4_bit_is_bitsandbytes_byte_for_byte(bnb, cls, double: bool, shape: tuple[int, int]):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for block in (32, 64, 256):
            weight = a_weight(shape, dtype, seed=block)
            packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=cls.name, compress_statistics=double)
            ours = cls(block=block, double=double).quantize(weight)
            stored = ours.state_dict()
            assert torch.equal(stored["codes"], packed.view(-1))
            if double:
                assert torch.equal(stored["scale_codes"], state.absmax)
                assert same_bits(stored["scale_absmax"], state.state2.absmax)
                assert same_bits(stored["scale_offset"], state.offset)
                assert torch.equal(torch.tensor(dynamic8.DYNAMIC_MAP), state.state2.code)
            else:
                assert same_bits(stored["scale"], state.absmax)
            # bitsandbytes' AVX512 kernel takes wrong scales where blocks straddle rows of a multiple of 16.
            # Odd rows make it compile a fallback for seconds.
            if shape[1] % block == 0 or (shape[1] % 16 and shape[1] % 2 == 0):
                assert torch.equal(values(ours, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("cls", [NormalFloat4, Float4])
def test_4_bit_ties(bnb, cls):
    levels = torch.tensor(cls.book.levels).sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    around = torch.cat([middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))])
    weight = torch.ones(2, 64)
    weight[0, : len(around)] = around
    weight[1, : len(around)] = -around
    weight[1, 63] = -1
    for scale in (1.0, 3.0, 0.1):
        packed, _ = bnb.quantize_4bit(weight * scale, quant_type=cls.name)
        ours = cls().quantize(weight * scale)
        assert torch.equal(ours.codes, packed.view(-1))
        assert torch.equal(ours.encode(weight * scale).codes, packed.view(-1))


class StandIn:
    """bitsandbytes' dequantize operator in plain torch, so that the code around it is tested on every processor."""

    def __init__(self, scaled_by: float = 1.0) -> None:
        self.scaled_by = scaled_by
        self.calls = 0

    def default(
        self, codes: Tensor, scale: Tensor, block: int, name: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        self.calls += 1
        book = {"nf4": NF4, "fp4": FP4}[name]
        pairs = torch.stack([codes >> 4, codes & 15], dim=1).view(-1, block).long()
        return (torch.tensor(book.levels)[pairs] * (scale * self.scaled_by)[:, None]).to(dtype).view(shape)


def use_stand_in(patch: pytest.MonkeyPatch, operator: Any) -> None:
    """Make Dovetail find this operator in place of bitsandbytes'."""
    patch.setattr(torch.ops, "bitsandbytes", SimpleNamespace(dequantize_4bit=operator), raising=False)
    patch.setattr(accelerate, "_available", lambda: True)
    patch.setattr(accelerate, "_proved_kernel", accelerate._proved_kernel.__wrapped__)
    patch.setattr(accelerate, "SMALLEST", 0)
    patch.setattr(accelerate, "DEVICES", ("cpu",))


each_float4 = pytest.mark.parametrize("cls", [NormalFloat4, Float4])
each_kernel_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
KERNEL_SHAPES = [((24, 128), 64), ((10, 256), 32), ((24, 96), 64), ((5, 4096), 2048)]


def dequantized_by_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The values; asserts that a transposed buffer gets the same."""
    found = values(weight, dtype)
    transposed = weight.dequantize(torch.empty(weight.shape[1], weight.shape[0], dtype=dtype).t())
    assert same_bits(transposed, found)
    return found


@each_float4
@each_kernel_dtype
def test_kernel_is_used_for_whole_blocks_and_equal_to_the_definition(monkeypatch, cls, dtype: torch.dtype):
    for shape, block in KERNEL_SHAPES:
        for double in (False, True):
            weight = cls(block=block, double=double).quantize(a_weight(shape))
            expected = values(weight, dtype)
            with monkeypatch.context() as patch:
                operator = StandIn()
                use_stand_in(patch, operator)
                kernel = accelerate.four_bit_kernel(cls.name, cls.book.levels, shape, block, dtype, weight.codes)
                assert (kernel is None) == (shape[1] % block != 0 or block > 1024)
                calls = operator.calls
                assert same_bits(dequantized_by_kernel(weight, dtype), expected)
                assert (operator.calls > calls) == (kernel is not None)
                patch.setattr(accelerate, "SMALLEST", shape[0] * shape[1] + 1)
                assert accelerate.four_bit_kernel(cls.name, cls.book.levels, shape, block, dtype, weight.codes) is None


@each_float4
@each_kernel_dtype
def test_bitsandbytes_kernel_is_equal_to_the_definition(bnb, monkeypatch, cls, dtype: torch.dtype):
    """Whether or not the kernel is taken on this processor."""
    for shape, block in KERNEL_SHAPES:
        for double in (False, True):
            weight = cls(block=block, double=double).quantize(a_weight(shape))
            expected = values(weight, dtype)
            with monkeypatch.context() as patch:
                patch.setattr(accelerate, "SMALLEST", 0)
                patch.setattr(accelerate, "DEVICES", ("cpu",))
                assert same_bits(dequantized_by_kernel(weight, dtype), expected)


def test_kernel_that_differs_or_fails_is_not_used(monkeypatch: pytest.MonkeyPatch):
    def absent(*_: object) -> Tensor:
        raise NotImplementedError

    weight = NormalFloat4().quantize(a_weight((24, 128)))
    expected = values(weight)
    for operator in (StandIn(scaled_by=1 + 2**-23), SimpleNamespace(default=absent)):
        with monkeypatch.context() as patch:
            use_stand_in(patch, operator)
            assert accelerate.four_bit_kernel("nf4", NF4.levels, (24, 128), 64, torch.float32, weight.codes) is None
            assert same_bits(values(weight), expected)


@pytest.mark.parametrize("threads", [1, 3])
@each_quantizer
def test_compiled_loops_are_equal_to_the_definition(monkeypatch, quantizer: Quantizer, threads: int):
    weight = a_weight((48, 256))
    weight[3, :128] = 0
    quantized = quantizer.quantize(weight)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40, -1e-40, 3e38])
    rows = torch.cat([weight.flatten() * scale for scale in (1, 1.4, -0.7)]).view(3, 48, 256)
    rows[0, 7, :7] = odd
    rows[0, 3, :7] = odd
    found = {}
    monkeypatch.setattr("dovetail.links.quantize.loops._PART", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for smallest in (0, 1 << 40):
        monkeypatch.setattr(accelerate, "SMALLEST_FOR_LOOPS", smallest)
        inside = torch.empty(rows.shape, dtype=torch.bool)
        snapped = [quantized.snap_(part.clone(), 0, there) for part, there in zip(rows, inside, strict=True)]
        alone = quantized.snap_(rows[0].clone(), 0)
        found[smallest] = [values(quantized), inside, *snapped, alone, quantized.snap_(rows[0, 16:32].clone(), 16)]
    for ours, expected in zip(*found.values(), strict=True):
        assert torch.equal(ours.isnan(), expected.isnan()) if ours.is_floating_point() else torch.equal(ours, expected)
        assert same_bits(ours.nan_to_num(7), expected.nan_to_num(7))


def test_only_large_weights_import_numba_and_a_processor_needs_no_bitsandbytes():
    code = (
        "import sys, torch\n"
        "from dovetail.links.quantize.nf import NormalFloat4\n"
        "NormalFloat4().quantize(torch.randn(8, 64)).dequantize(torch.empty(8, 64))\n"
        "assert 'numba' not in sys.modules\n"
        "NormalFloat4().quantize(torch.randn(512, 1024)).dequantize(torch.empty(512, 1024))\n"
        "assert 'bitsandbytes' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_nearest_by_cells_is_nearest_by_search(book: Book):
    middle = torch.tensor(book.middles)
    near = [middle]
    for towards in (-2.0, 2.0):
        step = middle
        for _ in range(3):
            step = step.nextafter(torch.tensor(towards))
            near.append(step)
    numbers = torch.cat([*near, torch.tensor([-1.0, 1.0, 0.0, -0.0]), torch.linspace(-1, 1, 40_001)])
    for answers, dtype in ((book.ascending, torch.float32), (book.order, torch.uint8)):
        found = nearest.nearest(numbers, book.middles, answers, dtype)
        index = torch.bucketize(numbers, middle)
        assert torch.equal(found, torch.tensor(answers, dtype=dtype)[index])
        assert torch.equal(found, nearest._by_search(numbers, book.middles, answers, dtype))


@each_quantizer
def test_a_diverged_weight_is_not_hidden(quantizer: Quantizer):
    weight = quantizer.quantize(a_weight())
    other = a_weight(seed=4)
    expected = weight.snap_(other.clone(), 0)
    other[5, 7] = torch.nan
    expected[5, 7] = torch.nan
    found = weight.snap_(other, 0)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


# ---- stored numbers -----------------------------------------------------------------------------------------------


def test_golden():
    golden = json.loads((GOLDEN / "quantize.json").read_text())
    assert len(golden) >= 8
    by_identity = {q.quantize(torch.zeros(2, 64)).identity: q for q in [*CONFIGURATIONS, Int(), Int(group=0, bits=8)]}
    for case in golden:
        weight = torch.tensor(case["weight"])
        quantized = by_identity[case["identity"]].quantize(weight)
        for name, expected in case["stored"].items():
            assert quantized.get_buffer(name).view(-1).float().tolist() == expected, (case["identity"], name)
        assert values(quantized).tolist() == case["values"], case["identity"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nf_has_the_quantiles_of_loftq(bits: int):
    """LoftQ's formula, which is that of bitsandbytes' `create_normal_map` for other numbers of levels."""
    stats, half = pytest.importorskip("scipy.stats"), 2 ** (bits - 1)
    above = stats.norm.ppf(torch.linspace(0.9677083, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -stats.norm.ppf(torch.linspace(0.9677083, 0.5, half, dtype=torch.float64)[:-1])
    wanted = torch.tensor(sorted([*below, 0.0, *above])) / max(above)
    found = torch.tensor(normal_float(bits).levels, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if bits == 4 else 1e-7)


def test_nf_of_4_bits_is_nf4():
    weight = a_weight((24, 128))
    for double in (False, True):
        general, named = NormalFloat(double=double).quantize(weight), NormalFloat4(double=double).quantize(weight)
        assert all(same_bits(tensor, named.state_dict()[name]) for name, tensor in general.state_dict().items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nf_costs_what_equation_9_of_qr_adaptor_says(bits: int):
    site = Site("layer", out_features=256, in_features=1024)
    for block in (32, 64, 256):
        cost = 256 * 1024 * (bits + 8 / block + 32 / (block * 256))
        assert 8 * NormalFloat(bits=bits, block=block, double=True).stored_nbytes(site) == cost + 32  # and the mean


def test_block_floats_are_those_of_compressed_tensors():
    for case in json.loads((GOLDEN / "block_float4.json").read_text()):
        weight = torch.tensor(case["weight"])
        for theirs in case["cases"]:
            (link,) = chain(theirs["name"])
            assert isinstance(link, MXFP4 | NVFP4)
            quantized = link.quantize(weight)
            codes, _ = quantized.codes_of(0, len(weight))
            stored = quantized.get_buffer("scale").view(torch.uint8)
            assert stored.tolist() == theirs["scale"]
            if theirs["divisor"] is not None:
                assert float(quantized.get_buffer("scale_divisor")) == theirs["divisor"]
            assert torch.equal(codes[weight != 0], torch.tensor(theirs["codes"], dtype=torch.uint8)[weight != 0])
            assert torch.equal(values(quantized), torch.tensor(theirs["values"]))


def test_block_floats_need_whole_blocks_in_a_row():
    with pytest.raises(ChainError, match="a block of 32 weights must lie in one row"):
        MXFP4().check(Site("x", out_features=8, in_features=48))
    NVFP4().check(Site("x", out_features=8, in_features=48))


def test_hqq_is_as_near_as_the_package():
    for case in json.loads((GOLDEN / "hqq.json").read_text()):
        weight = torch.tensor(case["weight"]) * case["step"]
        assert [of_bits["bits"] for of_bits in case["cases"]] == [8, 4, 3, 2, 1]
        for theirs in case["cases"]:
            quantized = HQQ(bits=theirs["bits"]).quantize(weight)
            error = float((values(quantized) - weight).norm() / weight.norm())
            assert error < 1.01 * theirs["error"]
            scale = torch.tensor(theirs["scale"]).view(quantized.scale_og.shape)
            torch.testing.assert_close(quantized.scale_og.float(), scale, rtol=2**-11, atol=0)
            assert quantized.zero_og is not None
            zero = quantized.zero_og.float() + 2 ** (theirs["bits"] - 1)
            assert (zero.view(-1) - torch.tensor(theirs["zero"])).abs().median() < 0.15


def test_hqq_shrinks_as_the_package():
    """Against its formula in float64: weights so large that the shrunk error is not zero, a group without a range."""
    error = torch.linspace(-0.5, 0.5, 12).view(2, 6)
    scale = torch.tensor([[1.5], [0.0]])
    size = (error * scale).double()
    wanted = size.sign() * (size.abs() - size.abs().pow(-0.3) / 12).clamp(min=0) / scale
    found = hqq._shrunk(error, scale, 12.0)
    assert isinstance(found, Tensor)
    assert int((found != 0).sum()) == 5
    torch.testing.assert_close(found, wanted.nan_to_num(0.0).float())
    assert hqq._shrunk(error, scale / 100, 12.0) == 0.0


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_group_must_divide():
    with pytest.raises(ChainError) as error:
        Int(bits=4, group=128).check(Site("model.layers.3.mlp.up_proj", out_features=8, in_features=1000))
    assert str(error.value) == (
        "int at model.layers.3.mlp.up_proj\n"
        "  found: in_features=1000, group=128\n"
        "  rule:  group must divide in_features\n"
        "  fix:   use group=125, or group=0 for one group per row"
    )
    with pytest.raises(ChainError, match="group must divide in_features"):
        Int(group=64).quantize(torch.zeros(4, 100))
    Int(group=0).check(Site("x", out_features=8, in_features=1000))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(bits=5),
        lambda: Int(group=-1),
        lambda: NormalFloat4(block=48),
        lambda: Float4(block=0),
        lambda: Float8(scale="column"),
        lambda: NormalFloat(bits=5),
        lambda: NormalFloat(block=48),
        lambda: HQQ(axis=0),
        lambda: HQQ(bits=5),
        lambda: HQQ(zero="nearly"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ChainError) as error:
        make()
    assert error.value.found
    assert error.value.rule
    assert error.value.fix


@each_quantizer
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(quantizer: Quantizer, bad: float):
    weight = a_weight()
    weight[3, 4] = bad
    with pytest.raises(DovetailError, match="1 weights that are NaN or infinite") as error:
        quantizer.quantize(weight)
    assert error.value.where == quantizer.name
    assert error.value.fix


def test_scale_overflow():
    for symmetric in (False, True):
        with pytest.raises(DovetailError, match="float16"):
            Int(bits=2, symmetric=symmetric).quantize(torch.full((2, 64), 1e6))


def test_not_a_matrix():
    with pytest.raises(DovetailError, match="matrix"):
        Float8().quantize(torch.zeros(2, 3, 4))


@each_quantizer
def test_rows_are_the_same_codes_and_values(quantizer: Quantizer):
    whole = quantizer.quantize(a_weight())
    part = whole.rows(4, 18)
    assert part.shape == (14, SHAPE[1])
    assert torch.equal(values(part), values(whole)[4:18])
    assert torch.equal(part.codes_of(0, 14)[0], whole.codes_of(4, 18)[0])


@each_quantizer
def test_inside_ends_half_a_step_beyond_the_range(quantizer: Quantizer):
    """Against all values of the grid; row 1 is zero: a block without a scale holds nothing but zero."""
    weight = quantizer.quantize(a_weight())
    not_numbers = {0x7F, 0xFF} if weight.codes.dtype == torch.float8_e4m3fn else set()
    codes = [torch.full(SHAPE, code, dtype=torch.uint8) for code in set(range(2**weight.bits)) - not_numbers]
    ascending = torch.stack([values(weight.with_codes(code)) for code in codes]).double().sort(dim=0).values
    lowest, second, highest = ascending[0], ascending[-2], ascending[-1]
    reach = (highest - lowest) / 2 + (highest - second) / 2
    other = 3 * a_weight(seed=6) + 0.02
    beyond = ((other - (highest + lowest) / 2).abs() - reach) / reach
    inside = weight.inside(other, 0)
    assert inside[beyond < -1e-5].all()
    assert not inside[beyond > 1e-5].any()
    assert (beyond > 1e-5).any()
    assert not inside[(highest == 0) & (lowest == 0)].any()
