"""Putting a chain on a model, and going from stage to stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import ChainError, DataError, HistoryWarning
from families import batch, logits, make
from tolerance import assert_near


def test_a_stage_whose_calibration_fails_is_not_begun_and_can_be_begun_again(tmp_path: Path) -> None:
    text = "lora(r=4) >> wanda(0.5) >> nf4 >> lora(r=4) >> remask >> regrid"
    model, other = make("llama").eval(), make("llama").eval()
    inputs = batch(model)
    for one in (model, other):
        dovetail.apply(one, text)
    with pytest.raises(ValueError, match="input_ids"):
        dovetail.advance(model, calibration=[{"nonsense": torch.zeros(1)}])
    assert applied(model).stages_left == 1
    with pytest.raises(ChainError, match="not yet run"):
        dovetail.merge(model, lossy=True)
    with pytest.raises(ChainError, match="merged, and the next one not begun"):
        dovetail.save_adapter(model, tmp_path)
    dovetail.advance(model, calibration=[inputs])
    dovetail.advance(other, calibration=[inputs])
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_dora_behind_regrid_starts_at_the_quantized_weights() -> None:
    model = make("llama")
    dovetail.apply(model, "nf4 >> lora(r=4) >> regrid >> dora(r=4)")
    for layer in chain_layers(model).values():
        assert_near(layer.effective_weight()[0], layer.base.matrix(), terms=layer.in_features)


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


def test_a_merged_quantized_model_is_not_quantized_again() -> None:
    model = make("llama")
    dovetail.merge(dovetail.apply(model, "nf4 >> lora(r=4) >> regrid"))
    with pytest.raises(ChainError, match="at most once"):
        dovetail.apply(model, "int(bits=4, group=32) >> lora(r=4)")
    with pytest.warns(HistoryWarning, match=r"gives up its quantization grid, nf4.* use lora\(r=4\) >> regrid"):
        dovetail.apply(model, "lora(r=4)")  # adapters it takes


@pytest.mark.parametrize("said", ["nf4", ["nf4"], {"chain": 4}, {"quantizer": "nf4"}])
def test_a_config_whose_dovetail_is_someone_elses_says_nothing(said: Any) -> None:
    model: Any = make("llama")
    model.config.dovetail = said
    dovetail.apply(model, "nf4")


def test_what_fails_half_way_leaves_a_model_that_says_so() -> None:
    model = make("llama").eval()
    good, bad = batch(model), batch(model, seed=1)

    def poison(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if torch.equal(args[0], bad["input_ids"]) else output

    handle = model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj"):
        dovetail.apply(model, "wanda(0.5)", calibration=[bad])
    assert not chain_layers(model)  # the first batch is looked at before anything is changed
    handle.remove()

    def late(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if len(seen) > 0 else seen.append(1) or output

    seen: list[int] = []
    model.get_submodule("model.layers.0").register_forward_hook(late)
    with pytest.raises(DataError, match=r"layers\.1"):
        dovetail.apply(model, "wanda(0.5)", calibration=[good])
    with pytest.raises(ChainError, match="load the model again"):
        dovetail.merge(model)


IDS = torch.arange(3, 19).view(2, 8)


@pytest.mark.parametrize(
    ("calibration", "found"),
    [
        ({"input_ids": IDS}, "a dict"),
        (IDS, "a Tensor"),
        ([IDS], "a Tensor"),
        ("some text", "a str"),
        (["some text"], "a str"),
        ([{"input_ids": [[3, 4, 5]]}], "a list"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(1, 8)}], r"\[1, 8\] beside input_ids of \[2, 8\]"),
    ],
)
def test_what_is_no_calibration_data_is_refused_before_anything_is_changed(calibration: Any, found: str) -> None:
    model = make("llama")
    with pytest.raises(DataError, match=found):
        dovetail.apply(model, "wanda(0.5)", calibration=calibration)
    assert not chain_layers(model)


def test_calibration_inputs_are_one_of_two() -> None:
    wrong: Any = "orginal"
    with pytest.raises(ChainError, match="compressed or original"):
        dovetail.apply(make("llama"), "magnitude(0.5)", calibration_inputs=wrong)
