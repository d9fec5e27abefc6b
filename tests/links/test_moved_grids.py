"""Adapters that train the grid of the base: PEQA's scales, QA-LoRA's zero points. Codes stay; merges change no bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.packed import save_packed
from dovetail.errors import ChainError
from families import VOCABULARY, batch, logits, make
from samples import IN, LAYERS, OUT, chained, input_of, model_of

CHAINS = [
    "int(bits=4, group=16) >> scales",
    "nf4 >> scales",
    "wanda(0.5) >> int(bits=3, group=16) >> scales",
    "gptq(bits=4, group=16) >> scales",
    "hqq(bits=4, group=16) >> lora(r=2, alpha=3, pool=group)",
]


def test_scales_have_the_gradients_of_peqa() -> None:
    """Of W' = (q - z) s, by s ⊙ f: the gradient of f is that of s times s."""
    model, x = chained("int(bits=4, group=8) >> scales", dtype=torch.float64, moved=False), input_of().double()
    grid = model.layer.base.quantized
    scale = grid.scale_og.double().requires_grad_()
    codes = grid.dequantize(torch.empty(OUT, IN)).double().view(OUT, -1, 8) / grid.scale_og.double()[:, :, None]
    codes = codes.nan_to_num(0)
    wanted = torch.nn.functional.linear(x, (codes * scale[:, :, None]).view(OUT, IN), model.layer.bias)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), scale)
    y = model(x)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    y.square().sum().backward()
    found = model.layer.states[0].values()["factor"]
    assert found.grad is not None
    torch.testing.assert_close(found.grad, gradient * scale.detach(), rtol=1e-5, atol=1e-6)


def test_qa_lora_adds_the_adapter_of_the_sums_of_groups() -> None:
    """Xu et al. 2023, eq. 3: y + c B A (sums of x over each group), up to the rounding of a zero point to float16.

    But for a row of zeros, whose scales are zero: no zero point moves it.
    """
    text, x = "hqq(bits=4, group=8)", input_of().double()
    layer = chained(f"{text} >> lora(r=2, alpha=3, pool=group)", dtype=torch.float64).layer
    p = layer.states[0].values()
    pooled = x.unflatten(-1, (-1, 8)).sum(-1)
    wanted = chained(text, dtype=torch.float64)(x) + 1.5 * pooled @ p["A"].t() @ p["B"].t()
    step = float(layer.base.quantized.scale_og.float().max()) * 2**-11 * 64  # of float16 zero points up to 64 steps
    difference = (layer(x) - wanted).detach().abs()
    difference[..., 3] = 0
    assert float(difference.max()) <= step * float(x.abs().sum(-1).max())
    assert float((wanted - chained(text, dtype=torch.float64)(x)).detach().abs().max()) > 10 * float(difference.max())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("text", ["int(bits=4, group=8) >> scales", "hqq(bits=4, group=8) >> lora(r=2, pool=group)"])
def test_merges_bit_for_bit_on_every_layer_and_dtype(text: str, layer: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = chained(text, layer, dtype), input_of(layer, dtype)
        before, codes = model(x), model.layer.base.quantized.codes.clone()
        report = dovetail.merge(model, packed=True)
        assert report.exact
        assert report.off_grid == 0
        assert torch.equal(model(x), before)
        assert torch.equal(model.layer.base.quantized.codes, codes)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"t{n}": n for n in range(VOCABULARY)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t2", pad_token="t0")


def tuned(text: str):
    model = make("llama").float()
    dovetail.apply(model, text, targets=["q_proj", "down_proj"], calibration=[batch(model)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("text", CHAINS)
def test_saved_adapters_and_packed_models_give_the_same_bits(text: str, tmp_path: Path) -> None:
    model = tuned(text)
    sent = batch(model)
    with torch.no_grad():
        wanted = logits(model, sent)
        loaded = dovetail.load_adapter(make("llama").float(), dovetail.save_adapter(model, tmp_path / "adapter"))
        assert torch.equal(logits(loaded, sent), wanted)
        report = dovetail.merge(model, packed=True)
        assert report.exact
        assert report.sparsity_after == report.sparsity_before
        assert torch.equal(logits(model, sent), wanted)
        save_packed(model, tmp_path / "packed", tokenizer=tokenizer())
        from_disk, _ = dovetail.load(tmp_path / "packed")
        assert torch.equal(logits(from_disk, sent), wanted)
        dovetail.to_stock(model)
        assert torch.equal(logits(model, sent), wanted)


def test_a_later_stage_goes_on_from_the_moved_grid() -> None:
    model, x = chained("int(bits=4, group=8) >> scales >> magnitude(0.5) >> lora(r=3) >> remask >> regrid"), input_of()
    moved = model.layer.grid()
    dovetail.advance(model)
    assert torch.equal(model.layer.base.quantized.scale_og, moved.scale_og)
    before = model(x)
    assert dovetail.merge(model).exact
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("scales", "a quantizer's grid"),
        ("nf4(double=true) >> scales", "stores as numbers"),
        ("mxfp4 >> scales", "stores as numbers"),
        ("fp8(scale=tensor) >> scales", "stores as numbers"),
        ("int(bits=4, group=8) >> lora(r=3, pool=group)", "stores as numbers"),
        ("int(bits=4, group=8) >> scales >> ia3", "only trained one"),
        ("int(bits=4, group=8) >> scales >> regrid", "only trained one"),
        ("hqq(bits=4, group=8) >> lora(r=5, pool=group)", "number of groups"),
        ("hqq(bits=4, group=8) >> lora(r=3, pool=group, dropout=0.1)", "knows neither"),
        ("nf4(block=64) >> scales", "each lie in one row"),
    ],
)
def test_a_grid_that_cannot_be_trained_is_refused(text: str, rule: str) -> None:
    model = model_of()
    layer = model.layer
    with pytest.raises(ChainError, match=rule):
        dovetail.apply(model, text, targets="layer")
    assert model.layer is layer


def test_peft_has_no_such_adapter(tmp_path: Path) -> None:
    for text in ("int(bits=4, group=16) >> scales", "hqq(bits=4, group=16) >> lora(r=2, pool=group)"):
        with pytest.raises(ChainError, match="peft has no adapter"):
            dovetail.export_peft(tuned(text), tmp_path)


def test_training_moves_scales_alone() -> None:
    model, x = chained("nf4(block=32) >> scales", moved=False), input_of()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert set(chain_layers(model)["layer"].states[0].values()) == {"factor"}
