"""Training presets: the numbers of the papers, under the keys beside them; and optimizers of bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

import families
from dovetail.compression.apply import apply
from dovetail.errors import RecipeError, TrainError
from dovetail.runs.recipe import Recipe
from dovetail.training.optimizer import learning_rates, make_optimizer
from dovetail.training.presets import TRAINING_PRESETS
from dovetail.training.settings import Training, TrainSettings
from small_models import SUMS, llama, parameters, quiet, same

torch.set_num_threads(1)


@pytest.mark.parametrize("name", TRAINING_PRESETS)
def test_a_preset_is_the_settings_that_it_states(name: str) -> None:
    stated = TRAINING_PRESETS[name]
    assert Training(preset=name).model_dump() == {**Training().model_dump(), **stated, "preset": name}


def test_the_numbers_of_the_papers() -> None:
    study, clam, adaptor = (TrainSettings(preset=name) for name in ("study/hh-rlhf", "clam", "qr-adaptor"))
    assert (study.batch_size, study.max_steps, study.max_length, study.schedule) == (16, 3000, 768, "constant")
    assert study.weight_decay == 0.001
    assert (clam.batch_size, clam.epochs, clam.weight_decay, clam.max_grad_norm) == (32, 10, 0.06, 1)
    assert adaptor.batch_size * adaptor.gradient_accumulation == 128
    assert learning_rates(apply(llama(), "lora(r=4)"), adaptor) == {"lora(r=4)": 3e-4}
    assert learning_rates(apply(llama(), "lora(r=4)"), clam) == {"lora(r=4)": 4e-4}


def test_keys_of_the_recipe_take_precedence(tmp_path: Path) -> None:
    recipe = {"model": "playground", "chain": "lora(r=4)", "data": "sums"}
    found = Recipe.parse(recipe | {"train": {"preset": "clam", "epochs": 1}})
    assert (found.train.epochs, found.train.weight_decay) == (1, 0.06)
    found.dump(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").train == found.train
    with pytest.raises(RecipeError, match="the preset must be one of study/unnatural"):
        Recipe.parse(recipe | {"train": {"preset": "clamm"}})


def test_adamw_in_8_bits_trains_and_resumes(tmp_path: Path) -> None:
    def made() -> Any:
        return apply(
            families.make("llama"), "lora(r=64)", targets=["up", "down"]
        )  # matrices of 4096 values or more have a state of 8 bits

    settings: dict[str, Any] = {"max_steps": 4, "checkpoint_every": 2, "optimizer": "adamw_8bit"}
    assert isinstance(make_optimizer(made(), TrainSettings(**settings)), bitsandbytes.optim.AdamW8bit)
    whole, killed, plain = made(), made(), made()
    report = quiet(whole, SUMS, **settings)
    exact = quiet(plain, SUMS, max_steps=4)
    for (_, loss), (_, of_32_bits) in zip(report.stages[0].losses, exact.stages[0].losses, strict=True):
        assert loss == pytest.approx(of_32_bits, abs=0.02)
    assert not same(parameters(whole), parameters(plain))
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(whole)[name], value, atol=5e-3, rtol=0)
    quiet(killed, SUMS, output_dir=tmp_path / "run", stop_after=2, **settings)
    resumed = made()
    quiet(resumed, SUMS, output_dir=tmp_path / "run", resume=True, **settings)
    assert same(parameters(resumed), parameters(whole))


def test_optimizers_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainError, match="no CUDA GPU"):
        quiet(llama(), SUMS, optimizer="paged_adamw")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "dovetail.training.settings.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(TrainError, match="the package bitsandbytes is not installed"):
        quiet(llama(), SUMS, optimizer="adamw_8bit")
    with pytest.raises(TrainError, match="optimizer"):
        quiet(llama(), SUMS, optimizer="sgd")
