"""The fast paths where numbers or shapes are awkward: cancellation, empty and odd inputs, autocast, shared buffers.

That each path equals the definition is the contract suite's business (`contract/test_layers.py`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dovetail
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from tolerance import assert_near, difference, rounding

OPEN = ["lora(r=3)", "ia3 >> dora(r=3) >> ia3(side=in)", "vera(r=8) >> ia3", "nf4(block=32) >> lora(r=3) >> ia3"]
CLOSED = ["magnitude(0.5) >> lora(r=3) >> ia3 >> remask", "nf4(block=32) >> lora(r=3) >> regrid",
          "magnitude(0.5) >> int(group=16) >> dora(r=3) >> remask >> regrid"]  # fmt: skip
RECOMPUTED = ["loha(r=8)", "magnitude(0.5) >> lora(r=3) >> remask >> ia3"]
PATHS = [*OPEN, *CLOSED, *RECOMPUTED]
each_path = pytest.mark.parametrize("text", PATHS)


def layer_of(text: str, dtype: torch.dtype = torch.float64, kind: type = nn.Linear, out: int = 24) -> ChainLinear:
    """A layer 32 -> `out` under a chain, parameters away from where they start."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(out, 32) if kind is Conv1D else nn.Linear(32, out))
    nn.init.normal_(model[0].bias)
    dovetail.apply(model.to(dtype), text)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model[0]


def by_definition(layer: ChainLinear, x: Tensor) -> Tensor:
    weight, bias = layer.effective_weight()
    return nn.functional.linear(x, weight, bias)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---- which path


@pytest.mark.parametrize(("path", "texts"), [("open", OPEN), ("closed", CLOSED), ("recomputed", RECOMPUTED)])
def test_the_path_is_what_this_file_thinks(path: str, texts: list[str]) -> None:
    assert [layer_of(text).path for text in texts] == [path] * len(texts)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_loha_is_the_same_as_a_low_rank_and_recomputed(r: int) -> None:
    """Small ranks go as a Khatri-Rao low rank of r², large ones are recomputed; both are the definition."""
    layer, x = layer_of(f"loha(r={r}, alpha=3)"), torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    assert layer.path == ("open" if r <= 2 else "recomputed")
    outputs = layer(x), by_definition(layer, x)
    close(*outputs)
    wanted = [x, *layer.links.parameters()]
    for fast, slow in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in outputs), strict=True):
        close(fast, slow)


# ---- DoRA's norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("nearly", [0.0, 1e-3, 1e-6])
@pytest.mark.parametrize("base", ["", "nf4(block=32) >> "])
def test_dora_where_the_low_rank_cancels_the_weight(base: str, nearly: float, dtype: torch.dtype) -> None:
    """BA ≈ -W: the closed form of the norm cancels to noise or below zero; the layer must see that."""
    layer = layer_of(f"{base}dora(r=24)", dtype)
    (state,) = layer.states
    weight = layer.base.matrix().to(state.get_parameter("A").dtype)
    with torch.no_grad():
        state.get_parameter("B").copy_(torch.eye(24))
        state.get_parameter("A").copy_(-(1 - nearly) * weight)
        state.get_parameter("B")[5:] = 0  # rows that don't cancel
    x, before = torch.randn(6, 32).to(dtype), layer.base.matrix().clone()
    y = layer(x)
    assert torch.isfinite(y).all()
    assert torch.equal(layer.base.matrix(), before), "the frozen weight was written to"
    if nearly and (dtype == torch.float64 or (dtype == torch.float32 and nearly == 1e-3)):
        assert difference(y, by_definition(layer, x)) <= rounding(dtype, 32) / nearly
    assert_near(y[:, 5:], by_definition(layer, x)[:, 5:], terms=32, steps=6)


@pytest.mark.parametrize("base", ["", "magnitude(0.5) >> ", "nf4(block=32) >> "])
def test_rows_of_zeros_stay_zero_under_dora_and_give_no_nan(base: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    with torch.no_grad():
        model[0].weight[4:9] = 0
    dovetail.apply(model, f"{base}dora(r=3)")
    x = torch.randn(5, 32, requires_grad=True)
    y = model(x)
    assert_near(y[:, 4:9], model[0].bias[4:9].expand(5, 5), terms=32)
    y.square().sum().backward()
    for tensor in [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]:
        assert torch.isfinite(tensor).all()
    assert torch.isfinite(model[0].effective_weight()[0]).all()


def test_dropout_is_inside_dora_s_norm_also_where_it_cancels() -> None:
    layer = layer_of("lora(r=24, dropout=0.5) >> dora(r=2)").train()
    low, dora = layer.states
    with torch.no_grad():
        low.get_parameter("B").copy_(torch.eye(24))
        low.get_parameter("A").copy_(-(1 - 1e-4) * layer.base.matrix())
        dora.get_parameter("B").zero_()
    scale = layer.form().out_scale_o
    wanted = dora.get_parameter("magnitude") / (1e-4 * layer.base.matrix().norm(dim=1))
    torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=0)


# ---- inputs


@each_path
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 32), (2, 0, 32), (2, 3, 4, 32)], ids=str)
def test_inputs_of_any_number_of_axes_and_none_at_all(text: str, shape: tuple[int, ...], kind: type) -> None:
    layer, x = layer_of(text, kind=kind), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    close(y, by_definition(layer, x))
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in layer.links.parameters():
        assert torch.isfinite(parameter.grad).all()
        if x.numel() == 0 and layer.path != "recomputed":
            assert parameter.grad.abs().max() == 0


@each_path
def test_zeros_in_give_the_bias_out(text: str) -> None:
    layer = layer_of(text)
    x = torch.zeros(3, 32, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    close(y, by_definition(layer, x))
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.links.parameters())


@each_path
def test_inputs_and_gradients_that_are_not_contiguous(text: str) -> None:
    layer = layer_of(text)
    base = torch.randn(32, 5, 4, dtype=torch.float64)
    awkward, plain = base.permute(2, 1, 0).requires_grad_(), base.permute(2, 1, 0).contiguous().requires_grad_()
    weight = torch.randn(24, 5, 4, dtype=torch.float64)
    found = []
    for x, gradient in [(awkward, weight.permute(2, 1, 0)), (plain, weight.permute(2, 1, 0).contiguous())]:
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, [x, *layer.links.parameters()], gradient)])
    y = layer(plain)
    found.append([y, *torch.autograd.grad(y.sum(), [plain, *layer.links.parameters()])])  # an expanded gradient
    ones = torch.autograd.grad(layer(plain), [plain, *layer.links.parameters()], torch.ones_like(y))
    for one, two in zip(found[0], found[1], strict=True):
        close(one, two)
    for one, two in zip(found[2][1:], ones, strict=True):
        close(one, two)


def test_a_weight_of_inference_mode_is_used_outside_of_it() -> None:
    layer, x = layer_of("lora(r=2) >> loha(r=1)"), torch.randn(32, 5, 4, dtype=torch.float64).permute(2, 1, 0)
    with torch.inference_mode():
        weight = layer.base.matrix().clone()
    with torch.no_grad():
        wanted = layer.layout.call(x.contiguous(), weight, None)
        close(layer.layout.call(x, weight, None), wanted)
    with torch.inference_mode():
        close(layer.layout.call(x, weight, None), wanted)


@each_path
def test_an_input_that_takes_no_gradient_changes_no_other(text: str) -> None:
    layer, x = layer_of(text), torch.randn(4, 32, dtype=torch.float64)
    parameters = list(layer.links.parameters())
    without = torch.autograd.grad(layer(x).square().sum(), parameters)
    with_one = torch.autograd.grad(layer(x.clone().requires_grad_()).square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(without, with_one, strict=True))
    for parameter in parameters[:-1]:
        parameter.requires_grad_(False)
    (last,) = torch.autograd.grad(layer(x).square().sum(), parameters[-1:])
    close(last, without[-1])


@each_path
def test_the_result_may_be_changed_in_place(text: str) -> None:
    """A residual connection written `y += x` must not spoil the gradient."""
    layer, x = layer_of(text, out=32), torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for in_place in (False, True):
        y = layer(x)
        y = y.add_(x) if in_place else y + x
        found.append(torch.autograd.grad(y.square().sum(), [x, *layer.links.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- shared buffers


@each_path
def test_training_after_inference_mode(text: str) -> None:
    """Buffers and caches that were made in inference mode must not be inference tensors."""
    layer, other = layer_of(text, torch.float32), layer_of(text, torch.float32)
    x = torch.randn(4, 32)
    with torch.inference_mode():
        before = layer(x)
        layer.effective_weight()
        layer.frozen_weight()
    for one in (layer, other):
        one(x).square().sum().backward()
    assert torch.equal(before, other(x))
    for a, b in zip(layer.links.parameters(), other.links.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@each_path
def test_layers_share_buffers_and_do_not_mix(text: str) -> None:
    """Two layers of different shapes, run forward one after the other and backward in reverse."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 48)).double()
    dovetail.apply(model, text.replace("group=16", "group=8"))
    layers = list(chain_layers(model).values())
    assert len({id(layer.base.scratch) for layer in layers}) == 1
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    fast = torch.autograd.grad(model(x).square().sum(), wanted)
    y = x
    for module in model:
        y = by_definition(module, y) if isinstance(module, ChainLinear) else module(y)
    for one, two in zip(fast, torch.autograd.grad(y.square().sum(), wanted), strict=True):
        close(one, two, 1e-9)


@each_path
def test_a_layer_used_twice_before_backward(text: str) -> None:
    layer = layer_of(text, out=32)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.links.parameters()]
    fast = torch.autograd.grad(layer(torch.tanh(layer(x))).sum(), wanted)
    slow = torch.autograd.grad(by_definition(layer, torch.tanh(by_definition(layer, x))).sum(), wanted)
    for one, two in zip(fast, slow, strict=True):
        close(one, two)


# ---- dtypes


@each_path
def test_autocast(text: str) -> None:
    layer, x = layer_of(text, torch.float32), torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    wanted = by_definition(layer, x)
    assert (y.float() - wanted).norm() < 1e-2 * wanted.norm()
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.links.parameters())
    slow = torch.autograd.grad(wanted.square().sum(), list(layer.links.parameters()))
    for parameter, gradient in zip(layer.links.parameters(), slow, strict=True):
        assert (parameter.grad - gradient).norm() < 3e-2 * gradient.norm()


@each_path
def test_adapters_over_a_bfloat16_base_are_kept_and_learn_in_float32(text: str) -> None:
    layer, x = layer_of(text, torch.bfloat16), torch.randn(6, 32, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in layer.links.parameters())


def test_scales_near_one_keep_their_digits_in_bfloat16() -> None:
    """1.003 would round to 1: on average over outputs the scale must still be reached."""
    layer, x = layer_of("ia3", torch.bfloat16), torch.randn(2000, 32, dtype=torch.bfloat16)
    (scale,) = layer.links.parameters()
    outputs = []
    for value in (1.0, 1.003):
        nn.init.constant_(scale, value)
        outputs.append(layer(x).double())
    ratio = (outputs[1] * outputs[0]).sum() / (outputs[0] * outputs[0]).sum()
    assert float(ratio.detach()) == pytest.approx(1.003, abs=1e-3)


@each_path
def test_a_copy_computes_the_same_and_a_cast_nearly(text: str) -> None:
    layer, x = layer_of(text, torch.float32), torch.randn(5, 32)
    before = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), before)
    other.to(torch.float64)
    close(other(x.double()), by_definition(other, x.double()))
    if "regrid" not in text:  # a weight between two values of a grid is rounded to either
        assert_near(other(x.double()), before, terms=32, steps=3)
    other.to(torch.bfloat16)
    assert (other(x.bfloat16()).float() - before).norm() < 5e-2 * before.norm()


# ---- where a grid clips


@pytest.mark.parametrize("few", [0, 1 << 40], ids=["corrected", "gradient of the weight"])
@pytest.mark.parametrize("by", [0.0, 0.1, 1.0])
def test_gradients_with_clipped_weights_are_those_of_the_definition(by: float, few: int, monkeypatch) -> None:
    """Either the gradient of W' is masked, or a few weights are taken out of the gradients of a plain low rank."""
    monkeypatch.setattr("dovetail.chains.layer.execute._FEW", few)
    monkeypatch.setattr("dovetail.chains.layer.execute._CORRECTED", 20)
    layer = layer_of("int(bits=2, group=16) >> lora(r=3) >> regrid")
    with torch.no_grad():
        for parameter in layer.links.parameters():
            parameter.normal_(std=by**0.5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(7, 24, dtype=torch.float64)
    inputs = [x, *layer.links.parameters()]
    found = torch.autograd.grad(layer(x), inputs, wanted)
    for mine, defined in zip(found, torch.autograd.grad(by_definition(layer, x), inputs, wanted), strict=True):
        close(mine, defined)
