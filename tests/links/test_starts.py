"""Starts that choose base and low rank together: against peft, against their papers' formulas, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dovetail
from dovetail import chain
from dovetail.chains.layer.applied import applied
from dovetail.chains.terms import LowRank, without
from dovetail.errors import ChainError, LoadError, SearchError
from dovetail.links.adapt.starts import STARTS
from dovetail.searches.trial import check_one_stage
from families import batch, logits, make
from places import GOLDEN
from samples import chained, input_of, model_of

NF4 = chain("nf4").links[0]


def values_of(weight: Tensor) -> Tensor:
    return NF4.quantize(weight).dequantize(torch.empty_like(weight))


@pytest.mark.parametrize("weight", range(3))
def test_loftq_errs_at_most_as_peft_and_less_with_iterations(weight: int) -> None:
    given = json.loads((GOLDEN / "starts.json").read_text())[weight]
    w = torch.tensor(given["weight"]) * given["step"]
    errors: dict[int, list[float]] = {}
    for case in given["cases"]:
        taken, low = STARTS["loftq"].choose(w, values_of, case["rank"], case["iterations"])
        error = float((w - values_of(without(w, taken)) - low.b_or @ low.a_ri).norm())
        assert error <= 1.01 * case["error"], case
        errors.setdefault(case["rank"], []).append(error)
    for falling in errors.values():
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] < 0.99 * falling[0]


@pytest.mark.parametrize("scaling", ["linear", "rs"])
def test_pissa_starts_as_peft_does(scaling: str) -> None:
    theirs = peft.get_peft_model(
        nn.Sequential(model_of().layer),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa", use_rslora=scaling == "rs"),
    ).base_model.model[0]
    ours = chained(f"lora(r=4, alpha=6, init=pissa, scaling={scaling})", moved=False).layer
    a, b = (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    mine = ours.states[0].values()
    signs = torch.sign((mine["A"] * a).sum(1))
    assert (signs[:, None] * mine["A"] - a).abs().max() <= 1e-5
    assert (signs * mine["B"] - b).abs().max() <= 1e-5
    assert (ours.base.matrix() - theirs.base_layer.weight).abs().max() <= 1e-5


def test_lq_lora_is_its_algorithm() -> None:
    """Singular triplets of W - Q, then Q of the rest, until the error rises. A code at its boundary may differ."""
    w = model_of(seed=3).layer.weight.detach()
    q, errors = torch.zeros_like(w), []
    while len(errors) < 2 or errors[-1] < errors[-2]:
        u, s, vt = torch.linalg.svd(w - q, full_matrices=False)
        part = (u[:, :3] * s[:3]) @ vt[:3]
        q = values_of(w - part)
        errors.append(float((w - q - part).norm()))
    assert len(errors) > 3
    for iterations, wanted in ((1, errors[0]), (2, errors[1]), (100, errors[-2])):
        taken, low = STARTS["lqlora"].choose(w, values_of, 3, iterations)
        assert taken is low
        found = float((w - values_of(without(w, taken)) - low.b_or @ low.a_ri).norm())
        assert found == pytest.approx(wanted, rel=1e-4 if iterations == 1 else 0.02), iterations


def test_what_is_taken_does_not_depend_on_the_order_of_sums() -> None:
    w, taken = model_of().layer.weight.detach(), LowRank(torch.randn(7, 32), torch.randn(24, 7))
    whole = without(w, taken)
    assert torch.equal(whole, torch.cat([without(w[:5], LowRank(taken.a_ri, taken.b_or[:5])),
                                         without(w[5:], LowRank(taken.a_ri, taken.b_or[5:]))]))  # fmt: skip
    torch.testing.assert_close(whole, w - taken.b_or @ taken.a_ri)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lora(r=3, init=loftq)", "quantizer's error"),
        ("dora(r=3, init=lqlora)", "quantizer's error"),
        ("nf4 >> magnitude(0.5) >> lora(r=3, init=loftq) >> remask", "before it is quantized"),
        ("magnitude(0.5) >> nf4 >> lora(r=3, init=loftq)", "keeps its zeros"),
        ("nf4 >> lora(r=3) >> regrid >> magnitude(0.5) >> lora(r=3, init=pissa) >> remask >> regrid", "before it is"),
        ("nf4 >> lora(r=3, init=loftq) >> dora(r=2, init=pissa)", "one adapter of a stage"),
        ("nf4 >> lora(r=3, iterations=5)", "start that iterates"),
        ("nf4 >> lora(r=3, init=pissa, iterations=5)", "start that iterates"),
        ("nf4 >> lora(r=3, init=loftq, iterations=0)", "at least 1"),
        ("nf4 >> lora(r=3, init=loftq, alpha=0)", "must be positive"),
    ],
)
def test_a_start_without_its_weight_is_refused(text: str, rule: str) -> None:
    with pytest.raises(ChainError, match=rule):
        chained(text)


def test_a_start_in_a_later_stage_decomposes_what_was_trained() -> None:
    model, x = chained("lora(r=3) >> nf4(block=32) >> lora(r=3, init=loftq) >> regrid"), input_of()
    trained = model.layer.effective_weight()[0].detach()
    dovetail.advance(model)
    plain = chained("nf4(block=32)").layer.base.quantized
    assert plain is not None
    layer = model.layer
    added = layer.base.matrix() + layer.states[0].link.scale * (
        layer.states[0].values()["B"] @ layer.states[0].values()["A"]
    )
    assert (added - trained).norm() < 0.9 * (NF4.quantize(trained).dequantize(torch.empty(24, 32)) - trained).norm()
    before = model(x)
    assert dovetail.merge(model).exact
    assert torch.equal(model(x), before)


CHAINS = [
    "nf4 >> lora(r=4, init=loftq, iterations=3)",
    "nf4(double=true) >> dora(r=4, init=pissa) >> regrid",
    "lora(r=4, init=pissa)",
    "wanda(0.5) >> int(bits=4, group=16) >> lora(r=4, init=lqlora) >> remask >> regrid(start=codes)",
    "gptq(bits=4, group=16) >> lora(r=4, init=loftq, iterations=2)",
]


def tuned(text: str):
    model = make("llama").float()
    dovetail.apply(model, text, targets=["q_proj", "down_proj"], calibration=[batch(model)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("text", CHAINS)
def test_saved_adapters_make_their_bases_again_and_keep_codes_only_of_gptq(text: str, tmp_path: Path) -> None:
    model = tuned(text)
    folder = dovetail.save_adapter(model, tmp_path)
    kinds = {key.split("/")[0] for key in load_file(folder / "adapter.safetensors")}
    assert ("base" in kinds) == text.startswith("gptq")
    assert ("taken" in kinds) == bool(applied(model).taken)
    loaded = dovetail.load_adapter(make("llama").float(), folder)
    sent = batch(model)
    assert torch.equal(logits(loaded, sent), logits(model, sent))
    again = dovetail.save_adapter(loaded, tmp_path / "again")
    assert (again / "adapter.json").read_text() == (folder / "adapter.json").read_text()


def test_loading_does_not_decompose_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its singular vectors depend on the processor and on the number of threads."""
    model = tuned(CHAINS[0])
    dovetail.save_adapter(model, tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    loaded = dovetail.load_adapter(make("llama").float(), tmp_path)
    assert torch.equal(logits(loaded, batch(model)), logits(model, batch(model)))


def test_what_needs_another_start_is_refused_by_name(tmp_path: Path) -> None:
    model = tuned(CHAINS[0])
    with pytest.raises(ChainError, match="less a low rank"):
        dovetail.export_peft(model, tmp_path / "peft")
    with pytest.raises((ChainError, LoadError), match="drawn again from a seed"):
        dovetail.experts.task_vector(model)
    with pytest.raises(SearchError, match="start as the identity"):
        check_one_stage(applied(model).assignment)
    assert dovetail.export_peft(tuned("nf4 >> lora(r=4, init=loftq, iterations=1)"), tmp_path / "one").is_dir()


def test_calibrated_blocks_see_the_adapters_of_those_before_them() -> None:
    """Under PiSSA, a base alone lacks the principal part of its weight: later blocks need the sum."""
    errors = {}
    for text in ("gptq(bits=4, group=16) >> lora(r=8, init=pissa)", "gptq(bits=4, group=16)"):
        model = make("llama").float()
        sent = batch(model)
        with torch.no_grad():
            wanted = logits(model, sent)
            dovetail.apply(model, text, calibration=[sent])
            errors[text] = float((logits(model, sent) - wanted).norm())
    with_pissa, plain = errors.values()
    assert with_pissa < plain
