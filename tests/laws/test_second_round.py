"""A second round keeps what the first one promised.

A chain on a merged model starts from its zeros and on its grid, wherever it was in between (a stock folder, a packed
folder, memory, another dtype), and a third round does the same. A chain that keeps neither says what it gives up. An
entry in config.json that no longer fits the weights is named and ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dovetail
from dovetail.chains.layer.held import GRIDS, grids
from dovetail.checkpoint.adapter import load_adapter, save_adapter
from dovetail.errors import ChainError, HistoryWarning
from dovetail.models.targets import find_targets
from families import VOCABULARY, batch, logits, make, move

FIRST = {
    "magnitude(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid": "llama",
    "magnitude(0.6) >> int(bits=3, group=64, symmetric=true) >> lora(r=4) >> remask >> regrid": "gpt2",
    "magnitude(0.5) >> nf4(double=true) >> dora(r=4) >> remask >> regrid(start=codes)": "llama",
    "magnitude(0.5) >> fp8 >> ia3 >> remask >> regrid": "qwen3",
    "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=4) >> remask >> regrid": "llama",
    "int(bits=2, group=32) >> loha(r=4) >> regrid": "mistral",
    'fp8(scale="tensor") >> lora(r=4) >> regrid': "llama",
    "magnitude(0.5) >> lora(r=4) >> remask": "gemma3",
    "fp4": "opt",
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), eos_token="t2", pad_token="t0"
    )


def targets(model: PreTrainedModel) -> list[str]:
    """The layers of the first block: enough, and faster than all."""
    return [target.name for target in find_targets(model) if ".0." in target.name]


def apply(model: PreTrainedModel, text: str, **settings: Any) -> PreTrainedModel:
    dovetail.apply(model, text, targets=targets(model), **settings)
    move(model)
    return model


@cache
def _merged(text: str, packed: bool) -> PreTrainedModel:
    model = make(FIRST[text])
    apply(model, text, calibration=[batch(model, seed=4)])
    dovetail.merge(model, packed=packed)
    return model


def merged(text: str, *, packed: bool = False) -> PreTrainedModel:
    return copy.deepcopy(_merged(text, packed))


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def packed(text: str, folder: Path) -> Any:
    dovetail.save_packed(merged(text, packed=True), folder / "packed", tokenizer=tokenizer())
    return dovetail.to_stock(dovetail.load(folder / "packed")[0])


WAYS: dict[str, Callable[[str, Path], Any]] = {
    "memory": lambda text, _: merged(text),
    "stock": lambda text, folder: dovetail.load(save(merged(text), folder))[0],
    "packed": packed,
    "bfloat16": lambda text, folder: dovetail.load(save(merged(text), folder), dtype="bfloat16")[0],
    "cast": lambda text, folder: merged(text).to(torch.bfloat16),
}


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).get_parameter("weight").detach().clone() for name in targets(model)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", FIRST)
def test_zeros_and_grid_live_on(text: str, way: str, tmp_path: Path) -> None:
    model = WAYS[way](text, tmp_path)
    pruned, grid = "(0." in text, "lora(r=4) >> remask" not in text.replace(" >> remask >> regrid", "")
    again = " >> ".join(["lora(r=4)", *(["remask"] if pruned else []), *(["regrid"] if grid else [])])
    before, kept = weights(model), grids(model)
    assert bool(kept) == grid
    for _ in range(2 if way == "stock" else 1):
        report = dovetail.merge(apply(model, again))
        assert report.exact
        assert (report.off_grid, report.given_up) == (0, ())
        assert report.sparsity_after == report.sparsity_before
        after = weights(model)
        assert any(not torch.equal(after[name], before[name]) for name in before)
        for name, weight in after.items():
            if pruned:
                assert not bool(weight[before[name] == 0].any())
            if grid:  # the same scales and zero points, bit for bit
                assert all(torch.equal(t, kept[name].tensors[key]) for key, t in grids(model)[name].tensors.items())


@pytest.mark.parametrize("text", FIRST)
def test_what_is_given_up_is_said(text: str) -> None:
    model = merged(text)
    zeros = sum(int((weight == 0).sum()) for weight in weights(model).values())
    total = sum(weight.numel() for weight in weights(model).values())
    with pytest.warns(HistoryWarning, match="gives up"):
        apply(model, "lora(r=4)")
    report = dovetail.merge(model)
    assert not report.exact
    if "(0." in text:
        assert "zeros" in report.given_up
        assert report.sparsity_before == zeros / total > 10 * report.sparsity_after
    assert ("grid" in report.given_up) == (" >> lora(r=4) >> remask" not in text.replace(" >> remask >> regrid", ""))
    apply(model, "lora(r=4)")  # nothing is left to give up
    assert not dovetail.merge(model).given_up


@pytest.mark.parametrize("text", FIRST)
def test_a_stale_entry_is_named_and_ignored(text: str, tmp_path: Path) -> None:
    model = WAYS["stock"](text, tmp_path)
    for parameter in model.parameters():  # plain fine-tuning
        parameter.data += 0.01
    model.save_pretrained(tmp_path)
    with pytest.warns(HistoryWarning, match="is ignored"):
        model, _ = dovetail.load(tmp_path)
    assert not grids(model)
    assert not apply(model, "lora(r=4)").config.to_dict().get("dovetail")


@pytest.mark.parametrize("text", [text for text in FIRST if "lora(r=4) >> remask >> regrid" in text])
def test_the_grid_is_the_only_one(text: str, tmp_path: Path) -> None:
    model, (quantizer,) = (
        WAYS["stock"](text, tmp_path),
        [link for link in dovetail.chain(text) if link.kind == "quantizer"],
    )
    with pytest.raises(ChainError, match="at most once"):
        apply(model, "nf4 >> lora(r=4) >> regrid")
    apply(model, f"{quantizer} >> lora(r=4) >> remask >> regrid")  # its own grid, continued; needs no data
    assert dovetail.merge(model).exact
    (tmp_path / GRIDS).unlink()
    with pytest.raises(ChainError, match="load the packed model"):
        apply(dovetail.load(tmp_path)[0], "lora(r=4) >> remask >> regrid")


@pytest.mark.parametrize("text", [text for text in FIRST if "lora(r=4) >> remask >> regrid" in text])
def test_an_adapter_of_a_second_round_is_saved_and_loaded(text: str, tmp_path: Path) -> None:
    model, base = merged(text), merged(text)
    save_adapter(apply(model, "lora(r=4) >> remask >> regrid", seed=3), tmp_path)
    load_adapter(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(base, batch(base)), logits(model, batch(base)))


@pytest.mark.parametrize("text", ["lora(r=4)", "magnitude(0.5) >> lora(r=4) >> remask", "nf4 >> lora(r=4) >> regrid"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_saved_loads(family: str, text: str, tmp_path: Path) -> None:
    model: Any = apply(make(family), text)
    for each in (model, copy.deepcopy(model), model.base_model):  # the body can be saved by itself
        with pytest.raises(ChainError, match=r"(?s)not merged.*save_adapter.*merge"):
            each.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
    dovetail.merge(model, packed=True)
    with pytest.raises(ChainError, match=r"(?s)packed.*save_packed.*to_stock"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    dovetail.to_stock(model)
    assert model.base_model.save_pretrained(tmp_path / "body") is None
    model.save_pretrained(tmp_path)
    again, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values())
    with torch.no_grad():
        assert torch.equal(logits(again.eval(), batch(again)), logits(model, batch(again)))


def test_a_chain_that_fails_leaves_a_model_that_can_be_saved(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(RuntimeError):
        dovetail.apply(model, "wanda(0.5) >> lora(r=4) >> remask", calibration=[{"input_ids": torch.zeros(1, 2)}])
    model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model)
