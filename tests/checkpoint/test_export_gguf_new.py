"""GGUF files that are like no other: transformers finds the model in them, and llama.cpp computes the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges
from typer.testing import CliRunner

import dovetail
import small_tokenizers
from dovetail.checkpoint.export import export
from dovetail.checkpoint.load import load
from dovetail.checkpoint.verify import verify
from dovetail.cli.main import app
from dovetail.errors import ConversionWarning, ExportError
from families import CONFIGS

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
from dovetail.checkpoint.formats.gguf.vocabulary import PRE_TOKENIZERS  # noqa: E402
from gguf_files import UNWRITTEN  # noqa: E402
from llama_cpp import likeliest, tokens  # noqa: E402

torch.set_num_threads(1)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
CHAIN = "int(bits=4, group=32, symmetric=signed)"
TOKENIZER = small_tokenizers.bytes_bpe("<s> $A")
TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n🚀 (normal) 😶‍🌫️ ✅ 3 33 333 3333 33333 3.3 3..3 我想在apple工作1314151天~ "
    "---====== нещо на Български ''''```\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not, "
    "'D you like tea? We'Ve a'lL  hello   world /path/to/file.txt\r\n\r\nHelloWORLD camelCase Ünïcödé x² ½ ١٢٣ "
)
KHMER = "កាន់តែពិសេសអាច"
"""A text with combining marks, which llama.cpp's regular expressions of tekken and gpt-4o do not have."""


def model_of(family: str, **given: Any) -> PreTrainedModel:
    """Return the tiny model of a family, with values that a GGUF file tells transformers, and norms that are not 1."""
    config = CONFIGS[family]()
    heads = {"head_dim": 256} if family.startswith("gemma") else {}
    for key, value in {
        **UNWRITTEN.get(family, {}),
        "vocab_size": 384,
        "initializer_range": 0.25,
        **heads,
        **given,
    }.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def packed(model: PreTrainedModel, chain: str = CHAIN, **given: Any) -> PreTrainedModel:
    dovetail.apply(model, chain, **given)
    dovetail.merge(model, packed=True)
    return model


def metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def check_in_llama_cpp(model: PreTrainedModel, path: Path) -> None:
    """Compare the log-probabilities of one step; llama.cpp rounds activations to 8 bits, and its cache to float16."""
    pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    prompts = [[1, *(5 + at * 37 % 300 for at in range(length))] for length in (9, 12, 40)]
    answers = likeliest(path, *prompts, top=384)
    ids, (found,) = next((ids, steps) for ids, steps in zip(prompts, answers, strict=True) if steps)
    run: Any = model
    expected = run(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    worst = max(abs(float(expected[token]) - each) for token, each in found.items() if each > -20)
    assert worst < 0.03 * float(expected.max() - expected.min())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path) -> None:
    model = packed(model_of(family), "int(bits=8, group=32, symmetric=signed)")
    path = tmp_path / "model.gguf"
    report = export(model, "gguf", path, tokenizer=TOKENIZER)
    assert report.claim == "values"
    assert {layer.kind for layer in report.layers.values()} == {"Q8_0"}
    assert [claim.outcome for claim in verify(path, model).claims] == ["holds"] * 3
    assert metadata(path)["general.file_type"] == 7
    check_in_llama_cpp(model, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_that_are_not_quantized_have_the_dtype_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    dense: Any = model_of("gemma3")
    model = packed(dense.to(dtype), targets=["*.down_proj"])
    export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert verify(tmp_path / "model.gguf", model).holds


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    model = packed(model_of("llama", rope_parameters=rope, attention_bias=True), targets=["*.down_proj"])
    export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER)
    check_in_llama_cpp(model, tmp_path / "model.gguf")
    if kind == "llama3":
        with pytest.warns(ConversionWarning, match="rope_freqs"):
            load(tmp_path / "model.gguf")


def test_the_playground_continues_with_the_same_tokens(tmp_path: Path) -> None:
    model, tokenizer = dovetail.load("playground")
    packed(model)
    path = tmp_path / "play.gguf"
    dovetail.save_packed(model, tmp_path / "packed", tokenizer=tokenizer)
    command = ["export", str(tmp_path / "packed"), "--to", "gguf", "-o", str(path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    texts = ["Tom has 3 apples. He buys 4 more. How many apples does he have?", "The sum of 12 and 7 is"]
    prompts = tokenizer(texts)["input_ids"]
    assert tokens(path, *texts) == prompts
    run: Any = model
    for ids, steps in zip(prompts, likeliest(path, *prompts, count=12), strict=True):
        with torch.no_grad():
            expected = run.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        found = [next(iter(step)) for step in steps]
        assert found == expected[: len(found)]
        assert found


def byte_level(steps: tuple[str, ...], ignore_merges: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, last])
    tokenizer.decoder = decoders.ByteLevel()
    special = small_tokenizers.SPECIAL
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*small_tokenizers.CORPUS, *[TEXT, KHMER] * 4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def pieces(*, prefix: bool) -> PreTrainedTokenizerFast:
    """SentencePiece's pieces: every way to join two tokens is a merge, in the order of the tokens."""
    trained = small_tokenizers.pieces().backend_tokenizer
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    plain = {text: at for text, at in vocabulary.items() if at >= 4 + 256}
    merges = generate_merges(plain, {text: -at for text, at in plain.items()})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.decoder = trained.decoder
    tokenizer.add_special_tokens(small_tokenizers.SPECIAL)
    if not prefix:
        tokenizer.add_tokens([AddedToken("▁▁▁"), AddedToken("HelloWORLD", normalized=False)])
    return small_tokenizers._wrapped(tokenizer, "<s> $A")


VOCABULARIES = {name: (steps, ignore) for (steps, ignore), name in PRE_TOKENIZERS.items()}


@pytest.mark.parametrize("name", [*VOCABULARIES, "prefix", "plain"])
def test_llama_cpp_cuts_a_text_into_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = byte_level(*VOCABULARIES[name]) if name in VOCABULARIES else pieces(prefix=name == "prefix")
    model = packed(model_of("qwen2", vocab_size=len(tokenizer) + 3), targets=["*.down_proj"])
    report = export(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)
    keys = metadata(tmp_path / "model.gguf")
    assert keys["tokenizer.ggml.pre"] == (name if name in VOCABULARIES else "default")
    assert len(keys["tokenizer.ggml.tokens"]) == len(tokenizer) + 3
    rough = name in ("tekken", "gpt-4o")
    assert any("combining marks" in note for note in report.notes) == rough
    pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    text = TEXT if rough else TEXT + KHMER
    assert tokens(tmp_path / "model.gguf", text) == [tokenizer(text)["input_ids"]]


def unigram(
    scheme: str = "always", *, split: bool = True, collapse: bool = False, charsmap: bytes | None = None, **given: Any
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    steps: list[Any] = [] if charsmap is None else [normalizers.Precompiled(charsmap)]
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")] if collapse else []
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=small_tokenizers.SPECIAL, unk_token="<unk>", show_progress=False, **given
    )
    tokenizer.train_from_iterator([*small_tokenizers.CORPUS, *[TEXT] * 4], trainer)
    rules = json.loads(tokenizer.to_str())  # sums of such scores are exact, and equal ones are equal
    rules["model"]["vocab"] = [[token, round(score * 1024) / 1024] for token, score in rules["model"]["vocab"]]
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    tokenizer.add_tokens([AddedToken("XYZZY", normalized=False)])
    return small_tokenizers._wrapped(tokenizer, "<s> $A </s>")


def charsmap(replaced: dict[str, str]) -> bytes:
    """Return SentencePiece's table: a double array of the texts' bytes, each unit 32 bits, and the replacements."""
    units, used, ends = [0], {0}, b""
    values = {}
    for text, other in replaced.items():
        values[text.encode()] = len(ends)
        ends += other.encode() + b"\0"

    def place(node: int, prefix: bytes) -> None:
        following = sorted(
            {key[len(prefix)] if len(key) > len(prefix) else 0 for key in values if key.startswith(prefix)}
        )
        base = next(b for b in range(1, 1 << 20) if not any((node ^ b) ^ label in used for label in following))
        for label in following:
            at = node ^ base ^ label
            units.extend([0] * (at + 1 - len(units)))
            used.add(at)
            units[at] = values[prefix] | 1 << 31 if label == 0 else label
        units[node] |= base << 10 | (1 << 8 if 0 in following else 0)
        for label in following:
            if label:
                place(node ^ base ^ label, prefix + bytes([label]))

    place(0, b"")
    units += [0] * (-len(units) % 256)
    table = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(table).to_bytes(4, "little") + table + ends


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scheme": "never", "split": False},
        {"collapse": True, "charsmap": charsmap({"\n": " ", "²": "2", "e\u0301": "é", "½": "1/2"})},
    ],
    ids=["words", "whole", "spaces"],
)  # fmt: skip
def test_llama_cpp_cuts_a_text_into_the_same_tokens_of_unigram(given: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = unigram(**given)
    model = packed(model_of("qwen2", vocab_size=len(tokenizer) + 3), targets=["*.down_proj"])
    report = export(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.model"] == "t5"
    assert not any("float32" in note for note in report.notes)
    pytest.importorskip("xllamacpp", reason="the package xllamacpp is not installed")
    texts = [TEXT + KHMER, "The  sun is a star", "XYZZYturns XYZZYx²½e\u0301"]
    assert tokens(tmp_path / "model.gguf", *texts) == tokenizer(texts)["input_ids"]


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path: Path) -> None:
    model = packed(model_of("llama"), targets=["*.down_proj"])
    lowercase = small_tokenizers.bytes_bpe()
    lowercase.backend_tokenizer.normalizer = normalizers.Lowercase()
    unknown = small_tokenizers.bytes_bpe()
    unknown.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    endless = small_tokenizers.bytes_bpe()
    endless.eos_token = None
    fallback = unigram()
    rules = json.loads(fallback.backend_tokenizer.to_str())
    rules["model"]["byte_fallback"] = True
    fallback._tokenizer = Tokenizer.from_str(json.dumps(rules))
    longer = unigram(split=False)
    rules = json.loads(longer.backend_tokenizer.to_str())
    rules["pre_tokenizer"]["split"] = True
    longer._tokenizer = Tokenizer.from_str(json.dumps(rules))
    cases = {
        "byte_fallback=True": fallback,
        "only begin other tokens": longer,
        "prepend_scheme=first": unigram("first"),
        "WordLevel": small_tokenizers.words(),
        r"(?s)merges for the .* ways.*--like": small_tokenizers.pieces(),
        "Lowercase": lowercase,
        r"(?s)Punctuation.*smollm": unknown,
        "no eos_token": endless,
        r"(?s)no tokenizer.*tokenizer=": None,
        "bos and the eos token alone": small_tokenizers.bytes_bpe("<s> <s> $A"),
    }
    for message, tokenizer in cases.items():
        with pytest.raises(ExportError, match=message):
            export(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("gpt2", {"initializer_range": 0.02}, r"(?s)GPT2LMHeadModel.*--like FILE.*--llama-cpp DIR"),
        ("llama", {"hidden_act": "gelu"}, "activation=gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=dynamic"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar=100"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    family: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = packed(model_of(family, **given))
    with pytest.raises(ExportError, match=message):
        export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER)
    assert not (tmp_path / "model.gguf").exists()


def test_a_window_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    model = packed(model_of("mistral", sliding_window=64))
    report = export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER, dry_run=True)
    assert any("the last 64" in note for note in report.notes)


CONVERTER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from transformers import AutoModelForCausalLM
from gguf_files import write_gguf
folder, _, out, _, kind = sys.argv[1:]
assert kind == "f32"
write_gguf(AutoModelForCausalLM.from_pretrained(folder), Path(out), "gpt2")
"""


def test_the_converter_of_a_checkout_describes_another_family(tmp_path: Path) -> None:
    model = packed(model_of("gpt2", initializer_range=0.02, vocab_size=128))
    with pytest.raises(ExportError, match=r"no file .*convert_hf_to_gguf\.py"):
        export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER, llama_cpp=tmp_path)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('an unknown model')")
    with pytest.raises(ExportError, match=r"(?s)exit code 1: an unknown model.*--like FILE"):
        export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER, llama_cpp=tmp_path)
    script.write_text(CONVERTER.format(path=sys.path))
    report = export(model, "gguf", tmp_path / "model.gguf", tokenizer=TOKENIZER, llama_cpp=tmp_path)
    assert report.claim == "values"
    assert verify(tmp_path / "model.gguf", model).holds
