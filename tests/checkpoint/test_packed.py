"""Packed models: merged but run from their codes; on disk at the size that their zeros and bits allow; never half."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SqueezeBertConfig,
)

import dovetail
from dovetail.chains.layer.bits import join_zeros, split_zeros
from dovetail.chains.layer.fingerprint import packed_fingerprint
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.packed import HEADER, PACKED
from dovetail.errors import ChainError, DovetailError, LoadError
from dovetail.models.fingerprint import fingerprint
from families import VOCABULARY, batch, logits, make, move

MAIN = "wanda(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid"
CHAINS = [
    MAIN,
    "magnitude(0.5) >> int(bits=4, group=64, symmetric=true) >> lora(r=4) >> remask >> regrid",
    "wanda(0.5) >> int(bits=3, group=32) >> lora(r=4) >> remask >> regrid",
    "wanda(0.5) >> int(bits=8, group=0) >> ia3 >> remask >> regrid",
    "wanda(0.75) >> nf4(double=true) >> lora(r=4) >> remask >> regrid",
    "wanda(0.5) >> fp8 >> lora(r=4) >> remask >> regrid",
    "wanda(0.75) >> nvfp4 >> lora(r=4) >> remask >> regrid",
    "wanda(0.75) >> mxfp4 >> ia3 >> remask >> regrid",
    "hqq(bits=3, group=32) >> lora(r=4) >> regrid",
    "nf(bits=2, double=true) >> lora(r=4) >> regrid",
    "wanda(0.5) >> lora(r=4) >> remask",
    "int(bits=2, group=32) >> lora(r=4) >> regrid",
    "lora(r=4)",
]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), eos_token="t2", pad_token="t0"
    )


def packed(text: str = MAIN, family: str = "llama", model: Any = None, targets: str = "all-linear") -> PreTrainedModel:
    """A model tuned, merged and packed; checks that packing changed no output."""
    model = model or make(family)
    dovetail.apply(model, text, targets=targets, calibration=[batch(model, seed=4)])
    move(model)
    inputs = batch(model)
    with torch.no_grad():
        before = logits(model, inputs)
        report = dovetail.merge(model, probe=inputs, packed=True)
        if text != "lora(r=4)":  # which sums in another order when merged
            assert report.exact
            assert report.max_abs_logit_diff == 0
            assert torch.equal(logits(model, inputs), before)
    return model


def load(folder: Path, model: PreTrainedModel, **arguments: Any) -> PreTrainedModel:
    kind = "classification" if type(model).__name__.endswith("ForSequenceClassification") else "generation"
    return dovetail.load(folder, task_kind=kind, **arguments)[0]


def stored_bits(folder: Path, layers: list[str]) -> int:
    tensors = load_file(folder / PACKED)
    return sum(8 * t.nbytes for key, t in tensors.items() if any(key.startswith(f"{name}.base.") for name in layers))


def check_round_trip(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saves, loads, compares to the bit; then the same as stock modules. Returns what was loaded, then stock."""
    inputs, layers = batch(model), chain_layers(model)
    size = dovetail.save_packed(model, folder, tokenizer=tokenizer())
    assert size == dovetail.packed_size(folder)
    assert size.nbytes == (folder / PACKED).stat().st_size
    weights = sum(math.prod(layer.base.shape) for layer in layers.values())
    assert size.bits_per_weight == stored_bits(folder, list(layers)) / weights
    assert size.bits_per_weight <= dovetail.footprint(model).bits_per_weight
    state = torch.get_rng_state()
    again = load(folder, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model)
    assert packed_fingerprint(again) == packed_fingerprint(model) == again.config.dovetail["packed_fingerprint"]
    assert dovetail.footprint(again) == dovetail.footprint(model)
    assert not any(p.requires_grad for p in again.parameters())
    assert not again.training
    with torch.no_grad():
        wanted = logits(model, inputs)
        assert torch.equal(logits(again, inputs), wanted)
        assert dovetail.to_stock(again) is again
        assert torch.equal(logits(again, inputs), wanted)
    dovetail.to_stock(model)
    assert not chain_layers(again)
    assert {name: type(m) for name, m in again.named_modules()} == {name: type(m) for name, m in model.named_modules()}
    assert fingerprint(again) == fingerprint(model) == model.config.dovetail["merged_fingerprint"]
    assert again.config.dovetail == model.config.dovetail
    assert all(p.requires_grad for p in again.parameters())
    return again


OTHERS = ["phi3", "gpt2", "t5", "bert"]


# Every chain on Llama and on another family; the storage of a chain does not depend on the family.
@pytest.mark.parametrize(
    ("family", "text"),
    [("llama", text) for text in CHAINS] + [(OTHERS[place % 4], text) for place, text in enumerate(CHAINS)],
)
def test_a_packed_model_is_the_same_after_saving_and_as_stock(family: str, text: str, tmp_path: Path) -> None:
    model = packed(text, family)
    plain = make(family)
    check_round_trip(model, tmp_path / "packed")
    inputs = [batch(plain, seed=4)]
    dovetail.apply(plain, text, calibration=inputs)
    move(plain)
    dovetail.merge(plain)
    assert fingerprint(plain) == fingerprint(model)
    assert plain.config.dovetail == model.config.dovetail


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "falcon", "opt", "bloom", "gpt_neox", "mixtral", "t5_gated",
                                    "roberta", "distilbert"])  # fmt: skip
def test_other_families(family: str, tmp_path: Path) -> None:
    check_round_trip(packed(MAIN, family), tmp_path / "packed")


@pytest.mark.parametrize("text", [MAIN, "wanda(0.5) >> lora(r=4) >> remask", "nf4 >> lora(r=4) >> regrid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(make("llama").config, dtype=dtype).eval()
    check_round_trip(packed(text, model=model), tmp_path / "packed")


def test_convolutions(tmp_path: Path) -> None:
    config = SqueezeBertConfig(
        vocab_size=VOCABULARY, hidden_size=64, embedding_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    for text in ["magnitude(0.5) >> int(bits=4, group=16) >> lora(r=4) >> remask >> regrid",
                 "magnitude(0.5) >> lora(r=4) >> remask"]:  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(config).eval()
        model = packed(text, model=model, targets="encoder.layers.*.query,*.key,*.conv1d")
        assert any(type(layer.layout).__name__ == "ConvLayout" for layer in chain_layers(model).values())
        check_round_trip(model, tmp_path / text[-6:].strip())


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**make("llama").config.to_dict(), "tie_word_embeddings": True})
    )
    stock = check_round_trip(packed(model=model.eval()), tmp_path / "packed")
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    with safe_open(tmp_path / "packed" / PACKED, "pt") as file:
        assert [key for key in file.keys() if "embed" in key or "lm_head" in key] == ["model.embed_tokens.weight"]  # noqa: SIM118


def wide(dtype: torch.dtype) -> PreTrainedModel:
    """Wide enough for the weights to outweigh the header."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize(
    ("text", "dtype", "bits"),
    [
        # No adapter on a grid here: tuning moves some more codes to zero, and these need no value either.
        ("magnitude(0.5) >> int(bits=4, group=64)", torch.bfloat16, 1 + 0.5 * 4 + 16 / 64 + 4 / 64),
        ("magnitude(0.5) >> int(bits=4, group=64, symmetric=true)", torch.bfloat16, 1 + 0.5 * 4 + 16 / 64),
        ("magnitude(0.75) >> nf4(double=true)", torch.bfloat16, 1 + 0.25 * 4 + 8 / 64 + 32 / 64 / 256),
        ("magnitude(0.5) >> fp8", torch.bfloat16, 1 + 0.5 * 8 + 0.1125),
        ("magnitude(0.5) >> lora(r=4) >> remask", torch.bfloat16, 1 + 0.5 * 16),
        ("magnitude(0.7) >> lora(r=4) >> remask", torch.float32, 1 + 0.3 * 32),
        ("int(bits=4, group=64)", torch.bfloat16, 4 + 16 / 64 + 4 / 64),
        ("int(bits=3, group=64)", torch.bfloat16, 3 + 16 / 64 + 3 / 64),
    ],
)
def test_the_size_on_disk_is_the_formula(text: str, dtype: torch.dtype, bits: float, tmp_path: Path) -> None:
    model = packed(text, model=wide(dtype))
    size = dovetail.save_packed(model, tmp_path / "packed")
    assert size.bits_per_weight == pytest.approx(bits, rel=0.01)
    rest = sum(p.nbytes for name, p in model.named_parameters() if ".base." not in name)
    weights = sum(math.prod(layer.base.shape) for layer in chain_layers(model).values())
    header = int.from_bytes((tmp_path / "packed" / PACKED).read_bytes()[:8], "little") + 8
    assert size.nbytes == pytest.approx(size.bits_per_weight * weights / 8 + rest + header, rel=0.01)


def test_zeros_are_stored_as_bits_where_that_is_less(tmp_path: Path) -> None:
    cases = {
        MAIN: True,
        "int(bits=4, group=32)": False,
        "magnitude(0.1) >> lora >> remask": True,
        "magnitude(0.01) >> lora >> remask": False,
    }
    for number, (text, less) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        dovetail.save_packed(packed(text), folder)
        with safe_open(folder / PACKED, "pt") as file:
            assert any(key.endswith(".mask") for key in file.keys()) == less, text  # noqa: SIM118


@pytest.mark.parametrize("count", [8, 64, 1000, 1001])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_zeros_come_back_where_they_were(count: int, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 100, (count,), generator=generator, dtype=torch.int16)
    numbers[torch.rand(count, generator=generator) >= density] = 0
    parts = list(numbers.split(64))
    mask, values = split_zeros((part, part.new_zeros(1)) for part in parts)
    assert mask.shape == (math.ceil(count / 8),)
    assert torch.equal(values, numbers[numbers != 0])
    assert torch.equal(join_zeros(mask, values, (torch.zeros_like(part) for part in parts)), numbers)
    for wrong in (values[1:], torch.cat([values, values.new_ones(1)])):
        if wrong.shape != values.shape:
            with pytest.raises(ValueError, match="bits set"):
                join_zeros(mask, wrong, (torch.zeros_like(part) for part in parts))


def test_a_negative_zero_keeps_its_sign(tmp_path: Path) -> None:
    model = packed("magnitude(0.5) >> lora(r=4) >> remask")
    layer = next(iter(chain_layers(model).values()))
    assert not bool((layer.base.dense.view(torch.int32) == -(2**31)).any())  # merging makes none
    layer.base.dense.view(-1)[:3] = -0.0
    check_round_trip(model, tmp_path / "packed")


def test_loading_in_another_dtype_keeps_codes_and_scales(tmp_path: Path) -> None:
    model = packed()
    dovetail.save_packed(model, tmp_path / "packed", tokenizer=tokenizer())
    half = load(tmp_path / "packed", model, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, layer in chain_layers(half).items():
        grid = chain_layers(model)[name].base.quantized
        assert torch.equal(layer.base.quantized.codes, grid.codes)
        assert layer.base.quantized.scale_og.dtype == grid.scale_og.dtype
        assert layer.base.matrix().dtype == torch.bfloat16
    assert logits(half, batch(half)).dtype == torch.bfloat16


def test_a_packed_model_carries_no_chain_and_says_what_to_do() -> None:
    model = packed()
    for refused in (
        lambda: dovetail.merge(model),
        lambda: dovetail.apply(model, "lora(r=2)"),
        lambda: dovetail.advance(model),
        lambda: dovetail.save_adapter(model, "nowhere"),
    ):
        with pytest.raises(ChainError, match=r"(?s)packed.*to_stock"):
            refused()
    assert not Path("nowhere").exists()
    dovetail.apply(dovetail.to_stock(model), "lora(r=2) >> remask >> regrid")
    with pytest.raises(ChainError, match=r"(?s)is not merged.*merge"):
        dovetail.to_stock(model)


def test_any_module_can_be_packed_and_a_stock_one_stays_as_it_is() -> None:
    model = dovetail.apply(nn.Sequential(nn.Linear(8, 8)), "magnitude(0.5) >> lora(r=2) >> remask")
    move(model)
    assert dovetail.merge(model, packed=True, probe={"input": torch.ones(1, 8)}).max_abs_logit_diff == 0
    assert type(dovetail.to_stock(model)[0]) is nn.Linear
    assert dovetail.to_stock(model) is model


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(ChainError, match="no packed layer"):
        dovetail.save_packed(model, tmp_path / "a")
    dovetail.apply(model, "nf4 >> lora(r=2)")
    with pytest.raises(ChainError, match=r"(?s)is not merged.*packed=True"):
        dovetail.save_packed(model, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(DovetailError, match="new or empty folder"):
        dovetail.save_packed(packed(), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("at", ["save_file", "tokenizer", "config"])
def test_a_kill_in_the_middle_leaves_nothing(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    model, words = packed(), tokenizer()
    with monkeypatch.context() as patch:
        if at == "save_file":
            patch.setattr("dovetail.checkpoint.packed.save_file", killed)
        elif at == "tokenizer":
            patch.setattr(type(words), "save_pretrained", killed)
        else:
            patch.setattr(type(model.config), "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            dovetail.save_packed(model, tmp_path / "packed", tokenizer=words)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".packed.part").mkdir()  # what a hard kill leaves
    (tmp_path / ".packed.part" / PACKED).touch()
    check_round_trip(model, tmp_path / "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


LAYER = "model.layers.0.mlp.up_proj"
CODES = f"{LAYER}.base.quantized.codes"
SCALE = f"{LAYER}.base.quantized.scale_og"
Tensors, Header = dict[str, Tensor], dict[str, Any]


def swap(tensors: Tensors, header: Header) -> None:
    key = "model.embed_tokens.weight"
    tensors[key] = tensors[key].t().contiguous()


def popcount(tensors: Tensors, header: Header) -> None:
    tensors[f"{CODES}.mask"][0] ^= 1


def other_count(tensors: Tensors, header: Header) -> None:
    header["layers"][LAYER]["nonzero"] += 16
    tensors[f"{CODES}.values"] = torch.cat([tensors[f"{CODES}.values"], torch.zeros(8, dtype=torch.uint8)])


def nan_scale(tensors: Tensors, header: Header) -> None:
    tensors[SCALE][3, 0] = torch.nan


def flip(key: str) -> Callable[[Tensors, Header], None]:
    def flipped(tensors: Tensors, header: Header) -> None:
        tensors[key].view(torch.uint8).view(-1)[5] ^= 1

    return flipped


def says(**changes: Any) -> Callable[[Tensors, Header], None]:
    return lambda tensors, header: header["layers"][LAYER].update(changes)


HOSTILE: dict[str, tuple[Callable[[Tensors, Header], Any], str]] = {
    "another shape": (swap, r"embed_tokens\.weight of shape \[64, 128\]"),
    "another dtype": (lambda t, h: t.update({SCALE: t[SCALE].double()}), "scale_og of shape .*float64"),
    "another norm": (lambda t, h: t.update({"model.norm.weight": torch.ones(64, dtype=torch.uint8)}), "norm.*uint8"),
    "a short mask": (lambda t, h: t.update({f"{CODES}.mask": t[f"{CODES}.mask"][1:]}), "mask of shape"),
    "short values": (lambda t, h: t.update({f"{CODES}.values": t[f"{CODES}.values"][1:]}), "values of shape"),
    "a bit less in the mask": (popcount, r"up_proj.*bits set"),
    "more values than bits": (other_count, r"up_proj.*bits set"),
    "NaN scale": (nan_scale, r"up_proj: weights that are NaN"),
    "infinite scale": (lambda t, h: t[SCALE].fill_(torch.inf), r"up_proj: weights that are NaN or inf"),
    "extra key": (lambda t, h: t.update(surprise=torch.zeros(1)), "surprise in the file alone"),
    "missing key": (lambda t, h: t.pop(SCALE), r"scale_og missing"),
    "codes and mask": (lambda t, h: t.update({CODES: torch.zeros(4096, dtype=torch.uint8)}), "codes in the file alone"),
    "a flipped code": (flip(f"{CODES}.values"), "fingerprint"),
    "a flipped scale": (flip(SCALE), "fingerprint"),
    "a flipped embedding": (flip("model.embed_tokens.weight"), "fingerprint"),
    "another grid": (says(quantizer="int(bits=4, group=64, symmetric=False)"), "scale_og of shape"),
    "a symmetric grid": (says(quantizer="int(bits=4, group=32, symmetric=True)"), "zero_og in the file alone"),
    "a code book": (says(quantizer="nf4"), r"absmax|scale"),
    "no grid": (says(quantizer=None), "up_proj"),
    "no quantizer": (says(quantizer="lora(r=4)"), r"up_proj: lora\(r=4\)"),
    "two links": (says(quantizer="nf4 >> lora(r=4)"), "up_proj"),
    "nonsense": (says(quantizer="__import__('os')"), "up_proj"),
    "a group that doesn't fit": (says(quantizer="int(bits=4, group=7)"), "up_proj: in_features=64, group=7"),
    "another width": (says(shape=[128, 65]), "up_proj: a layer of 128 x 65"),
    "another precision": (says(dtype="bfloat16"), "fingerprint"),
    "an unknown precision": (says(dtype="float8"), "dtype"),
    "a negative count": (says(nonzero=-1), "nonzero"),
    "an unknown field": (says(surprise=1), "surprise"),
    "a huge count": (says(nonzero=2**60), "values of shape"),
    "another layer": (lambda t, h: h["layers"].update(nowhere=h["layers"][LAYER]), "nowhere"),
    "no layer": (lambda t, h: h["layers"].update({"model.norm": h["layers"][LAYER]}), r"model\.norm"),
    "a layer less": (lambda t, h: h["layers"].pop(LAYER), r"up_proj.*in the file alone"),
    "another class": (lambda t, h: h.update(architecture="LlamaForSequenceClassification"), "task_kind"),
    "another version": (lambda t, h: h.update(version=2), "version"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "packed"
    dovetail.save_packed(packed(), folder, tokenizer=tokenizer())
    return folder


def damaged(saved: Path, folder: Path, change: Callable[[Tensors, Header], Any]) -> Path:
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with safe_open(saved / PACKED, "pt") as file:
        header = json.loads(file.metadata()[HEADER])
    tensors = load_file(saved / PACKED)
    change(tensors, header)
    save_file(tensors, folder / PACKED, {HEADER: json.dumps(header)})
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_by_name(name: str, saved: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    with pytest.raises(LoadError, match=rf"(?s){message}") as caught:
        dovetail.load(damaged(saved, tmp_path / "bad", change))
    assert caught.value.found
    assert caught.value.rule


def test_damaged_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad", lambda tensors, header: None)
    assert chain_layers(dovetail.load(folder)[0])
    whole = (folder / PACKED).read_bytes()
    for bad in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 1000, whole + b"more"):
        (folder / PACKED).write_bytes(bad)
        with pytest.raises(LoadError):
            dovetail.load(folder)
        with pytest.raises(LoadError):
            dovetail.packed_size(folder)
    save_file(load_file(saved / PACKED), folder / PACKED)
    with pytest.raises(LoadError, match="save_packed did not write"):
        dovetail.load(folder)
    (folder / PACKED).write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"hidden_size": 128}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"vocab_size": 10**12},
                   {"dovetail": None}, {"dovetail": {"packed_fingerprint": 3}}, {"dovetail": "x"}):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(LoadError):
            dovetail.load(folder)
    with pytest.raises(LoadError, match="No such file"):
        dovetail.packed_size(tmp_path / "nowhere")


def test_a_packed_classifier_loads_as_what_it_is_alone(tmp_path: Path) -> None:
    model = packed(family="bert")
    dovetail.save_packed(model, tmp_path / "packed", tokenizer=tokenizer())
    with pytest.raises(LoadError, match=r"(?s)BertForSequenceClassification.*task_kind"):
        dovetail.load(tmp_path / "packed")
    with pytest.raises(LoadError, match="classifier"):
        dovetail.load(tmp_path / "packed", task_kind="classification", num_labels=3)
