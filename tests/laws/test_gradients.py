"""Every trained parameter can move: those without a gradient in the first steps are named in the report and a note."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dovetail
from dovetail.tasks.task import Task
from families import CONFIGS, ENCODERS, make
from small_models import make_tokenizer, sum_records

RECORDS = sum_records(8)
ADAPTERS = ["lora(r=2)", "ia3", "vera(r=2)", "dora(r=2)", "loha(r=2)", "magnitude(0.5) >> lora(r=2) >> remask"]


def task_of(name: str) -> Task:
    if name in ENCODERS:
        records = [{"text": r["prompt"], "label": at % 2} for at, r in enumerate(RECORDS)]
        return Task("t", "classification", "accuracy", {"train": records})
    return Task("t", "generation", "exact_match", {"train": RECORDS})


def trained(model: nn.Module, name: str, steps: int = 3, **settings: Any) -> list[str]:
    report = dovetail.train(model, make_tokenizer(), task_of(name), batch_size=4, max_steps=steps, **settings)
    return report.stages[-1].without_gradient


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        *(("llama", chain) for chain in ADAPTERS),
        *((name, chain) for name in ("gpt2", "t5", "bert", "opt") for chain in ("lora(r=2)", "ia3")),
    ],
)
def test_nothing_is_named_where_all_can_move(name: str, chain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained(dovetail.apply(make(name), chain), name, warmup=0.3) == []
    assert "no gradient" not in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3", "bert"])
def test_a_layer_that_the_loss_does_not_reach_is_named(
    name: str, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dovetail.apply(make(name), "lora(r=2)")
    name_of = [path for path, p in model.named_parameters() if p.requires_grad and ".links." in path]
    dead = name_of[0].split(".links.")[0]
    model.get_submodule(dead).register_forward_hook(lambda module, args, output: output.detach() * 0)
    # In the first layer nothing else is cut off: what is before it is frozen.
    found = trained(model, name, steps)
    assert {path for path in name_of if path.startswith(f"{dead}.")} <= set(found)
    assert all(path.startswith(dead) or ".query." in path or ".key." in path or "_proj" in path for path in found)
    assert f"first of them {found[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 3])
def test_parameters_outside_the_forward_pass_are_named(steps: int) -> None:
    model = make("llama")
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    assert trained(model, "llama", steps) == ["unused"]


def test_it_is_quiet_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = make("llama")
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    assert trained(model, "llama", progress=False) == ["unused"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("chain", "bias"),
    [
        *((chain, True) for chain in ADAPTERS),
        ("lora(r=2)", False),
        ("int(bits=4, group=32) >> lora(r=2) >> regrid", False),
        ("magnitude(0.5) >> loha(r=2) >> remask", True),
    ],
)
def test_a_model_that_adds_to_the_output_of_a_layer_in_place_trains(bias: bool, chain: str) -> None:
    """Falcon adds its attention to the output of its feed-forward layers, in place."""
    config = CONFIGS["falcon"]()
    config.bias = bias
    model = dovetail.apply(AutoModelForCausalLM.from_config(config), chain)
    assert trained(model, "falcon", warmup=0.3) == []
