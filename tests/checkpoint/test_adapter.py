"""Adapters saved and loaded: bit-equal on the right base, refused by name on another."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dovetail
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.elastic import groups, use_reference
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import Before, load_adapter, save_adapter
from dovetail.compression.apply import advance
from dovetail.errors import LoadError
from dovetail.training.optimizer import cast_frozen, cast_heads
from families import batch, logits, make


def perturb(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in chain_layers(model).values():
            for parameter in layer.links.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


CHAINS = [
    "lora(r=4)",
    "ia3 >> vera(r=8) >> dora(r=4)",
    "wanda(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid",
    "wanda(0.5) >> nf4 >> lora(r=4) >> ia3",
    "magnitude(0.3) >> nf4(double=true) >> loha(r=2) >> regrid",
    "bottleneck(r=4)",
    "gptq(bits=4, group=32) >> lora(r=4)",
    "wanda(0.5) >> gptq(bits=3, group=0) >> lora(r=4) >> remask >> regrid",
    "wanda(0.5) >> gptq(group=32) >> lora(r=4) >> remask >> regrid(start=codes)",
    "sparsegpt(0.5) >> lora(r=4) >> remask",
    "sparsegpt(0.5) >> gptq(group=32) >> lora(r=4) >> remask >> regrid",
]


@pytest.mark.parametrize("text", CHAINS)
def test_round_trip_is_bit_equal(text, tmp_path):
    model = make("llama").eval()
    inputs = batch(model)
    dovetail.apply(model, text, calibration=[inputs], seed=3)
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(make("llama").eval(), tmp_path / "adapter")
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    # ... and onto a model that carries the chain already
    other = make("llama").eval()
    dovetail.apply(other, text, calibration=[inputs], seed=3)
    assert torch.equal(logits(load_adapter(other, tmp_path / "adapter"), inputs), logits(model, inputs))


def test_later_stages_bring_their_bases(tmp_path):
    model = make("gpt2").eval()
    inputs = batch(model)
    dovetail.apply(model, "lora(r=4) >> wanda(0.5) >> nf4 >> lora(r=4) >> remask >> regrid", calibration=[inputs])
    perturb(model)
    advance(model, calibration=[inputs])
    perturb(model)
    # regrid(start=weights) needs the weights before quantizing, which a later stage's file doesn't hold
    before = logits(model, inputs)
    save_adapter(model, tmp_path)
    again = load_adapter(make("gpt2").eval(), tmp_path)
    assert torch.equal(before, logits(again, inputs))


def test_a_trained_head_travels_along(tmp_path):
    model = make("bert").eval()
    inputs = batch(model)
    dovetail.apply(model, "lora(r=4)")
    perturb(model)
    with torch.no_grad():
        model.classifier.weight += 1
    save_adapter(model, tmp_path)
    again = load_adapter(make("bert").eval(), tmp_path)
    assert torch.equal(logits(model, inputs), logits(again, inputs))


def test_a_frozen_pooler_travels_along_too(tmp_path):
    model = make("bert").eval()  # a checkpoint without a pooler draws one from the seed of loading
    inputs = batch(model)
    dovetail.apply(model, "lora(r=4)")
    save_adapter(model, tmp_path)
    other = make("bert").eval()
    with torch.no_grad():
        other.get_submodule("bert.pooler.dense").weight.mul_(2)
    assert torch.equal(logits(model, inputs), logits(load_adapter(other, tmp_path), inputs))


def test_an_output_head_is_part_of_the_base(tmp_path):
    model = make("llama")
    dovetail.apply(model, "lora(r=4)")
    save_adapter(model, tmp_path)
    other = make("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(LoadError, match="fingerprint"):
        load_adapter(other, tmp_path)


def without_digest(folder: Path) -> None:
    """Make the adapter one of an earlier version: a file that lies, rather than one that is damaged."""
    text = json.loads((folder / "adapter.json").read_text())
    del text["digest"]
    (folder / "adapter.json").write_text(json.dumps(text))


@pytest.mark.filterwarnings("ignore:.*no digest")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_file_brings_the_head_of_its_model_and_nothing_else(family, tmp_path):
    model = make(family)
    dovetail.apply(model, "lora(r=4)")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    if family == "bert":
        del tensors["head/classifier.weight"]
    else:
        tensors["head/model.embed_tokens.weight"] = torch.zeros_like(model.get_input_embeddings().weight)
    save_file(tensors, tmp_path / "adapter.safetensors")
    without_digest(tmp_path)
    with pytest.raises(LoadError, match="head/"):
        load_adapter(make(family), tmp_path)


@pytest.mark.filterwarnings("ignore:.*no digest")
@pytest.mark.parametrize("text", ["magnitude(0.5) >> lora(r=4)", "nf4 >> lora(r=4) >> regrid"])
def test_what_was_trained_in_bf16_is_loaded_onto_the_base_that_it_began_with(text, tmp_path):
    model = make("bert")
    dovetail.apply(model, text)
    cast_frozen(model)  # as `train(bf16=True)` does before it, and the heads behind it
    for layer in chain_layers(model).values():
        layer.states[0]._parameters["B"].data += 0.1
    cast_heads(model)
    model.eval()
    save_adapter(model, tmp_path)
    again = load_adapter(make("bert"), tmp_path).eval()
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(again, inputs))
    refused = make("bert")
    before = {name: p.dtype for name, p in refused.named_parameters()}
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors.pop(next(key for key in tensors if key.startswith("link/")))
    save_file(tensors, tmp_path / "adapter.safetensors")
    without_digest(tmp_path)
    with pytest.raises(LoadError, match="missing from the file"):
        load_adapter(refused, tmp_path)
    assert {name: p.dtype for name, p in refused.named_parameters()} == before


def test_another_base_is_refused_by_name(tmp_path):
    model = make("llama")
    dovetail.apply(model, "lora(r=4)")
    save_adapter(model, tmp_path)
    with pytest.raises(LoadError, match="fingerprint"):
        load_adapter(make("llama", seed=7), tmp_path)
    other = make("llama")
    dovetail.apply(other, "ia3")
    with pytest.raises(LoadError, match="the adapter's chain, lora"):
        load_adapter(other, tmp_path)


@pytest.mark.filterwarnings("ignore:.*no digest")
def test_another_quantizer_is_refused_by_name(tmp_path):
    model = make("llama")
    dovetail.apply(model, "nf4 >> lora(r=4)")
    save_adapter(model, tmp_path)
    text = json.loads((tmp_path / "adapter.json").read_text())
    text["quantizer"] = "fp4(block=64, double=False)"
    (tmp_path / "adapter.json").write_text(json.dumps(text))
    without_digest(tmp_path)
    with pytest.raises(LoadError, match="was trained over, fp4"):
        load_adapter(make("llama"), tmp_path)


@pytest.mark.parametrize("damage", ["half", "garbage", "no json", "extra key"])
def test_damaged_files_are_refused(damage, tmp_path):
    model = make("llama")
    dovetail.apply(model, "lora(r=4)")
    save_adapter(model, tmp_path)
    tensors, text = tmp_path / "adapter.safetensors", tmp_path / "adapter.json"
    match damage:
        case "half":
            tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
        case "garbage":
            tensors.write_bytes(b"\xff" * 1000)
        case "no json":
            text.unlink()
        case "extra key":
            text.write_text(json.dumps(json.loads(text.read_text()) | {"surprise": 1}))
    with pytest.raises(LoadError):
        load_adapter(make("llama"), tmp_path)


TWO_STAGES = "lora(r=4) >> magnitude(0.5) >> nf4 >> lora(r=4) >> remask >> regrid"


def first(tensors: dict[str, torch.Tensor], start: str, end: str = "") -> str:
    return next(key for key in tensors if key.startswith(start) and key.endswith(end))


@pytest.mark.filterwarnings("ignore:.*no digest")
@pytest.mark.parametrize(
    ("text", "change", "header"),
    [
        ("lora(r=4)", lambda t: t.update(foo=torch.zeros(1)), {}),
        ("nf4 >> lora(r=4)", lambda t: None, {"quantizer": "fp4"}),
        ("magnitude(0.5) >> lora(r=4)", lambda t: t.pop(first(t, "mask/")), {}),
        ("magnitude(0.5) >> lora(r=4)", lambda t: t.update({first(t, "mask/"): torch.full((1, 1), 1e9)}), {}),
        ("lora(r=4)", lambda t: None, {"stage": -1}),
        ("lora(r=4)", lambda t: None, {"stage": 5}),
        ("vera(r=4)", lambda t: None, {"seed": 2**70}),
        (TWO_STAGES, lambda t: t.pop(first(t, "base/")), {}),
        (TWO_STAGES, lambda t: t.update({first(t, "base/", "codes"): torch.zeros(3)}), {}),
        (TWO_STAGES, lambda t: t.update({first(t, "base/", "mask_bits"): torch.zeros(3)}), {}),
    ],
)
def test_a_file_that_lies_is_refused_and_the_model_is_as_it_was(text, change, header, tmp_path):
    model = make("llama")
    dovetail.apply(model, text)
    if text == TWO_STAGES:
        advance(model)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    file = json.loads((tmp_path / "adapter.json").read_text()) | header
    (tmp_path / "adapter.json").write_text(json.dumps(file))
    without_digest(tmp_path)
    fresh = make("llama").eval()
    before = dict(fresh.named_parameters())
    with pytest.raises(LoadError):
        load_adapter(fresh, tmp_path)
    assert not chain_layers(fresh)
    after = dict(fresh.named_parameters())
    assert all(after[name] is before[name] and after[name].requires_grad for name in before)


@pytest.mark.filterwarnings("ignore:.*no digest")
@pytest.mark.parametrize("bad", [torch.full((4, 64), torch.nan), torch.full((4, 64), 3)])
def test_parameters_that_are_no_finite_floats_are_refused(bad, tmp_path):
    save_adapter(dovetail.apply(make("llama"), "lora(r=4)", targets="model.layers.0.self_attn.q_proj"), tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors["link/model.layers.0.self_attn.q_proj/0/A"] = bad
    save_file(tensors, tmp_path / "adapter.safetensors")
    without_digest(tmp_path)
    model = make("llama")
    with pytest.raises(LoadError, match="finite floats"):
        load_adapter(model, tmp_path)
    assert not chain_layers(model)


def test_a_missing_adapter_is_told_without_the_errno(tmp_path):
    with pytest.raises(LoadError) as caught:
        load_adapter(torch.nn.Linear(2, 2), tmp_path / "none")
    assert caught.value.found == "No such file or directory"


def test_a_mask_is_stored_as_one_bit_a_weight(tmp_path):
    model = make("llama")
    dovetail.apply(model, "magnitude(0.5) >> lora(r=4) >> remask")
    save_adapter(model, tmp_path)
    masks = {key: tensor for key, tensor in load_file(tmp_path / "adapter.safetensors").items() if "mask" in key}
    assert len(masks) == len(chain_layers(model))
    weights = sum(layer.base.shape[0] * layer.base.shape[1] for layer in chain_layers(model).values())
    assert 8 * sum(mask.nbytes for mask in masks.values()) == weights


@pytest.mark.parametrize("text", ["vera(r=8)", "lora(r=4)"])
def test_a_chain_of_another_seed(text, tmp_path):
    model = dovetail.apply(make("llama").eval(), text, seed=3)
    perturb(model)
    save_adapter(model, tmp_path)
    other = dovetail.apply(make("llama").eval(), text, seed=4)
    before = logits(other, batch(other))
    if text.startswith("vera"):  # its frozen projections are drawn, not stored
        with pytest.raises(LoadError, match="seed 4"):
            load_adapter(other, tmp_path)
        assert torch.equal(logits(other, batch(other)), before)
        return
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other, batch(other)), logits(model, batch(model)))
    assert applied(other).seed == 3  # with which later stages are drawn, and task vectors taken


@pytest.mark.parametrize("extracted", [False, True])
def test_what_a_chain_held_before_is_put_back(extracted, tmp_path):
    model = dovetail.apply(make("llama").eval(), "lora(r=4, elastic=[4, 2])", seed=3)
    perturb(model)
    use_reference(groups(model))
    if extracted:
        dovetail.extract(model)
    save_adapter(model, tmp_path)
    other = dovetail.apply(make("llama").eval(), "lora(r=4, elastic=[4, 2])", seed=4)
    perturb(other, 2)
    inputs, before = batch(other), Before(other)
    wanted = logits(other, inputs)
    load_adapter(other, tmp_path)
    assert not torch.equal(logits(other, inputs), wanted)
    before.put_back()
    assert torch.equal(logits(other, inputs), wanted)
    assert applied(other).seed == 4
