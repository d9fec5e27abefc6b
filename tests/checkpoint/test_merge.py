"""Merging beside the contract: lossy merges, odd parameters, reports, what a merged model is afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dovetail
from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import CannotMerge, ChainError, HistoryWarning
from dovetail.models.probe import probe_batch
from families import batch, logits, make, move


def chained(text: str, dtype: torch.dtype = torch.float32, family: str = "llama") -> nn.Module:
    model = make(family).to(dtype)
    dovetail.apply(model, text, calibration=[batch(model, seed=4)])
    move(model)
    return model


LOSSY = {
    "wanda(0.5) >> lora(r=4)": (True, False),
    "nf4 >> lora(r=4)": (False, True),
    "wanda(0.5) >> int(bits=4, group=32) >> lora(r=4) >> ia3": (True, True),
    "wanda(0.5) >> nf4 >> lora(r=4) >> regrid": (True, True),
    "magnitude(0.5) >> fp8 >> dora(r=4) >> remask": (True, True),
}
"""Chain -> whether its base has zeros, and a grid, that a lossy merge must keep."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", LOSSY)
def test_a_lossy_merge_keeps_zeros_and_grid_and_says_what_it_costs(text: str, dtype: torch.dtype) -> None:
    pruned, quantized = LOSSY[text]
    model = chained(text, dtype)
    inputs = batch(model)
    layers = chain_layers(model)
    zeros = {name: layer.base.matrix() == 0 for name, layer in layers.items()}
    grids = {name: layer.base.quantized for name, layer in layers.items()}
    used = {name: layer.used_weight().double() for name, layer in layers.items()}
    with pytest.raises(CannotMerge):
        dovetail.merge(model)
    with torch.no_grad():
        before = logits(model, inputs)
    report = dovetail.merge(model, lossy=True, probe=inputs)
    with torch.no_grad():
        after = logits(model, inputs)
    square = error = worst = 0.0
    for name, weight in used.items():
        merged = model.get_submodule(name).weight.detach()
        if pruned and "remask" not in text:
            assert bool((merged[zeros[name]] == 0).all())
        if quantized:
            assert grids[name].off_grid(merged) == 0
        difference = merged.double() - weight
        square, error = square + weight.square().sum(), error + difference.square().sum()
        worst = max(worst, float(difference.abs().max()))
    assert not report.exact
    assert report.off_grid == 0
    assert report.max_abs_weight_diff == pytest.approx(worst, rel=1e-5)
    assert report.relative_weight_error == pytest.approx(float((error / square).sqrt()), rel=1e-5)
    assert 0 < report.relative_weight_error < 1
    assert report.max_abs_logit_diff == pytest.approx(float((after.double() - before.double()).abs().max()), rel=1e-6)
    assert report.max_abs_logit_diff > 0
    if pruned:
        assert report.sparsity_after >= 0.5


def test_a_lossy_merge_of_a_closed_chain_is_exact() -> None:
    report = dovetail.merge(chained("nf4 >> lora(r=4) >> regrid"), lossy=True)
    assert report.exact
    assert report.max_abs_logit_diff == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameters_that_are_not_finite_are_refused_before_anything_changes(value: float) -> None:
    model = chained("nf4 >> lora(r=4) >> regrid")
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        chain_layers(model)[name].states[0].get_parameter("B")[1, 2] = value
    before = copy.deepcopy(model.state_dict())
    for lossy in (False, True):
        with pytest.raises(CannotMerge, match=rf"(?s){name}.*NaN or infinite.*finite.*lr_scale"):
            dovetail.merge(model, lossy=lossy)
    assert len(chain_layers(model)) == 14
    after = model.state_dict()
    assert all(torch.equal(after[key].nan_to_num(9), tensor.nan_to_num(9)) for key, tensor in before.items()
               if tensor.is_floating_point())  # fmt: skip


def test_a_merge_that_is_refused_changes_nothing() -> None:
    for text, kind in [("nf4 >> lora(r=4)", CannotMerge), ("lora(r=4) >> nf4", ChainError)]:
        model = chained(text)
        before, modules = copy.deepcopy(model.state_dict()), list(model.named_modules())
        with pytest.raises(kind):
            dovetail.merge(model)
        assert list(model.named_modules()) == modules
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_a_probe_of_another_model_leaves_everything_as_it_was() -> None:
    model = chained("lora(r=4)").train()
    with pytest.raises(ValueError, match="input_ids"):
        dovetail.merge(model, probe={"nonsense": torch.zeros(1)})
    assert chain_layers(model)
    assert all(module.training for module in model.modules())


def test_a_model_without_token_ids_has_no_logits_to_compare_unless_told() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    for probe, wanted in [(None, None), ({"input": x}, 0.0)]:
        model = dovetail.apply(nn.Sequential(nn.Linear(8, 8)), "magnitude(0.5) >> lora(r=2) >> remask")
        move(model)
        assert dovetail.merge(model, probe=probe).max_abs_logit_diff == wanted


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_logits_are_compared_without_being_told(family: str) -> None:
    report = dovetail.merge(chained("nf4 >> lora(r=4) >> regrid", family=family))
    assert report.max_abs_logit_diff == 0
    # The norms of a model in float64 still round to float32.
    model = chained("lora(r=4)", torch.float64, family)
    assert dovetail.merge(model).max_abs_logit_diff < torch.finfo(torch.float32).eps


def test_every_module_keeps_its_mode() -> None:
    model = chained("nf4 >> lora(r=4, dropout=0.0) >> regrid").train()
    model.model.layers[0].eval()
    modes = {
        name: module.training for name, module in model.named_modules() if ".links" not in name and ".base" not in name
    }
    dovetail.merge(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_merging_in_training_mode_does_not_drop_out() -> None:
    model, other = chained("lora(r=4, dropout=0.5)"), chained("lora(r=4, dropout=0.5)")
    dovetail.merge(model.train())
    dovetail.merge(other.eval())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_advancing_in_training_mode_does_not_drop_out() -> None:
    text = "lora(r=4, dropout=0.5) >> loha(r=8) >> nf4"
    model, other = chained(text), chained(text)
    dovetail.advance(model.train())
    dovetail.advance(other.eval())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_merged_model_says_where_it_comes_from_and_takes_another_chain() -> None:
    model = chained("nf4 >> lora(r=4) >> regrid")
    dovetail.merge(model)
    note = model.config.dovetail
    assert note["chain"] == "nf4 >> lora(r=4) >> regrid"
    assert note["quantizer"] == "nf4(block=64, double=False)"
    assert note["base_fingerprint"].startswith("sha256:")
    assert note["merged_fingerprint"] != note["base_fingerprint"]
    other = chained("nf4 >> lora(r=4) >> regrid")
    dovetail.merge(other)
    assert other.config.dovetail == note
    with pytest.warns(HistoryWarning, match="gives up its quantization grid, nf4"):
        dovetail.apply(model, "wanda(0.5) >> ia3", calibration=[batch(model)])
    move(model)
    report = dovetail.merge(model)
    assert report.max_abs_weight_diff == 0
    assert report.given_up == ("grid",)
    assert not report.exact  # no longer on the grid of the first round
    assert model.config.dovetail["base_fingerprint"] != note["base_fingerprint"]


def test_the_report_s_footprint_is_of_the_weights_on_their_grid() -> None:
    model = chained("wanda(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid")
    carrying = dovetail.footprint(model)
    report = dovetail.merge(model)
    assert report.footprint.bits_per_weight == 4 + 16 / 32 + 4 / 32
    assert carrying.bits_per_weight == report.footprint.bits_per_weight + 1  # the mask
    assert report.footprint.nbytes < carrying.nbytes
    assert report.footprint.nonzero_fraction == pytest.approx(1 - report.sparsity_after)
    assert dovetail.footprint(model).bits_per_weight == 32


def test_what_is_stored_of_a_quantizer_is_what_its_plan_says() -> None:
    for text in ["nf4(double=true)", "int(bits=3, group=32)", "fp8", "fp4"]:
        model = dovetail.apply(make("llama"), text)
        (link,) = dovetail.chain(text)
        for layer in chain_layers(model).values():
            assert sum(t.nbytes for t in layer.base.state_dict().values()) == link.stored_nbytes(layer.site)


def test_a_quantized_base_that_is_cast_keeps_its_codes() -> None:
    """model.to(bfloat16) after applying: codes and scales stay, values are dequantized to the new dtype."""
    model = chained("nf4 >> lora(r=4) >> regrid")
    layers = chain_layers(model)
    codes = {name: layer.base.quantized.codes.clone() for name, layer in layers.items()}
    scales = {name: layer.base.quantized.scale.clone() for name, layer in layers.items()}
    model.to(torch.bfloat16)
    inputs = batch(model)
    assert logits(model, inputs).dtype == torch.bfloat16
    for name, layer in layers.items():
        assert torch.equal(layer.base.quantized.codes, codes[name])
        assert layer.base.quantized.scale.dtype == torch.float32
        assert torch.equal(layer.base.quantized.scale, scales[name])
        assert layer.base.matrix().dtype == torch.bfloat16
    logits(model, inputs).float().square().mean().backward()
    report = dovetail.merge(model)
    assert report.exact
    assert report.off_grid == 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_merged_checkpoint_holds_nothing_of_dovetail(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain, model = make("llama"), chained("nf4 >> lora(r=4) >> regrid")
    dovetail.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain.save_pretrained(tmp_path / "plain")
    merged, stock = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "plain"))
    assert merged.keys() == stock.keys()
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in stock.items()}


def test_pruning_twice_keeps_the_zeros_of_both() -> None:
    model = chained("magnitude(0.5) >> wanda(0.2) >> lora(r=4) >> remask")
    report = dovetail.merge(model)
    assert report.sparsity_before == report.sparsity_after >= 0.5
    # A sparse checkpoint keeps its zeros under another pruner, as well.
    dovetail.apply(model, "magnitude(0.3) >> lora(r=4) >> remask")
    move(model)
    assert dovetail.merge(model).sparsity_after >= 0.5


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_chain_without_adapters_merges_to_its_base() -> None:
    for text in ["wanda(0.5)", "nf4", "wanda(0.5) >> int(group=32)"]:
        model = make("llama")
        dovetail.apply(model, text, calibration=[batch(model)])
        with torch.no_grad():
            before = logits(model, batch(model))
            report = dovetail.merge(model)
            assert torch.equal(logits(model, batch(model)), before)
        assert report.exact
        assert all(torch.isfinite(w).all() for w in weights_of(model))


def test_a_merged_model_is_known_again_and_a_stale_entry_is_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from dovetail.tasks.playground import MODEL_DIR

    model, tokenizer = dovetail.load(MODEL_DIR)
    dovetail.apply(model, "nf4 >> lora(r=4) >> regrid")
    move(model)
    dovetail.merge(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = dovetail.load(tmp_path)
    assert again.config.dovetail["quantizer"] == "nf4(block=64, double=False)"
    assert dovetail.load(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] += 0.5
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(HistoryWarning, match=r"nf4 >> lora\(r=4\) >> regrid over nf4.* ignored"):
        again, _ = dovetail.load(tmp_path)
    assert "dovetail" not in again.config.to_dict()
    assert torch.equal(again.get_parameter(name), weights[name])


def test_weight_off_the_grid_is_reported_as_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chained("nf4 >> lora(r=4) >> regrid")
    monkeypatch.setattr(QuantizedWeight, "off_grid", lambda *_: 1)
    report = dovetail.merge(model)
    assert (report.max_abs_weight_diff, report.exact) == (0, False)
    assert report.off_grid > 0


def test_probe_has_no_padding_token() -> None:
    model = make("llama")
    model.config.pad_token_id = int(probe_batch(model)["input_ids"][0, 0])
    assert not bool((probe_batch(model)["input_ids"] == model.config.pad_token_id).any())
