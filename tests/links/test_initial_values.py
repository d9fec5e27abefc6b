"""What adapters start from and learn at: the published numbers, against peft and torch rather than ourselves."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn

from dovetail import chain
from dovetail.chains.link import Adapter, Site
from dovetail.chains.registry import links

SITE = Site("layer", out_features=300, in_features=400, has_bias=True)


def initial(text: str) -> dict[str, torch.Tensor]:
    (link,) = chain(text)
    return link.init(SITE, torch.randn(300, 400), torch.Generator().manual_seed(0))


def of_peft(config: peft.PeftConfig, name: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(400, 300)), config)
    return next(p for key, p in model.named_parameters() if name in key).detach()


@pytest.mark.parametrize("text", ["lora(r=16)", "dora(r=16)", "bottleneck(r=16)"])
def test_a_is_kaiming_uniform_with_gain_of_a_linear_layer(text: str) -> None:
    """Uniform in ±1/√in: a = √5 gives the gain √(1/3)."""
    values = initial(text)
    a = values["A"] if "A" in values else values["down"]
    bound = 1 / math.sqrt(a.shape[1])
    assert 0.999 * bound < a.abs().max() <= bound
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(a, nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=generator))


def test_lora_a_has_the_bound_of_peft() -> None:
    theirs = of_peft(peft.LoraConfig(r=16, target_modules=["0"]), "lora_A")
    ours = initial("lora(r=16)")["A"]
    assert theirs.shape == ours.shape
    assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=1e-3)
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.03)  # 6,400 draws: 4 standard errors


def test_loha_starts_from_normal_factors_of_deviations_01_1_1_and_0() -> None:
    """The deviations of LyCORIS, the published implementation; peft draws Kaiming-uniform factors instead."""
    values = initial("loha(r=16)")
    for name, wanted in {"B1": 0.1, "A1": 1.0, "A2": 1.0, "B2": 0.0}.items():
        assert float(values[name].std()) == pytest.approx(wanted, rel=0.05), name
        assert float(values[name].mean()) == pytest.approx(0, abs=0.05 * wanted), name


def test_default_learning_rates_are_those_of_the_papers() -> None:
    """CLAM, table 4; DoRA learns as LoRA. The others are our own choice."""
    wanted = {
        "adalora": 1e-3, "scales": 1e-2, "lora": 4e-4, "dora": 4e-4, "ia3": 1e-2, "loha": 4e-3, "vera": 1e-1,
        "bottleneck": 1e-3,
    }  # fmt: skip
    assert {name: cls.learning_rate for name, cls in links().items() if issubclass(cls, Adapter)} == wanted
