"""A GGUF file's own grid as a base: read as transformers reads it, trained, merged, packed, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import dovetail
from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.linear import chain_layers, packed_layers
from dovetail.checkpoint.config import load_config
from dovetail.checkpoint.load import load
from dovetail.errors import ChainError, HistoryWarning, LoadError
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockWeight
from dovetail.runs.plan import plan
from families import batch, logits, make, move

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_files import ARCHITECTURES, make_plain, write_gguf  # noqa: E402

torch.set_num_threads(1)
KIND = gguf.GGMLQuantizationType
CHAIN = "keep >> lora(r=4) >> regrid"


def wide() -> PreTrainedModel:
    """A Llama whose rows hold blocks of 256 weights, with grouped queries."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


MIXED = {
    "attn_q": KIND.Q4_K, "attn_k": KIND.Q5_0, "attn_v": KIND.Q6_K, "attn_output": KIND.Q8_0, "ffn_gate": KIND.IQ4_NL,
    "ffn_up": KIND.Q3_K, "ffn_down": KIND.Q2_K, "token_embd": KIND.Q8_0, "output": KIND.F16,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(wide(), tmp_path_factory.mktemp("mixed") / "mixed.gguf", "llama", kinds=MIXED)


def kept(path: Path, **given: Any) -> PreTrainedModel:
    return load(path, grid="keep", **given)[0]


def grid(model: torch.nn.Module, name: str) -> QuantizedWeight:
    found = chain_layers(model)[name].base.quantized
    assert found is not None
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_kept_model_computes_what_the_dequantized_one_does(family: str, tmp_path: Path) -> None:
    path = write_gguf(make_plain(family), tmp_path / "model.gguf", family, KIND.Q5_1, kinds={"attn_v": KIND.Q8_0})
    model, dense = kept(path), load(path)[0]
    layers = chain_layers(model)
    inputs = batch(dense)
    with torch.no_grad():
        assert torch.equal(logits(model, inputs), logits(dense, inputs))
    for name, layer in layers.items():
        weight = layer.layout.matrix(dense.get_submodule(name).get_parameter("weight").detach())
        assert torch.equal(layer.base.matrix(), weight)
        assert layer.base.identity in ('keep(format="Q5_1")', 'keep(format="Q8_0")')
    others = {n: p for n, p in dense.named_parameters() if n.rpartition(".")[0] not in layers}
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in others.items())


def test_layers_of_one_file_differ(mixed: Path) -> None:
    model, dense = kept(mixed), load(mixed)[0]
    found = {name.rpartition(".")[2]: layer.base.identity for name, layer in chain_layers(model).items()}
    assert found == {
        f"{label}_proj": f'keep(format="{kind}")'
        for label, kind in zip(
            ("q", "k", "v", "o", "gate", "up", "down"),
            ("Q4_K", "Q5_0", "Q6_K", "Q8_0", "IQ4_NL", "Q3_K", "Q2_K"),
            strict=True,
        )
    }
    with torch.no_grad():
        assert torch.equal(logits(model, batch(dense)), logits(dense, batch(dense)))
    counted = dovetail.footprint(model)
    layers = chain_layers(model)
    bits = {kind: 8 * form.nbytes / form.block for kind, form in BLOCK_FORMATS.items()}
    weights = {name: layer.base.shape[0] * layer.base.shape[1] for name, layer in layers.items()}
    expected = sum(bits[layer.base.identity.split('"')[1]] * weights[name] for name, layer in layers.items())
    assert counted.bits_per_weight == expected / sum(weights.values())
    made = plan(CHAIN, str(mixed), memory=False)
    assert made.legal
    assert made.mergeable
    assert made.bits_per_weight == counted.bits_per_weight
    assert made.chain == CHAIN


@pytest.mark.parametrize("packed", [True, False])
def test_a_tuned_model_merges_without_loss(packed: bool, mixed: Path, tmp_path: Path) -> None:
    model, tokenizer = load(mixed, grid="keep")
    before = {name: grid(model, name) for name in chain_layers(model)}
    dovetail.apply(model, CHAIN)
    move(model)
    inputs = batch(model)
    with torch.no_grad():
        expected = logits(model, inputs)
    report = dovetail.merge(model, packed=packed)
    assert report.exact
    assert report.off_grid == 0
    with torch.no_grad():
        assert torch.equal(logits(model, inputs), expected)
    said = model.config.dovetail
    assert said["chain"] == CHAIN
    assert said["source"] == str(mixed)
    if packed:
        moved = 0
        for name, old in before.items():
            new = grid(model, name)
            assert isinstance(new, BlockWeight)
            assert isinstance(old, BlockWeight)
            assert torch.equal(new.scales, old.scales)
            moved += int((new.codes != old.codes).sum())
        assert moved > 0
        dovetail.save_packed(model, tmp_path / "out", tokenizer=tokenizer)
    else:
        model.save_pretrained(tmp_path / "out")
        tokenizer.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")[0]
    with torch.no_grad():
        assert torch.equal(logits(again, inputs), expected)
    # A second round continues on the same grid, from codes or from values.
    dovetail.apply(again, CHAIN)
    assert [layer.base.identity for layer in chain_layers(again).values()] == [q.identity for q in before.values()]
    assert dovetail.merge(again, packed=True).exact


def test_nothing_trained_changes_no_byte(mixed: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        model = kept(mixed, dtype=dtype)
        before = {name: grid(model, name) for name in chain_layers(model)}
        dovetail.apply(model, CHAIN)
        assert dovetail.merge(model, packed=True).exact
        for name, old in before.items():
            assert torch.equal(grid(model, name).codes, old.codes)


def test_some_layers_and_the_others_stay_packed(mixed: Path) -> None:
    model = kept(mixed)
    codes = {name: layer.base.stored.clone() for name, layer in chain_layers(model).items()}
    dovetail.apply(model, CHAIN, targets=["down", "query"])
    assert len(chain_layers(model)) == 2
    assert len(packed_layers(model)) == 5
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert dovetail.footprint(model).left_out["quantized layers"] > 0
    move(model)
    assert dovetail.merge(model, packed=True).exact
    assert len(chain_layers(model)) == 7
    same = {name for name, layer in chain_layers(model).items() if torch.equal(layer.base.stored, codes[name])}
    assert len(same) == 5


def test_an_adapter_belongs_to_its_file(mixed: Path, tmp_path: Path) -> None:
    model = kept(mixed)
    dovetail.apply(model, CHAIN)
    move(model)
    dovetail.save_adapter(model, tmp_path / "adapter")
    inputs = batch(model)
    again = kept(mixed)
    dovetail.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(logits(again, inputs), logits(model, inputs))
    said = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert said["chain"] == CHAIN
    assert 'keep(format="Q4_K")' in said["quantizer"]
    content = bytearray(mixed.read_bytes())
    content[-1] ^= 1  # a code of the last tensor
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(LoadError, match="the base must be the one that the adapter was trained on"):
        dovetail.load_adapter(kept(tmp_path / "other.gguf"), tmp_path / "adapter")
    with pytest.raises(LoadError, match="the base must be the one that the adapter was trained on"):
        dovetail.load_adapter(load(mixed)[0], tmp_path / "adapter")


def test_pruning_needs_a_zero(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ChainError, match=r"(?s)magnitude, link 2 of .* at model.*_proj.*keep\(format=\w+\) before it.*no exact zero"
    ):
        dovetail.apply(kept(mixed), "keep >> magnitude(0.5) >> lora(r=4) >> remask >> regrid")
    model = kept(mixed)
    targets = ["key", "value", "output", "up"]
    dovetail.apply(model, "keep >> magnitude(0.5) >> lora(r=4) >> remask >> regrid", targets=targets)
    move(model)
    dovetail.save_adapter(model, tmp_path / "adapter")
    dovetail.load_adapter(again := kept(mixed), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(logits(again, batch(model)), logits(model, batch(model)))
    report = dovetail.merge(model, packed=True)
    assert report.exact
    assert report.sparsity_after >= 0.5
    dovetail.save_packed(model, tmp_path / "packed")


def test_what_has_no_grid_is_refused(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(ChainError, match=r"(?s)keep, link 1 of.*without a grid.*grid="):
        dovetail.apply(make("llama"), CHAIN)
    with pytest.raises(ChainError, match=r"(?s)keep, link 1 of.*without a grid"):
        dovetail.apply(load(mixed)[0], CHAIN)
    assert "without a grid" in plan(CHAIN, memory=False).problem
    plain = write_gguf(make("llama"), tmp_path / "plain.gguf", "llama")
    with pytest.raises(LoadError, match=r"(?s)F32, and no linear layer in blocks.*leave grid out"):
        kept(plain)
    with pytest.raises(LoadError, match=r"grid=keep keeps the grid of a GGUF file"):
        load("playground", grid="keep")
    with pytest.raises(LoadError, match="grid=drop"):
        load(mixed, grid="drop")  # type: ignore[arg-type]
    with pytest.raises(LoadError, match="not stored"):
        kept(mixed, task_kind="classification", num_labels=2)
    with pytest.raises(ChainError, match=r"at most once"):
        dovetail.apply(kept(mixed), "int(bits=4, group=32) >> lora(r=4) >> regrid")
    half = write_gguf(wide(), tmp_path / "half.gguf", "llama", kinds=MIXED | {"ffn_down": KIND.F16})
    with pytest.raises(ChainError, match=r"(?s)keep, link 1.*mlp.down_proj.*without a grid"):
        dovetail.apply(kept(half), CHAIN)
    dovetail.apply(model := kept(half), CHAIN, targets=["all-linear", "!*.down_proj"])
    assert dovetail.merge(model).exact


def test_a_chain_that_gives_up_the_grid_needs_stock_modules(mixed: Path) -> None:
    model = kept(mixed)
    with pytest.raises(ChainError, match=r"(?s)packed.*gives up the grid.*lora\(r=4\) >> regrid.*to_stock"):
        dovetail.apply(model, "lora(r=4)")
    with pytest.warns(HistoryWarning, match="gives up its quantization grid"):
        dovetail.apply(dovetail.to_stock(model), "lora(r=4)")
    assert dovetail.merge(model).given_up == ("grid",)


def test_a_recipe_keeps_the_grid_of_a_file(mixed: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "answer": "b"}, {"prompt": "b", "answer": "a"}] * 4
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(mixed), "chain": CHAIN, "train": {"max_steps": 2, "batch_size": 4},
        "data": {"kind": "generation", "train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")},
        "calibration": {"samples": 4},
    }  # fmt: skip
    report = dovetail.run(recipe, output=tmp_path / "run", progress=False)
    assert report.chain == CHAIN
    assert report.merge is not None
    assert report.merge.exact
    assert report.merge.max_abs_logit_diff == 0
    assert report.packed is not None
    assert report.packed.max_abs_logit_diff == 0
    assert report.checkpoint is not None
    assert report.checkpoint.max_abs_logit_diff == 0


def test_names_are_those_of_transformers(mixed: Path, tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    from dovetail.checkpoint.config import empty_model
    from dovetail.checkpoint.formats.gguf.header import read_header
    from dovetail.checkpoint.formats.gguf.names import Names

    for family in ARCHITECTURES:
        path = write_gguf(make_plain(family), tmp_path / f"{family}.gguf", family)
        model = empty_model(load_config(path))
        names = Names(read_header(path), model)
        assert names.names == get_gguf_hf_weights_map(model, names.processor)


def test_attacks_find_nothing() -> None:
    """A short run; `tests/attacks/gguf_keep.py` makes a long one."""
    from attacks.gguf_keep import attack

    found = attack(40, seed=1)
    assert found["LoadError"] > 10
    assert found["the file's own values"] > 0
