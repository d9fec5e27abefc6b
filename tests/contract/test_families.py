"""Closed chains on tiny models of every family: merged, saved and loaded by stock transformers, the logits are the same
bits. Also tied heads, layers that are used several times, and models that no chain has to know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, LlamaForCausalLM, PreTrainedModel

import dovetail
from dovetail.chains.layer.linear import chain_layers
from families import FAMILIES, batch, logits, make
from samples import move
from tolerance import assert_near

CLOSED = [
    "wanda(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid",
    "nf4 >> lora(r=4) >> regrid",
    "wanda(0.5) >> lora(r=4) >> ia3 >> remask",
]


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def put(model: PreTrainedModel, text: str, seed: int = 5) -> dict[str, Tensor]:
    """The chain on all linear layers, away from where it starts; a batch."""
    dovetail.apply(model, text, calibration=[batch(model, seed=seed)])
    move(model, 0.03)
    return batch(model)


def merge_and_reload(model: PreTrainedModel, inputs: dict[str, Tensor], folder: Path) -> dovetail.MergeReport:
    """Logits before merging, after it, and of the checkpoint that stock from_pretrained loads: all the same bits."""
    with torch.no_grad():
        before = logits(model, inputs)
        report = dovetail.merge(model)
        assert not chain_layers(model)
        assert torch.equal(logits(model, inputs), before)
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=model.dtype).eval()
        assert torch.equal(logits(loaded, inputs), before)
    assert torch.isfinite(before).all()
    assert loaded.config.dovetail["merged_fingerprint"] == model.config.dovetail["merged_fingerprint"]
    return report


@pytest.mark.parametrize(
    ("family", "text"),
    [
        *((family, CLOSED[0]) for family in FAMILIES),
        *((family, text) for family in ("llama", "gpt2", "falcon", "mixtral", "t5", "bert") for text in CLOSED[1:]),
    ],
)
def test_merged_saved_and_loaded_logits_are_the_same_bits(family: str, text: str, tmp_path: Path) -> None:
    model = make(family)
    stock = {name: type(module) for name, module in model.named_modules()}
    count = weights(model)
    inputs = put(model, text)
    report = merge_and_reload(model, inputs, tmp_path)
    assert report.exact
    assert (report.max_abs_logit_diff, report.max_abs_weight_diff, report.off_grid) == (0, 0, 0)
    if "wanda" in text:
        assert report.sparsity_after >= 0.5
    assert {name: type(module) for name, module in model.named_modules()} == stock
    assert weights(model) == count


@pytest.mark.parametrize("text", CLOSED)
def test_in_bfloat16_too(text: str, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    # Loaded in bfloat16 rather than cast: a cast rounds the rotary frequencies too, loading doesn't.
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    report = merge_and_reload(model, put(model, text), tmp_path)
    assert report.exact
    assert report.off_grid == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_tied_heads_stay_tied_and_untouched(family: str, tmp_path: Path) -> None:
    model = make(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    embedding = model.get_input_embeddings().weight
    values = embedding.detach().clone()
    inputs = put(model, CLOSED[0])
    logits(model, inputs).square().mean().backward()
    assert embedding.grad is None
    merge_and_reload(model, inputs, tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, values)


def albert() -> AlbertForSequenceClassification:
    torch.manual_seed(0)
    return AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=128, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_hidden_groups=1,
            num_attention_heads=4, intermediate_size=128, max_position_embeddings=64, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("text", CLOSED)
def test_layers_that_a_model_uses_several_times(text: str, tmp_path: Path) -> None:
    """ALBERT runs one block three times; each use sees the same chain, and gradients of all uses add up."""
    model = albert()
    inputs = put(model, text)
    layers = chain_layers(model)
    assert len({id(layer) for layer in layers.values()}) == len(layers)
    logits(model, inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    report = merge_and_reload(model, inputs, tmp_path)
    assert report.exact


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_computes_something_else_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Doubled(8, 8))
    with pytest.raises(dovetail.DovetailError, match=r"(?s)^1.*Doubled"):
        dovetail.apply(model, "lora(r=2)")
    assert [type(module) for module in model] == [nn.Linear, Doubled]


class Twice(nn.Module):
    """One layer object under three names, two of them in one list."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(16, 16)
        self.first = shared
        self.blocks = nn.ModuleList([shared, nn.Linear(16, 16), shared])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [self.first, *self.blocks]:
            x = layer(x)
        return x


def test_a_layer_under_several_names_is_one_layer() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 16)
    before = model(x)
    dovetail.apply(model, "lora(r=2)")
    assert model.first is model.blocks[0] is model.blocks[2]
    assert len(chain_layers(model)) == 2
    assert torch.equal(model(x), before)
    move(model)
    before = model(x)
    dovetail.merge(model)
    assert model.first is model.blocks[0] is model.blocks[2]
    assert type(model.first) is nn.Linear
    assert_near(model(x), before, terms=16, steps=4)


def test_tensors_shared_between_two_layers_are_refused_by_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with pytest.raises(dovetail.DovetailError, match=r"a\.weight|shared"):
        dovetail.apply(model, "lora(r=2)", targets="a")
    dovetail.apply(model, "lora(r=2)")
    assert set(chain_layers(model)) == {"c"}


def test_a_label_takes_only_its_layers() -> None:
    model = make("llama")
    dovetail.apply(model, "ia3", targets="down")
    layers = chain_layers(model)
    assert set(layers) == {f"model.layers.{n}.mlp.down_proj" for n in range(2)}
    assert all("in_scale" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["t5", "bert", "gpt2"])
def test_gradients_flow_through_the_whole_model(family: str) -> None:
    model = make(family)
    inputs = put(model, CLOSED[0])
    model.train()
    logits(model, inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "links" in name:
            assert parameter.requires_grad
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        elif parameter.requires_grad:
            assert "classifier" in name or "pooler" in name
