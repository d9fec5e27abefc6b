"""A figure of some layers says which share of the model they are.

Under any chain, before and after merging and in a plan, `target_fraction` times the model's weights is the number of
weights that bits per weight and the fraction of nonzero weights describe. The report in words names that share.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import dovetail
from dovetail.checkpoint.footprint import Footprint
from dovetail.display.format import percent
from dovetail.models.targets import all_layers, find_targets
from dovetail.runs.plan import plan
from dovetail.runs.report.summary import verdict
from families import batch, make, move

FAMILIES = ["llama", "gpt2", "mixtral", "t5", "bert"]
CHAINS = [
    "lora(r=4)",
    "magnitude(0.5) >> lora(r=4) >> remask",
    "int(bits=4, group=32) >> ia3 >> regrid",
    "magnitude(0.5) >> nf4 >> lora(r=4) >> remask >> regrid",
]
TARGETS: dict[str, Any] = {"all": "all-linear", "one": ["*.0.*"]}


def whole(model: nn.Module) -> int:
    """The weights of a stock model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def same(taken: Footprint, weights: int, total: int) -> bool:
    return taken.target_fraction is not None and round(taken.target_fraction * total) == weights


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("text", CHAINS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_share_is_that_of_the_weights_counted(family: str, text: str, targets: str) -> None:
    model, where = make(family), TARGETS[targets]
    names = [target.name for target in find_targets(model, where)]
    weights = sum(target.module.get_parameter("weight").numel() for target in find_targets(model, where))
    total, stock = whole(model), dovetail.footprint(model)
    assert same(stock, sum(t.module.get_parameter("weight").numel() for t in find_targets(model)), total)
    dovetail.apply(model, text, targets=where, calibration=[batch(model)])
    move(model)
    under = dovetail.footprint(model)
    assert same(under, weights, total)
    report = dovetail.merge(model)
    assert same(report.footprint, weights, total)
    merged = {layer.name: layer.module.get_parameter("weight") for layer in all_layers(model)}
    zeros = sum(int((merged[name] == 0).sum()) for name in names)
    assert round((1 - report.footprint.nonzero_fraction) * report.footprint.target_fraction * total) == zeros
    assert whole(model) == total
    told = verdict(report, lossy=False, quantized="regrid" in text)
    assert ("Zeros" in told) == (report.sparsity_before > 0.01)
    if "Zeros" in told:
        assert f"Zeros among the weights under the chain ({percent(weights / total)} of the model): " in told
    if targets == "all":
        kind = "classification" if family == "bert" else "generation"
        planned = plan(text, make(family).config, memory=False, task_kind=kind)
        assert planned.target_fraction == pytest.approx(weights / total)
        assert (planned.covered_fraction, planned.left_out) == (under.covered_fraction, under.left_out)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_covered_and_what_is_left_out_are_the_whole(family: str) -> None:
    model = make(family)
    total, stock = whole(model), dovetail.footprint(model)
    dovetail.apply(model, "int(bits=4, group=32) >> lora(r=4)")
    taken = dovetail.footprint(model)
    assert (taken.covered_fraction, taken.left_out) == (stock.covered_fraction, stock.left_out)
    assert round((1 - taken.covered_fraction) * total) == sum(taken.left_out.values())
    assert taken.covered_fraction >= taken.target_fraction
    embeddings = {module.weight for module in make(family).modules() if isinstance(module, nn.Embedding)}
    assert taken.left_out["embeddings"] == sum(weight.numel() for weight in embeddings)
    assert taken.left_out["norms"] > 0
    assert ("head" in taken.left_out) == (family in ("llama", "mixtral", "bert"))


@pytest.mark.parametrize("targets", ["all-linear", "self_attn.*"])
def test_experts_of_a_mixture_are_part_of_the_whole_reached_by_a_chain_or_not(targets: str) -> None:
    model = make("mixtral")
    dovetail.apply(model, "magnitude(0.5)", targets=targets)
    report = dovetail.merge(model)
    stock = zip(model.parameters(), make("mixtral").parameters(), strict=True)
    zeros = sum(int((p == 0).sum()) - int((q == 0).sum()) for p, q in stock)
    assert report.sparsity_after == 0.5
    assert report.footprint.target_fraction is not None
    assert zeros / whole(model) == pytest.approx(0.5 * report.footprint.target_fraction)
