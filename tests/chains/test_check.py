"""Refusals before anything runs: messages say where, what was found, the rule and the fix; the model is as it was.

Which pairs are legal is the contract suite's business (`contract/test_pairs.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import dovetail
from dovetail.chains import registry
from dovetail.chains.check import check, check_merge
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.notation import chain
from dovetail.chains.registry import links
from dovetail.chains.stages import stages
from dovetail.errors import CannotMerge, ChainError, DataError, DovetailError, TargetError
from dovetail.links.quantize.integer import Int
from families import batch, make

# Chain -> where, found, rule, fix: words of each.
ILLEGAL = {
    "nf4 >> int(bits=4)": ("int, link 2 of nf4 >> int", "int after nf4", "at most one quantizer", "remove nf4 or int"),
    "nf4 >> lora >> regrid >> fp8": ("fp8, link 4", "fp8 after nf4", "at most one quantizer", "remove"),
    "lora >> remask": ("remask, link 2", "no pruner before it", "mask of a pruner", "put wanda(0.5) or magnitude(0.5)"),
    "remask >> wanda(0.5)": ("remask, link 1", "no pruner", "mask", "remove remask"),
    "wanda(0.5) >> lora >> regrid": ("regrid, link 3", "no quantizer", "grid of a quantizer", "put nf4 or int(bits=4)"),
    "bottleneck >> lora": ("lora, link 2", "lora after bottleneck", "function of the layer", "put bottleneck last"),
    "wanda(0.5) >> bottleneck >> remask": ("remask, link 3", "remask after bottleneck", "come before", "bottleneck"),
    "bottleneck >> nf4": ("nf4, link 2", "nf4 after bottleneck", "function of the layer", "put bottleneck last"),
    "wanda(0.5) >> lora(dropout=0.1) >> remask": ("lora in stage 1", "dropout=0.1", "remask projects", "dropout=0 in"),
    "nf4 >> vera(dropout=0.2) >> regrid": ("vera in stage 1", "dropout=0.2", "regrid projects", "dropout=0 in vera"),
    "wanda(0.5) >> lora >> nf4": ("stage 1 of 2", "lora does not", "before nf4 is applied", "add remask at the end"),
    "nf4 >> ia3 >> wanda(0.5)": ("stage 1 of 2", "ia3 does not keep the base's grid", "without loss", "add regrid"),
    "wanda(0.5) >> nf4 >> lora >> wanda(0.6)": ("stage 1 of 2", "zeros", "without loss", "add remask >> regrid"),
}  # fmt: skip


@pytest.mark.parametrize("text", ILLEGAL)
def test_an_illegal_chain_says_where_what_why_and_how_to_mend_it(text: str) -> None:
    with pytest.raises(ChainError) as caught:
        check(chain(text))
    error = caught.value
    for part, wanted in zip((error.where, error.found, error.rule, error.fix), ILLEGAL[text], strict=True):
        assert wanted in part
    assert re.fullmatch(r"[^\n]+\n  found: .+\n  rule:  .+\n  fix:   .+", str(error))


@pytest.mark.parametrize("text", [t for t in ILLEGAL if "add " in ILLEGAL[t][3]])
def test_the_fix_for_an_inner_stage_mends_it(text: str) -> None:
    with pytest.raises(ChainError) as caught:
        check(chain(text))
    stage, fixed = re.search(r"^(.*)$", caught.value.where.split(": ", 1)[1])[1], caught.value.fix.split(": ")[1]
    mended = str(chain(text)).replace(stage, fixed)
    assert mended != str(chain(text))
    check(chain(mended))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora", ["lora(r=8)"]),
        ("wanda(0.5)", ["wanda(0.5)"]),
        ("wanda(0.5) >> nf4", ["wanda(0.5) >> nf4"]),
        ("lora >> ia3 >> nf4", ["lora(r=8) >> ia3", "nf4"]),
        ("nf4 >> lora >> regrid >> wanda(0.5) >> magnitude(0.6) >> ia3 >> regrid",
         ["nf4 >> lora(r=8) >> regrid", "wanda(0.5) >> magnitude(0.6) >> ia3 >> regrid"]),
    ],
)  # fmt: skip
def test_stages(text: str, parts: list[str]) -> None:
    found = stages(chain(text))
    assert [str(stage) for stage in found] == parts
    assert sum((stage.applied + stage.trained for stage in found), ()) == chain(text).links
    assert all(not link.differentiable for stage in found for link in stage.applied)
    assert all(link.differentiable for stage in found for link in stage.trained)


@pytest.mark.parametrize(
    ("text", "add"),
    [
        ("wanda(0.5) >> lora", "remask"),
        ("nf4 >> lora", "regrid"),
        ("wanda(0.5) >> nf4 >> lora >> ia3", "remask >> regrid"),
        ("wanda(0.5) >> nf4 >> lora >> regrid", "remask"),
        ("wanda(0.5) >> nf4 >> lora >> remask", "regrid"),
        ("wanda(0.5) >> ia3 >> lora", "remask"),
        ("wanda(0.5) >> remask >> lora", "remask"),
        ("nf4 >> lora >> regrid >> ia3", "regrid"),
    ],
)
def test_cannot_merge_names_the_links_to_add(text: str, add: str) -> None:
    check(chain(text))
    with pytest.raises(CannotMerge) as caught:
        check_merge(chain(text))
    fixed = re.match(r"train with (.*) at the end: (.*); or (?:call )?merge\(lossy=True\)", caught.value.fix)
    assert fixed[1] == add
    assert chain(fixed[2]) == chain(f"{text} >> {add}")
    check_merge(chain(fixed[2]))
    assert caught.value.where
    assert caught.value.found
    assert caught.value.rule


@pytest.mark.parametrize(
    "text", ["lora", "wanda(0.5) >> ia3", "wanda(0.5)", "nf4", "wanda(0.5) >> fp8", "lora >> wanda(0.5) >> ia3",
             "nf4 >> magnitude(0.5) >> lora >> regrid >> remask"]
)  # fmt: skip
def test_what_loses_nothing_may_merge(text: str) -> None:
    check(chain(text))
    check_merge(chain(text))


# ---- apply refuses, and leaves the model as it was


def snapshot(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, bool], dict[str, bool]]:
    return (
        dict(model.named_modules()),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    modules, state, requires_grad, training = before
    assert list(model.named_modules()) == list(modules.items())
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires_grad
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert not chain_layers(model)


FAILING = {
    "unknown link": ("lroa", {}, ChainError, "did you mean lora"),
    "illegal": ("lora >> remask", {}, ChainError, "no pruner"),
    "no calibration": ("wanda(0.5) >> lora", {}, ChainError, "calibration"),
    "empty calibration": ("wanda(0.5) >> lora", {"calibration": []}, DataError, "no batch"),
    "wrong calibration": ("wanda(0.5)", {"calibration": [{"tokens": torch.ones(1, 2)}]}, ValueError, "input_ids"),
    "no such target": ("lora", {"targets": "qkv"}, TargetError, "qkv"),
    "no target": ("lora", {"targets": []}, TargetError, "no target"),
    "rank": ("lora(r=65)", {}, ChainError, "at most the layer's smaller side"),
    "rank of a narrow layer": ("lora(r=33)", {}, ChainError, "k_proj"),
    "group": ("int(bits=4, group=48)", {}, ChainError, "group must divide in_features"),
    "group after a pruner": ("magnitude(0.5) >> int(group=48) >> lora", {}, ChainError, "fix:   use group=32"),
    "group in a later stage": ("lora >> int(group=48)", {}, ChainError, "group must divide"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failing_apply_leaves_the_model_as_it_was(name: str) -> None:
    text, options, kind, words = FAILING[name]
    model = make("llama").train()
    model.model.layers[1].eval()
    before = snapshot(model)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        dovetail.apply(model, text, **options)
    if isinstance(caught.value, DovetailError):
        assert caught.value.where
        assert caught.value.found
        assert caught.value.rule
    assert_unchanged(model, before)
    dovetail.apply(model, "lora(r=4)")


@pytest.mark.parametrize("text", ["wanda(0.5) >> nf4", "magnitude(0.5) >> nf4", "nf4", "int(group=32)", "wanda(0.5)"])
def test_weights_and_activations_that_are_not_finite_are_refused_by_name(text: str) -> None:
    """Late, when layers before it were pruned or quantized already: still nothing has changed."""
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    before = snapshot(model)
    state = {name: tensor.nan_to_num(7.0) for name, tensor in before[1].items()}
    calls = [batch(model)]
    if text == "wanda(0.5)":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    with pytest.raises(DovetailError, match="NaN or infinite"):
        dovetail.apply(model, text, calibration=calls)
    after = {name: tensor.nan_to_num(7.0, posinf=torch.inf) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert list(model.named_modules()) == list(before[0].items())
    assert not chain_layers(model)


def test_a_second_chain_is_refused() -> None:
    model = dovetail.apply(make("llama"), "lora(r=4)")
    layers = chain_layers(model)
    with pytest.raises(ChainError, match=r"(?s)with the chain lora\(r=4\).*one chain.*merge the first one"):
        dovetail.apply(model, "ia3")
    assert chain_layers(model) == layers
    dovetail.merge(model)
    dovetail.apply(model, "ia3")


def test_merge_and_advance_need_a_chain() -> None:
    model = make("llama")
    with pytest.raises(ChainError, match=r"(?s)no layer with a chain.*dovetail\.apply"):
        dovetail.merge(model)
    with pytest.raises(ChainError, match="no layer with a chain"):
        dovetail.advance(model)


def test_advance_checks_its_calibration_before_it_merges() -> None:
    model = dovetail.apply(make("llama"), "lora(r=4) >> wanda(0.5)")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ChainError, match="no calibration data"):
        dovetail.advance(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    dovetail.advance(model, calibration=[batch(model)])


def test_padding_does_not_count_in_calibration() -> None:
    model, padded = make("llama"), batch(make("llama"))
    garbage = {**padded, "input_ids": padded["input_ids"].clone()}
    garbage["input_ids"][padded["attention_mask"] == 0] = 77
    masks = []
    for inputs in (padded, garbage):
        model = make("llama")
        dovetail.apply(model, "wanda(0.5)", calibration=[inputs])
        masks.append({name: layer.base.matrix() != 0 for name, layer in chain_layers(model).items()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_wanda_prunes_by_weight_times_input_norm_per_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6))
    x = torch.randn(50, 10) * torch.tensor([10.0, *[1.0] * 8, 0.01])
    weight = model[0].weight.detach().clone()
    dovetail.apply(model, "wanda(0.4)", calibration=[{"input": x[:20]}, {"input": x[20:]}])
    scores = weight.abs() * x.norm(dim=0)
    wanted = torch.ones_like(weight)
    for row, order in enumerate(scores.argsort(dim=1)):
        wanted[row, order[:4]] = 0
    assert torch.equal(chain_layers(model)["0"].base.matrix(), weight * wanted)


def test_wanda_on_a_convolution_sees_each_tap_of_its_kernel() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2), groups=2)
    model, x = nn.Sequential(conv), torch.randn(3, 4, 5, 9) * torch.tensor([1.0, 0.1, 0.1, 30.0]).view(4, 1, 1)
    weight = conv.weight.detach().clone()
    dovetail.apply(model, "wanda(0.5)", targets="0", calibration=[{"input": x}])
    columns = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # (b, 4·6, positions)
    norm = columns.square().sum((0, 2)).view(2, 12).sum(0).sqrt()
    scores = weight.flatten(1).abs() * norm
    wanted = torch.ones_like(scores).scatter_(1, scores.argsort(dim=1)[:, :6], 0)
    assert torch.equal(chain_layers(model)["0"].base.matrix(), weight.flatten(1) * wanted)


def test_quantizer_without_an_exact_zero_may_not_follow_a_pruner(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class MidRise(Int):
        name = "midrise"
        keeps_zeros = False

    links()
    monkeypatch.setitem(registry._REGISTERED, "midrise", MidRise)
    check(chain("midrise >> wanda(0.5) >> lora >> remask >> regrid"))
    for text in ("wanda(0.5) >> midrise", "magnitude(0.5) >> lora >> remask >> midrise"):
        with pytest.raises(ChainError, match="must represent zero exactly") as caught:
            check(chain(text))
        assert caught.value.fix == "put midrise first"
