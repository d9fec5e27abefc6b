"""GPTQ beside the textbook's loop in float64: Frantar et al. 2022, algorithm 1, column by column with an inverse."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from calibrated import error, gram_of, sample
from dovetail.chains.statistics import InputStatistics
from dovetail.errors import CalibrationWarning, ChainError
from dovetail.links.column_solver import factor
from dovetail.links.quantize.affine import affine_range
from dovetail.links.quantize.gptq import GPTQ
from dovetail.links.quantize.integer import Int


def values(quantizer: GPTQ | Int, weight: Tensor, statistics: InputStatistics | None = None) -> Tensor:
    return quantizer.quantize(weight, statistics).dequantize(torch.empty(weight.shape))


def reference(weight: Tensor, x: Tensor, quantizer: GPTQ) -> Tensor:
    o, i = weight.shape
    group, bits = quantizer.group or i, quantizer.bits
    scale_og, zero_og = affine_range(weight, i // group, bits=bits, symmetric=quantizer.symmetric, where="test")
    hessian = x.double().t() @ x.double()
    order = torch.arange(i)
    if quantizer.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian[order][:, order]
    hessian += quantizer.damping * hessian.diagonal().mean() * torch.eye(i, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, new, zeros = weight.double()[:, order], torch.zeros(o, i, dtype=torch.float64), weight == 0
    for place, column in enumerate(order.tolist()):
        scale = scale_og[:, column // group].double()
        code = (left[:, place] / scale.masked_fill(scale == 0, torch.inf)).round()
        if zero_og is None:
            code = code.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        else:
            zero = zero_og[:, column // group].double()
            code = (code + zero).clamp(0, 2**bits - 1) - zero
        new[:, column] = (code * scale).masked_fill(zeros[:, column], 0)
        miss = (left[:, place] - new[:, column]) / upper[place, place]
        left[:, place:] -= miss[:, None] * upper[place, place:]
    return new


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "bits", "group"),
    [((48, 64), 2, 16), ((48, 64), 3, 0), ((20, 96), 4, 24), ((24, 384), 4, 192), ((24, 200), 8, 40), ((8, 300), 3, 0)],
)
def test_equals_the_textbook(shape: tuple[int, int], bits: int, group: int, symmetric: bool, act_order: bool) -> None:
    weight, x = sample(*shape)
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    quantizer = GPTQ(bits=bits, group=group, symmetric=symmetric, act_order=act_order)
    wanted = reference(weight, x, quantizer)
    found = values(quantizer, weight, gram_of(x))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-6)
    assert bool((found[weight == 0] == 0).all())
    narrow = values(quantizer, weight, gram_of(x, torch.float32))  # a rounding here and there goes the other way
    assert error(weight, narrow, x) == pytest.approx(error(weight, wanted, x), rel=0.02)


@pytest.mark.parametrize("scales", ["range", "search"])
def test_takes_signed_scales_of_few_bits(scales: Any) -> None:
    weight, x = sample(32, 64)
    gptq, nearest = (
        kind(group=32, symmetric="signed", scale_bits=4, scales=scales).quantize(weight, gram_of(x))
        for kind in (GPTQ, Int)
    )
    assert torch.equal(gptq.scale_og, nearest.scale_og)
    assert bool((gptq.scale_og < 0).any())
    of_gptq, of_int = (each.dequantize(torch.empty(weight.shape)) for each in (gptq, nearest))
    assert error(weight, of_gptq, x) < error(weight, of_int, x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_is_nearer_than_rounding_to_nearest(bits: int) -> None:
    weight, x = sample(64, 128)
    nearest = error(weight, values(Int(bits=bits, group=32), weight), x)
    ordered = error(weight, values(GPTQ(bits=bits, group=32), weight, gram_of(x)), x)
    plain = error(weight, values(GPTQ(bits=bits, group=32, act_order=False), weight, gram_of(x)), x)
    assert ordered < plain < nearest


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_never_seen_are_rounded_to_the_nearest(act_order: bool) -> None:
    weight, x = sample(16, 64)
    x[:, 5:40:7] = 0
    found = values(GPTQ(bits=4, group=32, act_order=act_order), weight, gram_of(x))
    assert torch.equal(found[:, 5:40:7], values(Int(bits=4, group=32), weight)[:, 5:40:7])


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_tokens_than_inputs(damping: float) -> None:
    """The Gram matrix is singular: what damping there is, or more of it, makes it regular."""
    weight, x = sample(16, 64, tokens=20)
    quantizer = GPTQ(bits=3, group=32, damping=damping)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = values(quantizer, weight, gram_of(x))
    assert error(weight, found, x) < error(weight, values(Int(bits=3, group=32), weight), x)


def test_no_damping_is_the_textbook_too() -> None:
    weight, x = sample(16, 64)
    quantizer = GPTQ(bits=3, group=32, damping=0.0)
    torch.testing.assert_close(values(quantizer, weight, gram_of(x)), reference(weight, x, quantizer).float())


def test_a_matrix_that_no_damping_mends_falls_back_to_nearest() -> None:
    weight, x = sample(16, 64)
    statistics = gram_of(x)
    assert statistics.gram_ii is not None
    statistics.gram_ii.neg_()
    with pytest.warns(CalibrationWarning, match="singular"):
        found = values(GPTQ(bits=4, group=32), weight, statistics)
    assert torch.equal(found, values(Int(bits=4, group=32), weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype(dtype: torch.dtype) -> None:
    weight, x = sample(16, 64)
    weight = weight.to(dtype)
    quantizer = GPTQ(bits=4, group=32)
    assert torch.equal(values(quantizer, weight, gram_of(x)), values(quantizer, weight.float(), gram_of(x)))


def test_layers_with_the_same_inputs_share_the_factor() -> None:
    weight, x = sample(16, 64)
    shared = gram_of(x)
    first = values(GPTQ(), weight, shared)
    assert torch.equal(first, values(GPTQ(), weight, shared))
    assert len(shared.factors) == 1


@pytest.mark.parametrize("arguments", [{"bits": 5}, {"damping": -1.0}, {"damping": 2.0}, {"group": -1}])
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ChainError, match=next(iter(arguments))):
        GPTQ(**arguments)


@pytest.mark.parametrize(("lowest", "wanted"), [(1.0, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-9.0, None)])
def test_damping_is_raised_tenfold_up_to_the_mean_diagonal(lowest: float, wanted: float | None) -> None:
    statistics = gram_of(torch.eye(4))
    statistics.gram_ii = torch.diag(torch.tensor([1.0, 1.0, 1.0, lowest], dtype=torch.float64))
    found = factor(statistics, 0.01)
    assert (found and found.damping) == (wanted and pytest.approx(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_start_of_regrid_is_rounded_to_the_codes_in_every_dtype(dtype: torch.dtype) -> None:
    """A start that bfloat16 rounds over a boundary would be another code's: the code's own value replaces it."""
    weight, x = sample(32, 64)
    quantized, start = GPTQ(bits=8, group=32).quantize_from(weight.to(dtype), gram_of(x))
    wanted = quantized.dequantize(torch.empty(weight.shape))
    assert start.dtype == dtype
    assert torch.equal(quantized.snap_(start.float(), 0), wanted)
