"""Chains on the device are those of the CPU: every quantizer under adapters and constraints, on one layer.

In float64, in which no code depends on the order of a sum, values and gradients are those of the CPU's definition. In
float32 and bfloat16, open chains run as their definition on the device itself, and closed ones are merged with the bits
that they ran with. Kernels take part, where there are some.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import dovetail
from accelerators import DEVICE
from dovetail.links.quantize import accelerate
from samples import (
    GRID_CONSTRAINTS,
    IN,
    MIXTURES,
    PRUNABLE,
    QUANTIZERS,
    One,
    by_definition,
    chained,
    input_of,
    model_of,
)
from tolerance import difference, rounding

ADAPTERS = ["lora(r=3)", "dora(r=3, alpha=6)", "ia3", "loha(r=5)", "vera(r=16)", MIXTURES[2]]
PLAIN = [text for text in QUANTIZERS if not text.startswith(("gptq", "hqq")) and "double" not in text]
"""Quantizers whose grid no sum goes into."""

each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


@pytest.fixture(autouse=True)
def _kernels_take_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "SMALLEST", 0)


def chains_over(quantizer: str) -> list[str]:
    """Chains over a quantizer: open, closed, and closed over a pruned base where its grid has a zero."""
    texts = [f"{quantizer} >> {adapter} >> {end}" for adapter, end in itertools.product(ADAPTERS, GRID_CONSTRAINTS)]
    texts += [f"{quantizer} >> {adapter}" for adapter in ADAPTERS]
    if quantizer in PRUNABLE:
        ends = (f"remask >> {end}" for end in GRID_CONSTRAINTS)
        texts += [
            f"wanda(0.5) >> {quantizer} >> {adapter} >> {end}" for adapter, end in zip(ADAPTERS, itertools.cycle(ends))
        ]
    return texts


def on_device(model: One) -> One:
    return copy.deepcopy(model).to(DEVICE)


def answers(model: One, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every trained parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
    named = {"x": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y * weight).sum(), list(named.values()))
    return {"y": y.detach(), **dict(zip(named, gradients, strict=True))}


@each_quantizer
def test_values_and_gradients_are_those_of_the_cpu(quantizer: str) -> None:
    for text in chains_over(quantizer):
        model, x = chained(text, dtype=torch.float64), input_of(dtype=torch.float64)
        found, wanted = answers(on_device(model), x.to(DEVICE)), answers(model, x)
        assert all(each.device.type == DEVICE.type for each in found.values())
        assert difference(found["y"].cpu(), by_definition(model.layer, x)) <= 1e-10, text
        for name, each in wanted.items():
            if name.endswith(("A", "B")) or each.abs().max() > 0:
                assert difference(found[name].cpu(), each) <= 1e-9, (text, name)


@each_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_fast_path_is_the_definition_on_the_device(quantizer: str, dtype: torch.dtype) -> None:
    """Of open chains: one rounded otherwise, a weight of a closed chain may have a neighbouring code."""
    for text in (f"{quantizer} >> {adapter}" for adapter in ADAPTERS):
        model, x = on_device(chained(text, dtype=dtype)), input_of(dtype=dtype).to(DEVICE)
        with torch.no_grad():
            wanted = by_definition(model.layer, x)
            assert difference(model(x), wanted) <= rounding(dtype, IN, steps=6), text


@each_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_merge_is_exact_and_says_so(quantizer: str, dtype: torch.dtype) -> None:
    for text in chains_over(quantizer)[:: 1 if dtype == torch.float32 else 3]:
        if not text.endswith((*GRID_CONSTRAINTS,)):
            continue
        model, x = on_device(chained(text, dtype=dtype)), input_of(dtype=dtype).to(DEVICE)
        with torch.no_grad():
            before = model(x)
            report = dovetail.merge(model)
            assert torch.equal(model(x), before), text
        assert report.exact
        assert report.off_grid == 0
        assert model.layer.weight.device.type == DEVICE.type
        if "wanda" in text:
            assert report.sparsity_after >= report.sparsity_before >= 0.5


@pytest.mark.parametrize("quantizer", PLAIN)
def test_the_device_chooses_the_codes_of_the_cpu(quantizer: str) -> None:
    """Their scales are one maximum or minimum each, a division and a rounding, which IEEE 754 rounds alike."""
    found, wanted = model_of().to(DEVICE), model_of()
    for model in (found, wanted):
        dovetail.apply(model, quantizer, targets="layer")
    state = wanted.layer.base.quantized.state_dict()
    for name, each in found.layer.base.quantized.state_dict().items():
        assert torch.equal(each.cpu().view(-1).view(torch.uint8), state[name].view(-1).view(torch.uint8)), name
