"""Putting a chain on a model, and going from stage to stage."""

from __future__ import annotations

import pytest
import torch

import dovetail
from dovetail.apply import chain_layers, stages_left
from dovetail.errors import ChainError, DataError
from families import batch, logits, make


def test_a_stage_whose_calibration_fails_is_not_begun_and_can_be_begun_again() -> None:
    text = "lora(r=4) >> wanda(0.5) >> nf4 >> lora(r=4) >> remask >> regrid"
    model, other = make("llama").eval(), make("llama").eval()
    inputs = batch(model)
    for one in (model, other):
        dovetail.apply(one, text)
    with pytest.raises(ValueError, match="input_ids"):
        dovetail.advance(model, calibration=[{"nonsense": torch.zeros(1)}])
    assert stages_left(model) == 1
    with pytest.raises(ChainError, match="not yet run"):
        dovetail.merge(model, lossy=True)
    dovetail.advance(model, calibration=[inputs])
    dovetail.advance(other, calibration=[inputs])
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_dora_behind_regrid_starts_at_the_quantized_weights() -> None:
    model = make("llama")
    dovetail.apply(model, "nf4 >> lora(r=4) >> regrid >> dora(r=4)")
    for layer in chain_layers(model).values():
        assert torch.allclose(layer.effective_weight()[0], layer.base.matrix(), rtol=1e-5, atol=0)


class OneIdle(torch.nn.Module):
    """Two layers of which one is never called, as an expert that no token is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_layer_that_calibration_does_not_reach_is_named() -> None:
    model = OneIdle()
    with pytest.raises(DataError, match="idle"):
        dovetail.apply(model, "wanda(0.5)", calibration=[{"x": torch.randn(4, 8)}])
    assert not chain_layers(model)
    dovetail.apply(model, "wanda(0.5)", calibration=[{"x": torch.randn(4, 8)}], targets="used")


@pytest.mark.parametrize(
    "text", ["vera(seed=99999999999999999999)", "vera(r=99999999999)", "bottleneck(r=99999999999)"]
)
def test_sizes_that_no_layer_has_are_refused_before_they_are_made(text: str) -> None:
    with pytest.raises(ChainError):
        dovetail.chain(text)
