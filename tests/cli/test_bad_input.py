"""Bad input at the command line: one clear message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from dovetail.cli.main import main
from small_runs import save_labels, save_model, small_recipe, write_lines


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a recipe (or a command) that must be refused; returns the message."""
    monkeypatch.setattr("dovetail.cli.main.quiet", lambda: None)

    def call(*arguments: object, recipe: object = None, output: str = "out") -> str:
        if recipe is not None:
            text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe)
            (tmp_path / "recipe.yaml").write_text(text)
            arguments = ("run", tmp_path / "recipe.yaml", "--output", tmp_path / output)
        before = everything(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert done.value.code == 2
        assert "Traceback" not in out + err
        assert out == ""
        assert everything(tmp_path) == before
        return err

    return call


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


CHAINS = [
    ("lorra(r=4)", ["ChainError", "^ column 1", "unknown link 'lorra'", "did you mean lora?"]),
    ("LoRA(r=4)", ["unknown link 'LoRA'", "did you mean lora?"]),
    ("nf4 >> lora(rank=4)", ["^ column 13", "unknown argument 'rank'", "lora takes r"]),
    ("lora(r=many)", ["r=many", "r: ", "fix:   write r=8"]),
    ("int4 >> lora", ["unknown link 'int4'", "did you mean int(bits=4)?"]),
    ("awq(bits=4)", ["unknown link 'awq'", "did you mean gptq(bits=4)?"]),
    ("lora -> nf4", ["'-'", "fix:   write >> between two links"]),
    ("wanda(50%)", ["'%'", "fix:   write 0.5 for 50%"]),
    ("lora[r=8]", ["'['", "fix:   write the arguments in parentheses"]),
    ("lora(r=8", ["the end", "fix:   add ')'"]),
    ("lora(r=0)", ["r=0"]),
    ("wanda(1.5)", ["sparsity=1.5", "fix:"]),
    ("nf4 >> int(bits=4) >> lora", ["a chain has at most one quantizer", "fix:"]),
    ("lora >> remask", ["no pruner before it", "fix:"]),
    ("bottleneck >> lora", ["put bottleneck last"]),
    ("int(bits=4, group=48) >> lora(r=4) >> regrid", ["self_attn", "in_features=32, group=48", "group=32"]),
    ("nf4 >> lora(r=4)", ["CannotMerge", "does not keep the base's grid", "regrid"]),
]


@pytest.mark.parametrize(("text", "said"), CHAINS, ids=[text for text, _ in CHAINS])
def test_chains(tmp_path, refused, text, said):
    message = refused(recipe=small_recipe(tmp_path, chain=text))
    for part in said:
        assert part in message


def test_targets(tmp_path, refused):
    message = refused(recipe=small_recipe(tmp_path, targets="quary"))
    for part in ("TargetError", "target 'quary'", "query", "fix:"):
        assert part in message


def test_a_model_without_targets(tmp_path, refused):
    model = save_model(tmp_path / "other")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    message = refused(recipe=small_recipe(tmp_path, model=str(model)))
    assert "TargetError" in message


def test_models(tmp_path, refused):
    recipe = small_recipe(tmp_path)
    assert "no such folder" in refused(recipe=recipe | {"model": "./nowhere"})
    whole = (tmp_path / "base" / "model.safetensors").read_bytes()
    (tmp_path / "base" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    message = refused(recipe=recipe)
    assert "LoadError" in message
    assert "whole model.safetensors" in message
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(recipe=recipe)
    (tmp_path / "base" / "config.json").unlink()
    assert "no config.json" in refused(recipe=recipe)


def test_recipes(tmp_path, refused):
    recipe = small_recipe(tmp_path)
    assert "did you mean targets?" in refused(recipe=recipe | {"target": "query"})
    assert "fix:   run the study: dovetail study" in refused(recipe={"title": "two", "rows": []})
    assert "recipe.yaml, line 3, column 5" in refused(recipe="model: playground\nchain: [lora\ndata: x")
    assert "No such file" in refused("run", tmp_path / "none.yaml")
    assert "a recipe must be a mapping" in refused(recipe="lora")


def test_data(tmp_path, refused):
    recipe = small_recipe(tmp_path)
    data = recipe["data"]
    assert "No such file" in refused(recipe=recipe | {"data": data | {"train": "none.jsonl"}})
    (tmp_path / "empty.jsonl").touch()
    assert "no records" in refused(recipe=recipe | {"data": data | {"train": "empty.jsonl"}})
    assert "split 'validation'" in refused(recipe=recipe | {"evaluate": {"split": "validation"}})
    assert "looked for in column 'prompt'" in refused(recipe=recipe | {"data": data | {"fields": {}}})
    assert "did you mean word_problems?" in refused(recipe=recipe | {"data": "word_problem"})
    long = write_lines(tmp_path / "long.jsonl", [{"question": "one", "answer": "two " * 80}])
    message = refused(recipe=recipe | {"data": data | {"train": str(long)}}, output="new/run")
    assert "an answer is never cut" in message


def test_labels(tmp_path, refused):
    model = str(save_model(tmp_path / "bert", labels=2))
    data = save_labels(tmp_path)
    recipe = {"model": model, "chain": "lora(r=2)", "data": data, "train": {"max_steps": 1, "batch_size": 4}}
    write_lines(tmp_path / "bad.jsonl", [{"sentence": "one", "other": "two", "label": "yes"}])
    assert "the labels must be all numbers, or all texts" in refused(
        recipe=recipe | {"data": data | {"train": "bad.jsonl"}}
    )
    write_lines(tmp_path / "bad.jsonl", [{"sentence": "one", "other": "two", "label": 2}])
    assert "label=2, num_labels=2" in refused(recipe=recipe | {"data": data | {"train": "bad.jsonl", "num_labels": 2}})
    message = refused(recipe=recipe | {"data": data | {"kind": "regression", "metric": "accuracy"}})
    assert "must be pearson" in message


def test_output(tmp_path, refused):
    recipe = small_recipe(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("dear")
    message = refused(recipe=recipe)
    assert "including thesis.txt" in message
    assert "new or empty" in message
    assert "a file" in refused(recipe=recipe, output="out/thesis.txt")


def test_commands(tmp_path, refused):
    assert "No such file" in refused("report", tmp_path)
    write_lines(tmp_path / "recipe.yaml", [{"model": "playground", "chain": "lora", "data": "word_problems"}])
    message = refused("study", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert f"fix:   run the recipe: dovetail run {tmp_path / 'recipe.yaml'}" in message
    assert "the tasks are" in refused("evaluate", "playground", "--task", "chess")
    assert "no such folder" in refused("plan", "lora", "--model", "./none")
    assert "adapter.json" in refused("evaluate", "playground", "--task", "word_problems", "--adapter", tmp_path)
