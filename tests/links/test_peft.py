"""Against peft in one run: the same parameters in, the same outputs and gradients out, in float64 to 1e-9.

peft's model and ours start from the same weights; peft's parameters are drawn at random and copied into ours under
the names of PARAMETERS. What peft calls otherwise is said there, and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dovetail
from dovetail.chains.layer.linear import chain_layers
from tolerance import assert_near

WIDTH, HIDDEN = 12, 20


class Model(nn.Module):
    """Two layers that differ in shape, with a non-linearity between."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.up_proj, self.down_proj = linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "no-bias": lambda i, o: nn.Linear(i, o, bias=False),
    "gpt2-conv1d": lambda i, o: Conv1D(o, i),
}

# Our name of a parameter -> peft's, and how a gradient or value of peft's is seen in our shape.
LORA = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
PARAMETERS: dict[str, dict[str, str]] = {
    "lora": LORA,
    "dora": LORA | {"magnitude": "lora_magnitude_vector.default.weight"},
    "ia3": {"out_scale": "ia3_l.default", "in_scale": "ia3_l.default"},
    "loha": {
        "B1": "hada_w1_a.default", "A1": "hada_w1_b.default", "B2": "hada_w2_a.default", "A2": "hada_w2_b.default"
    },
    "vera": {"b": "vera_lambda_b.default", "d": "vera_lambda_d.default"},
}  # fmt: skip
TARGETS = ["up_proj", "down_proj"]
CASES: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("lora(r=3, alpha=6)", peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)),
    "rslora": (
        "lora(r=3, alpha=6, scaling=rs)",
        peft.LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    ),
    "dora": ("dora(r=3, alpha=5)", peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TARGETS)),
    "ia3-attention": ("ia3(side=out)", peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])),
    "ia3-feed-forward": ("ia3", peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])),
    "loha": ("loha(r=2, alpha=3)", peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS)),
    "loha-recomputed": ("loha(r=6, alpha=3)", peft.LoHaConfig(r=6, alpha=3, target_modules=TARGETS)),
    "vera": ("vera(r=5, seed=7)", peft.VeraConfig(r=5, projection_prng_key=7, target_modules=TARGETS)),
}
ON_CONV1D = ("lora", "rslora", "dora", "ia3-attention", "ia3-feed-forward")
"""What peft can put on GPT-2's layers."""


def both(case: str, layer: str) -> tuple[nn.Module, nn.Module, dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """peft's model and ours with the same parameters, and those parameters: name -> (peft's, ours)."""
    text, config = CASES[case]
    torch.manual_seed(0)
    model = Model(LAYERS[layer])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    config = copy.deepcopy(config)
    config.fan_in_fan_out = layer == "gpt2-conv1d"
    theirs = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).double()
    ours = dovetail.apply(model.double(), text, targets=TARGETS)
    parameters = {}
    with torch.no_grad():
        for name, ours_layer in chain_layers(ours).items():
            their_layer = theirs.get_submodule(f"base_model.model.{name}")
            (state,) = ours_layer.states
            for key, value in state.named_parameters():
                other = their_layer.get_parameter(PARAMETERS[state.link.name][key])
                other += 0.2 * torch.randn_like(other)
                value.copy_(other.view(value.shape))
                parameters[f"{name}.{key}"] = other, value
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in ours.parameters() if p.requires_grad), "each trains the same numbers"
    return theirs, ours, parameters


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("case", "layer"), [(c, layer) for layer in LAYERS for c in (ON_CONV1D if layer == "gpt2-conv1d" else CASES)]
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_same_parameters_same_outputs_and_gradients(case: str, layer: str) -> None:
    """Also where there is a bias: IA3 scales it in both, for peft scales the layer's output."""
    theirs, ours, parameters = both(case, layer)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    weight = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    found = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        (y * weight).sum().backward()
        found[name] = y, inputs.grad
    close(found["ours"][0], found["theirs"][0])
    close(found["ours"][1], found["theirs"][1])
    for their_parameter, our_parameter in parameters.values():
        assert their_parameter.grad.abs().max() > 1e-6
        close(our_parameter.grad, their_parameter.grad.view(our_parameter.shape))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", ON_CONV1D)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_merged_weights_are_peft_s(case: str, layer: str) -> None:
    theirs, ours, _ = both(case, layer)
    if case == "dora":
        theirs.eval()
    merged = theirs.merge_and_unload()
    dovetail.merge(ours)
    for name in TARGETS:
        their_layer, our_layer = merged.get_submodule(name), ours.get_submodule(name)
        assert type(their_layer) is type(our_layer)
        close(our_layer.weight, their_layer.weight)
        if our_layer.bias is not None:
            close(our_layer.bias, their_layer.bias)


def test_vera_draws_the_same_projections_as_peft() -> None:
    """In peft's order and distribution, for the widest layer, of which narrower ones take leading slices."""
    theirs, ours, _ = both("vera", "linear")
    theirs = theirs.base_model
    for name, layer in chain_layers(ours).items():
        (state,) = layer.states
        values = state.values()
        assert values["A"].shape == (5, layer.in_features)
        close(values["A"], theirs.vera_A["default"][:, : layer.in_features])
        close(values["B"], theirs.vera_B["default"][: layer.out_features])
        assert not values["A"].requires_grad, name


@pytest.mark.parametrize(
    ("case", "text"), [("lora", "lora"), ("dora", "dora"), ("ia3-attention", "ia3"), ("vera", "vera(r=5)")]
)
def test_both_start_as_the_identity_and_train_what_peft_trains(case: str, text: str) -> None:
    """d of VeRA starts at 0.1 in both, and alpha is r where it isn't given (peft's default alpha is 8)."""
    torch.manual_seed(0)
    model = Model(nn.Linear)
    x = torch.randn(3, WIDTH)
    before = model(x)
    theirs = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(CASES[case][1]))
    ours = dovetail.apply(model, text, targets=TARGETS)
    assert_near(theirs(x), before, terms=WIDTH, steps=3)
    assert_near(ours(x), before, terms=WIDTH, steps=3)
    if case == "vera":
        d = {p[0].item() for name, p in theirs.named_parameters() if "lambda_d" in name}
        assert d == {p[0].item() for name, p in ours.named_parameters() if name.endswith(".d")}
