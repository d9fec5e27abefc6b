"""GGUF files: what loads equals what was written, is an ordinary model, and is found wherever a model is named."""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dovetail
from dovetail.checkpoint.config import load_config, load_tokenizer
from dovetail.checkpoint.load import load
from dovetail.errors import ConversionWarning, LoadError
from dovetail.models.locate import resolve
from dovetail.runs.plan import plan
from families import batch, logits, make

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from gguf_files import ARCHITECTURES, TEMPLATE, make_plain, write_gguf  # noqa: E402

Q8 = gguf.GGMLQuantizationType.Q8_0
Q4 = gguf.GGMLQuantizationType.Q4_0
F16 = gguf.GGMLQuantizationType.F16


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(make("llama"), tmp_path_factory.mktemp("llama") / "tiny.gguf", "llama")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_loads_is_what_was_written_and_saves_as_a_checkpoint(family: str, tmp_path: Path) -> None:
    original = make_plain(family)
    path = write_gguf(original, tmp_path / "model.gguf", family)
    model, tokenizer = load(path)
    assert type(model) is type(original)
    assert not model.training
    inputs = batch(original)
    with torch.no_grad():
        expected = logits(original, inputs)
        # A norm of Gemma is stored plus 1, and loses the last bits of float32.
        assert (logits(model, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.convert_ids_to_tokens(tokenizer("abb", add_special_tokens=False).input_ids) == ["ab", "b"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    tied = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert (tied[0] is tied[1]) == model.config.tie_word_embeddings == original.config.tie_word_embeddings

    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in said
    assert said["vocab_size"] == original.config.vocab_size
    again, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    with torch.no_grad():
        assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))
    stock = AutoTokenizer.from_pretrained(folder)
    assert stock.chat_template == TEMPLATE
    assert stock("ab b").input_ids == tokenizer("ab b").input_ids


@pytest.mark.parametrize("kind", [Q8, Q4, F16])
def test_blocks_are_dequantized_and_halves_stay(kind: Any, tmp_path: Path) -> None:
    original = make("llama")
    path = write_gguf(original, tmp_path / "model.gguf", "llama", kind)
    model, _ = load(path)
    assert model.dtype == (torch.float16 if kind is F16 else torch.float32)
    weight, wanted = (m.get_parameter("model.layers.0.mlp.up_proj.weight").detach() for m in (model, original))
    expected = gguf.dequantize(gguf.quantize(wanted.numpy(), kind), kind)
    assert torch.equal(weight.float(), torch.from_numpy(expected))
    assert load(path, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_chain_on_it_merges_and_loads(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(llama)
    dovetail.apply(model, "magnitude(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid")
    assert dovetail.merge(model).exact
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    inputs = batch(model)
    with torch.no_grad():
        assert torch.equal(logits(dovetail.load(tmp_path)[0], inputs), logits(model, inputs))


def test_heads(llama: Path) -> None:
    model, _ = load(llama, task_kind="classification", num_labels=3)
    assert logits(model, batch(model)).shape == (2, 3)


def test_every_way_of_naming_it(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    (tmp_path / "empty").mkdir()
    for name in (llama, str(llama), llama.name, f"./{llama.name}"):
        assert load_config(name).model_type == "llama"
        assert Path(resolve(name)).resolve() == llama
    made = plan("nf4 >> lora(r=4)", str(llama), memory=False)
    assert made.legal
    assert made.nbytes == plan("nf4 >> lora(r=4)", make("llama").config, memory=False).nbytes
    recipe = {"model": llama.name, "chain": "lora(r=4)", "data": {"task": "word_problems"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe | {"model": "model.gguf"}))
    (tmp_path / "model.gguf").write_bytes(llama.read_bytes())
    assert dovetail.Recipe.load(path).model == str(tmp_path / "model.gguf")
    with pytest.raises(LoadError, match=r"name the file, as in .*model.gguf"):
        load_config(tmp_path)
    for missing in ("none.gguf", "./none.gguf", str(tmp_path / "none.gguf")):
        with pytest.raises(LoadError, match="no such"):
            load(missing)


def test_a_recipe_runs_from_a_file(llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "answer": "b"}, {"prompt": "b", "answer": "a"}] * 4
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.gguf").write_bytes(llama.read_bytes())
    recipe = {
        "model": "tiny.gguf", "chain": "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=4) >> remask >> regrid",
        "data": {"kind": "generation", "train": "train.jsonl", "test": "test.jsonl"},
        "train": {"max_steps": 2, "batch_size": 4}, "calibration": {"samples": 4},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    report = dovetail.run(dovetail.Recipe.load(path), output=tmp_path / "run", progress=False)
    assert report.merge is not None
    assert report.merge.exact
    assert report.merge.max_abs_logit_diff == 0
    assert report.checkpoint is not None
    assert report.checkpoint.max_abs_logit_diff == 0


# Packages.


def packaged(folder: Path, content: bytes, *, parts: int, digest: str | None = None) -> None:
    """Write a package tiny_gguf_model that holds a file, whole or in parts of their own packages."""
    data = folder / "tiny_gguf_model" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").write_text("raise AssertionError('no code of a package is run')\n")
    if digest:
        (data / "SHA256SUMS").write_text(f"{digest}  tiny.gguf\n")
    if parts == 0:
        (data / "tiny.gguf").write_bytes(content)
    size = -(-len(content) // max(1, parts))
    for number in range(parts):
        part = folder / f"tiny_gguf_model_part{number + 1}" / "data"
        part.mkdir(parents=True)
        (part.parent / "__init__.py").write_text("")
        (part / f"tiny.gguf.part{number:02}").write_bytes(content[number * size : (number + 1) * size])


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return tmp_path / "packages"


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_package_holds_a_file_or_its_parts(llama: Path, installed: Path, parts: int) -> None:
    content = llama.read_bytes()
    packaged(installed, content, parts=parts, digest=hashlib.sha256(content).hexdigest())
    found = resolve("package:tiny_gguf_model")
    assert isinstance(found, Path)
    assert found.read_bytes() == content
    assert resolve("package:tiny_gguf_model") == found
    assert load_tokenizer("package:tiny_gguf_model").chat_template == TEMPLATE
    assert "tiny_gguf_model" not in sys.modules
    if parts == 0:
        assert resolve("package:tiny_gguf_model/data/tiny.gguf") == found
        with pytest.raises(LoadError, match=r"no config.json"):
            load_config("package:tiny_gguf_model/data")
    else:
        found.write_bytes(b"cut")  # joined again
        assert Path(resolve("package:tiny_gguf_model")).read_bytes() == content


def test_packages_that_hold_no_one_model(llama: Path, installed: Path) -> None:
    content = llama.read_bytes()
    packaged(installed, content, parts=3, digest="0" * 64)
    with pytest.raises(LoadError, match="SHA256SUMS"):
        resolve("package:tiny_gguf_model")
    assert not list((installed.parent / "cache").rglob("*.gguf"))
    (installed / "tiny_gguf_model_part2" / "data" / "tiny.gguf.part01").unlink()
    with pytest.raises(LoadError, match="parts 0, 2"):
        resolve("package:tiny_gguf_model")
    (installed / "tiny_gguf_model" / "other.gguf").write_bytes(content)
    with pytest.raises(LoadError, match=r"other.gguf, tiny.gguf.*\n.*one GGUF file"):
        resolve("package:tiny_gguf_model")
    with pytest.raises(LoadError, match=r"no config\.json and no GGUF file"):
        resolve("package:torch")


# Damaged and hostile files.


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def put(at: int, format: str, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + struct.pack(format, value) + content[at + struct.calcsize(format) :]


def after(key: str, at: int, format: str, value: int) -> Callable[[bytes], bytes]:
    """Change what stands `at` bytes after the name of a key or a tensor."""
    return lambda content: put(content.index(key.encode()) + len(key) + at, format, value)(content)


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "empty"),
    "magic": (lambda content: b"GGML" + content[4:], "first bytes b'GGML'"),
    "text": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "first bytes b'vers'"),
    "only the magic": (lambda content: content[:4], "beyond the end"),
    "cut in the header": (cut(0.01), "beyond the end"),
    "cut in the data": (cut(0.7), "up to byte"),
    "big-endian": (put(4, ">I", 3), "version"),
    "version 1": (put(4, "<I", 1), "version 1"),
    "tensors": (put(8, "<Q", 2**60), "1,152,921,504,606,846,976 tensors"),
    "a few tensors more": (put(8, "<Q", 60), "beyond the end|dimensions|bytes|decode|ggml type"),
    "keys": (put(16, "<Q", 2**60), "1,152,921,504,606,846,976 keys"),
    "a key's length": (put(24, "<Q", 2**63), "a text of"),
    "elements": (after("tokenizer.ggml.tokens", 8, "<Q", 2**50), "elements"),
    "an element's length": (after("tokenizer.ggml.tokens", 16, "<Q", 2**50), "beyond the end"),
    "nested arrays": (after("tokenizer.ggml.tokens", 4, "<I", 9), "an array of type 9"),
    "a type": (after("llama.block_count", 0, "<I", 77), "a value of type 77"),
    "layers": (after("llama.block_count", 4, "<I", 2**31), "llama.block_count=2147483648"),
    "more layers": (after("llama.block_count", 4, "<I", 3), "weights of LlamaForCausalLM not stored"),
    "width": (after("llama.embedding_length", 4, "<I", 2**20), "weights"),
    "a wider model": (after("llama.feed_forward_length", 4, "<I", 2**24), "weights, and files of"),
    "dimensions": (after("token_embd.weight", 0, "<I", 2**31), "dimensions"),
    "a shape": (after("token_embd.weight", 12, "<Q", 2**62), "up to byte"),
    "a ggml type": (after("token_embd.weight", 20, "<I", 9999), "ggml type 9999"),
    "a shared place": (after("output_norm.weight", 16, "<Q", 0), "where another tensor is"),
    "an offset": (after("token_embd.weight", 24, "<Q", 2**63), "up to byte"),
    "an unknown architecture": (lambda c: c.replace(b"llama", b"zorka"), "zorka"),
    "no architecture": (lambda c: c.replace(b"general.architecture", b"general.architectura"), "architecture"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_by_name(name: str, llama: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(llama.read_bytes()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoadError, match=message) as refused:
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    assert refused.value.rule
    assert refused.value.fix
    assert str(path) in str(refused.value)


def test_without_the_package(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    for call in (load, load_config, load_tokenizer):
        with pytest.raises(LoadError, match=r"(?s)no package gguf.*pip install gguf"):
            call(llama)


def test_what_the_model_does_not_follow_is_named(tmp_path: Path) -> None:
    path = write_gguf(make("llama"), tmp_path / "scaled.gguf", "llama", keys={"llama.rope.scaling.factor": 8})
    with pytest.warns(ConversionWarning, match=r"llama\.rope\.scaling\.factor"):
        load(path)


def test_one_of_several_files_is_refused(tmp_path: Path) -> None:
    path = write_gguf(make("llama"), tmp_path / "part.gguf", "llama", keys={"split.count": 2})
    with pytest.raises(LoadError, match=r"(?s)one of 2 files.*llama-gguf-split --merge"):
        load(path)
