"""Putting a chain on a model, and going from stage to stage."""

from __future__ import annotations

import pytest
import torch

import dovetail
from dovetail.apply import chain_layers, stages_left
from dovetail.errors import ChainError
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
