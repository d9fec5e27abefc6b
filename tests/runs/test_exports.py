"""The key `export` of a recipe: one run writes every format that holds its grid, and each folder is verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dovetail
from dovetail.checkpoint.exportable import FORMATS
from dovetail.errors import ChainError, DovetailError, ExportError, RecipeError
from dovetail.runs.result import load_result
from families import make
from small_tokenizers import bytes_bpe

torch.set_num_threads(1)
RECIPE: dict[str, Any] = {
    "model": "playground",
    "chain": "int(bits=4, group=32, symmetric=signed, scale_bits=4) >> lora(r=4) >> regrid",
    "data": {"task": "acceptability"},
    "train": {"max_steps": 1, "batch_size": 2},
    "evaluate": {"limit": 2},
    "calibration": {"samples": 4},
}
EVERY = [
    {"to": "compressed-tensors", "dtype": "bfloat16"},
    {"to": "compressed-tensors", "dtype": "float32", "output": "wide"},
    {"to": "gptq", "dtype": "float16", "engine": "vllm"},
    {"to": "gptq_v2", "dtype": "bfloat16"},
    {"to": "mlx", "dtype": "float16"},
]


def installed(to: str) -> bool:
    try:
        FORMATS[to].check_package()
    except ExportError:
        return False
    return True


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    make("gpt2").save_pretrained(folder)
    bytes_bpe().save_pretrained(folder)
    return folder


def test_one_run_writes_every_format_and_each_is_verified(tmp_path: Path) -> None:
    exports = [each for each in EVERY if installed(each["to"])]
    if installed("gguf"):
        from gguf_files import write_gguf

        like = write_gguf(
            dovetail.load("playground")[0], tmp_path / "like.gguf", "llama", keys={"llama.vocab_size": 768}
        )
        exports.append({"to": "gguf", "like": str(like), "output": "model.gguf"})
        exports.append({"to": "gguf", "output": "new.gguf"})
    report = dovetail.run({**RECIPE, "export": exports}, output=tmp_path / "run", progress=False)
    assert [each.name for each in report.exports] == [each.get("output", each["to"]) for each in exports]
    assert {each.claim for each in report.exports} == {"values"}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["exports"][0]["differing"] == 0
    for each in report.exports:
        found = dovetail.verify(tmp_path / "run" / "export" / each.name, tmp_path / "run")
        assert found.holds
        assert {claim.outcome for claim in found.claims} <= {"holds", "not checked"}


def test_the_adapter_of_a_run_that_keeps_it_apart(tmp_path: Path) -> None:
    recipe = {**RECIPE, "chain": "vera(r=8)", "merge": "none", "export": {"to": "peft", "engine": "vllm"}}
    report = dovetail.run(recipe, output=tmp_path / "run", progress=False)
    assert [(each.format, each.claim) for each in report.exports] == [("peft", "adapter")]
    model, _ = load_result(tmp_path / "run")
    again = dovetail.export(model, "peft", tmp_path / "again", engine="vllm")
    first, second = (
        folder / "adapter_model.safetensors" for folder in (tmp_path / "run/export/peft", tmp_path / "again")
    )
    assert again.claim == "adapter"
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("changed", "error", "found"),
    [
        ({"export": {"to": "bitsandbytes"}}, ExportError, "use nf4"),
        ({"export": {"to": "gptq"}, "dtype": "float32"}, ExportError, "dtype=float16"),
        ({"export": {"to": "mlx", "engine": "vllm"}}, ExportError, "vllm reads"),
        ({"export": {"to": "peft"}}, RecipeError, "merge: none"),
        ({"export": {"to": "gptq"}, "merge": "none", "chain": "lora(r=4)"}, RecipeError, "merge: exact"),
        ({"export": {"to": "peft", "engine": "vllm"}, "merge": "none", "chain": "ia3"}, ChainError, "no LoRA does"),
        ({"export": {"to": "gptq", "dtype": "float16"}, "chain": "lora(r=4)"}, ExportError, "no quantized layer"),
        ({"export": [{"to": "mlx"}, {"to": "mlx", "dtype": "float16"}]}, RecipeError, "names of their own"),
        ({"export": {"to": "gguf"}, "model": "gpt2"}, ExportError, "(?s)GPT2LMHeadModel.*--like FILE"),
        ({"export": {"to": "gguf", "like": "none.gguf"}}, ExportError, "no file .*none.gguf"),
        ({"export": {"to": "mlx", "output": "../out"}}, RecipeError, "export"),
        ({"export": {"to": "mlx", "folder": "out"}}, RecipeError, "to, output, dtype, engine, like"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    changed: dict[str, Any], error: type[DovetailError], found: str, gpt2: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("it was trained")

    monkeypatch.setattr("dovetail.runs.flow.train", train)
    if not all(map(installed, ("bitsandbytes", "mlx", "gguf"))):
        pytest.skip("not all formats are installed")
    if changed.get("model") == "gpt2":
        changed = {**changed, "model": str(gpt2)}
    with pytest.raises(error, match=f"(?s){found}"):
        dovetail.run({**RECIPE, **changed}, output=tmp_path / "run", progress=False)
    assert not list(tmp_path.iterdir())
