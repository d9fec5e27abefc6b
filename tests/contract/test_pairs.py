"""Every ordered pair of links: legal ones apply, run, learn and merge; illegal ones are refused by name.

Legality is written down here a second time, from DESIGN.md §1 and CLAM §3.1, not asked of `chain/check.py`.
"""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

import dovetail
from dovetail.chains.layer.applied import applied
from dovetail.chains.link import Adapter, Constraint, Link, OutputAdapter, Pruner, Quantizer
from dovetail.chains.registry import links
from dovetail.errors import CannotMerge, ChainError
from samples import (
    ADAPTERS,
    GRID_ADAPTERS,
    IN,
    KEPT,
    PRUNABLE,
    PRUNERS,
    QUANTIZERS,
    SAMPLES,
    chained,
    input_of,
    model_of,
)
from tolerance import assert_near

KINDS: dict[str, type[Link]] = {
    "prune": Pruner, "quantize": Quantizer, "adapt": Adapter, "output": OutputAdapter, "close": Constraint
}  # fmt: skip

# First link's kind -> kinds that may follow it. A constraint needs what it restores, so it never comes first.
MAY_FOLLOW = {
    "prune": {"prune", "quantize", "adapt", "output", "remask"},
    "quantize": {"prune", "adapt", "output", "regrid", "move"},  # never a second quantizer
    "adapt": {"prune", "quantize", "adapt", "output"},
    "output": {"output"},  # no weight to go on with
    "remask": set(),
    "regrid": set(),
    "move": set(),  # needs a grid, so it never comes first
}
KEEPS_ZEROS = {"ia3"}
"""Adapters after which a zero still is a zero. None stays on a grid."""

ONE_OF_EACH = [texts[0] for texts in SAMPLES.values()]
PAIRS = list(product(ONE_OF_EACH, repeat=2))


def name_of(text: str) -> str:
    return text.split("(")[0]


def kind_of(text: str) -> str:
    cls = links()[name_of(text)]
    kind = [kind for kind, base in KINDS.items() if issubclass(cls, base)][-1]
    if text in GRID_ADAPTERS:
        return "move"
    return {"zeros": "remask", "grid": "regrid"}[cls.restores] if kind == "close" else kind


def legal(first: str, second: str) -> bool:
    kinds = kind_of(first), kind_of(second)
    if {first, second} & set(KEPT):
        return False
    if "prune" in kinds and {first, second} & set(QUANTIZERS) - set(PRUNABLE):
        return False
    if kinds[1] == "move" and name_of(first) in ("mxfp4", "nvfp4"):
        return False
    return kinds[0] not in ("remask", "regrid") and kinds[1] in MAY_FOLLOW[kinds[0]]


def to_add(*links: str) -> list[str]:
    """Constraints that a chain of at most one stage must end in to merge without loss."""
    seen, lost = set(), []
    for link in links:
        kind = kind_of(link)
        if kind == "adapt" and "prune" in seen and name_of(link) not in KEEPS_ZEROS:
            lost.append("remask")
        if kind == "adapt" and "quantize" in seen:
            lost.append("regrid")
        seen.add(kind)
    return [constraint for constraint in ("remask", "regrid") if constraint in lost]


def run(text: str) -> torch.nn.Module:
    """Applies a chain, walks to its last stage, and takes a gradient step of each."""
    model, x = chained(text), input_of()
    while True:
        trained = [p for p in model.parameters() if p.requires_grad]
        y = model(x)
        if trained:
            (y - 1).square().mean().backward()
            assert all(torch.isfinite(p.grad).all() for p in trained)
            torch.optim.SGD(trained, lr=0.05).step()
        if not applied(model).stages_left:
            return model
        dovetail.advance(model, calibration=[{"x": x}])


def test_the_table_knows_every_kind() -> None:
    assert {kind_of(text) for text in ONE_OF_EACH} <= set(MAY_FOLLOW)


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if not legal(*pair)])
def test_an_illegal_pair_is_refused_by_name(first: str, second: str) -> None:
    model = model_of()
    layer = model.layer
    with pytest.raises(ChainError) as caught:
        dovetail.apply(model, f"{first} >> {second}", targets="layer", calibration=[{"x": input_of()}])
    alone = kind_of(first) in ("remask", "regrid", "move") or first in KEPT
    place, wrong = (1, first) if alone else (2, second)
    assert caught.value.where.startswith(f"{name_of(wrong)}, link {place} of ")
    assert caught.value.found
    assert caught.value.rule
    assert caught.value.fix
    assert model.layer is layer


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if legal(*pair)])
def test_a_legal_pair_runs_and_merges_or_names_what_is_missing(first: str, second: str) -> None:
    model, x = run(f"{first} >> {second}"), input_of()
    before = model(x)
    if "output" in (kind_of(first), kind_of(second)):
        with pytest.raises(CannotMerge, match="bottleneck"):
            dovetail.merge(model)
        with pytest.raises(CannotMerge, match="bottleneck"):
            dovetail.merge(model, lossy=True)
        assert torch.equal(model(x), before)
        return
    missing = to_add(first, second)
    if not missing:
        report = dovetail.merge(model)
        assert report.exact
        assert_near(model(x), before, terms=IN, steps=2)
        return
    with pytest.raises(CannotMerge) as caught:
        dovetail.merge(model)
    assert re.findall("remask|regrid", caught.value.fix.split(";")[0].split(">>", 2)[2]) == missing
    assert torch.equal(model(x), before)
    assert_adding_closes(f"{first} >> {second}", missing)


def assert_adding_closes(text: str, missing: list[str]) -> None:
    model, x = run(" >> ".join([text, *missing])), input_of()
    before = model(x)
    report = dovetail.merge(model)
    assert report.exact
    assert report.off_grid == 0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("quantizer", PRUNABLE[::3])
@pytest.mark.parametrize("pruner", PRUNERS[::3])
def test_pruned_and_quantized_needs_both_closers(pruner: str, quantizer: str) -> None:
    for adapter in [text for text in ADAPTERS if kind_of(text) == "adapt"]:
        text = f"{pruner} >> {quantizer} >> {adapter}"
        with pytest.raises(CannotMerge) as caught:
            dovetail.merge(run(text))
        missing = to_add(pruner, quantizer, adapter)
        assert caught.value.fix.startswith(f"train with {' >> '.join(missing)} at the end")
        assert_adding_closes(text, missing)


# A stage merges into the base before the next pruner or quantizer: it must be closed like the last one.
@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("wanda(0.5) >> lora(r=3) >> nf4(block=32) >> lora(r=3) >> remask >> regrid", "remask"),
        ("nf4(block=32) >> lora(r=3) >> wanda(0.5) >> ia3 >> regrid", "regrid"),
        ("wanda(0.5) >> nf4(block=32) >> dora(r=3) >> magnitude(0.6)", "remask >> regrid"),
        ("magnitude(0.2) >> nf4(block=32) >> ia3 >> magnitude(0.6)", "regrid"),
    ],
)
def test_an_inner_stage_that_loses_something_is_refused(text: str, missing: str) -> None:
    with pytest.raises(ChainError) as caught:
        chained(text)
    assert caught.value.where.startswith("stage 1 of 2")
    assert caught.value.fix.startswith(f"add {missing} at the end of the stage")


MULTI_STAGE = [
    "lora(r=3) >> wanda(0.5) >> nf4(block=32) >> lora(r=3) >> remask >> regrid",
    "magnitude(0.3) >> lora(r=3) >> remask >> wanda(0.5) >> dora(r=3) >> remask",
    "wanda(0.5) >> ia3 >> int(bits=4, group=8) >> lora(r=3) >> remask >> regrid",
    "nf4(block=32) >> lora(r=3) >> regrid >> magnitude(0.5) >> lora(r=3) >> remask >> regrid(start=codes)",
    "wanda(0.3) >> lora(r=3) >> remask >> fp8 >> lora(r=3) >> remask >> regrid >> magnitude(0.6) >> ia3 >> regrid",
]


@pytest.mark.parametrize("text", MULTI_STAGE)
def test_stages_run_one_after_the_other(text: str) -> None:
    model, x = chained(text), input_of()
    sparsity, number = 0.0, applied(model).stages_left
    assert number == text.count(">> wanda") + text.count(">> magnitude") + text.count("3) >> nf4") + (
        text.count("ia3 >> int") + text.count("remask >> fp8")
    )
    for remaining in reversed(range(number)):
        with pytest.raises(ChainError, match=f"{remaining + 1} stage"):
            dovetail.merge(model)
        (model(x) - 1).square().mean().backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02).step()
        dovetail.advance(model, calibration=[{"x": x}])
        now = float((model.layer.base.matrix() == 0).double().mean())
        assert now >= sparsity, "a stage lost zeros of the one before"
        sparsity = now
        assert applied(model).stages_left == remaining
        assert all(p.requires_grad == ("links" in name) for name, p in model.named_parameters())
    with pytest.raises(ChainError, match="must have another stage"):
        dovetail.advance(model)
    (model(x) - 1).square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02).step()
    before = model(x)
    report = dovetail.merge(model)
    assert torch.equal(model(x), before)
    assert report.exact
    assert report.off_grid == 0
    assert report.sparsity_after >= sparsity
    assert sparsity >= 0.5


def test_a_stage_in_between_computes_what_the_stage_before_ended_with() -> None:
    """Exactly where it's closed; to rounding where it's open and nothing is applied that changes the weight."""
    model, x = chained("lora(r=3) >> magnitude(0.0) >> lora(r=3) >> remask", dtype=torch.float64), input_of()
    x = x.double()
    before = model(x)
    dovetail.advance(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    model = chained("nf4(block=32) >> lora(r=3) >> regrid >> magnitude(0.0) >> lora(r=3) >> remask >> regrid")
    x = input_of()
    before = model(x)
    dovetail.advance(model)
    assert torch.equal(model(x), before)
