"""Recipes: defaults, round trip, paths, and refusals that name key, place and the closest right key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dovetail.errors import ChainError, DataError, RecipeError
from dovetail.runs.quickstart import RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.tasks.find import load_task, number_of_labels
from places import ROOT
from small_runs import write_lines

EXAMPLES = ROOT / "examples"
SHORT = {"model": "playground", "chain": "lora", "data": "word_problems"}


def test_round_trip_with_every_default(tmp_path):
    recipe = Recipe.parse(SHORT)
    recipe.dump(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert written["train"]["epochs"] == 3.0
    assert written["chain"] == "lora(r=8)"
    assert written["evaluate"]["split"] == "test"
    assert set(written) == set(Recipe.model_fields)


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "sub" / "base").mkdir(parents=True)
    text = yaml.safe_dump({
        "model": "base", "chain": "lora",
        "data": {"train": "a/train.jsonl", "validation": "/x/y.jsonl", "kind": "text"},
    })  # fmt: skip
    (tmp_path / "sub" / "recipe.yml").write_text(text)
    recipe = Recipe.load(tmp_path / "sub" / "recipe.yml")
    assert recipe.model == str(tmp_path / "sub" / "base")
    assert recipe.data.files == {"train": tmp_path / "sub" / "a" / "train.jsonl", "validation": Path("/x/y.jsonl")}
    assert (recipe.data.name, recipe.data.metric, recipe.evaluate.split) == ("a", "perplexity", "validation")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chian": "lora"}, ["key 'chian'", "did you mean chain?"]),
        ({"train": {"batchsize": 3}}, ["key 'train.batchsize'", "keys of train", "did you mean batch_size?"]),
        ({"data": {"task": "word_problems", "limit": {"trian": 3}}}, ["'data.limit.trian'", "did you mean train?"]),
        ({"evaluate": {"tasks": [{"tsak": "x"}]}}, ["'evaluate.tasks.0.tsak'", "did you mean task?"]),
        ({"train": {"epochs": -1}}, ["train.epochs", "-1", "greater than 0"]),
        ({"train": {"batch_size": "many"}}, ["train.batch_size", "'many'", "integer"]),
        ({"merge": "maybe"}, ["merge", "'maybe'", "exact"]),
        ({"data": {}}, ["data", "name a playground task"]),
        ({"data": {"train": "x.jsonl", "format": "poems"}}, ["the format must be one of alpaca, chat"]),
        ({"data": {"train": "x.jsonl", "kind": "text", "format": "text"}}, ["a kind takes no format"]),
        ({"data": {"train": "x.jsonl", "validation": "y.jsonl", "split": 0.1}}, ["no validation file"]),
        ({"data": {"train": "x.jsonl", "format": "alpaca", "fields": {"prompt": "q"}}}, ["no field 'prompt'"]),
        ({"data": {"train": "x.jsonl", "kind": "text", "metric": "pearson"}}, ["must be perplexity"]),
        ({"data": {"train": "x", "kind": "text", "fields": {"prompt": "q"}}}, ["no field 'prompt'", "text"]),
        ({"data": {"task": "word_problems", "kind": "text"}}, ["a playground task takes no kind"]),
        ({"model": ""}, ["model"]),
        ({"seed": -1}, ["seed"]),
        ({"seed": True}, ["seed", "True", "no value of seed"]),
        ({"train": {"epochs": True}}, ["train.epochs", "no value of epochs"]),
        ({"data": 5}, ["data", "5", "must be a mapping of keys"]),
        ({"evaluate": {"tasks": "perplexity"}}, ["evaluate.tasks", "'perplexity'", "must be a list"]),
    ],
)  # fmt: skip
def test_refusals(changes, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(SHORT | changes, where="my.yaml")
    assert str(caught.value).startswith("my.yaml")
    for part in said:
        assert part in str(caught.value)


def test_a_missing_key_and_a_bad_chain():
    with pytest.raises(RecipeError, match="the key data is required"):
        Recipe.parse({"model": "playground", "chain": "lora"})
    with pytest.raises(ChainError, match="did you mean lora"):
        Recipe.parse(SHORT | {"chain": "nf4 >> lorra"})
    with pytest.raises(RecipeError, match="a recipe must be a mapping"):
        Recipe.parse(["lora"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [playground", "line 1"),
        ("model: playground\nchain: lora\nchain: ia3\n", "chain a second time"),
        ("model: &a playground\nchain: *a\n", "anchors"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "anchors"),
        ("model: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("[" * 1000 + "]" * 1000, "nesting"),
        ("model: \x00", "valid YAML"),
        ("model: 2024-13-45\n", "is no timestamp"),
        ("seed: " + "1" * 5000, "line 1, column 7"),
        ("seed: !!bool x\n", "'x' is no bool"),
        ("[model]: playground\n", "a list or mapping as a key"),
        ("# " + "x" * (1 << 20), "more than"),
        ("- model", "a recipe must be a mapping"),
        ("", "a recipe must be a mapping"),
    ],
)
def test_corrupt_files(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.load(path)
    assert "recipe.yaml" in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        Recipe.load(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="directory"):
        Recipe.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        Recipe.load(tmp_path / "latin.yaml")


def test_records_from_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"s": "one", "t": "two", "label": 0}, {"s": "three", "t": "four", "label": 2}])
    data = {"train": "a.jsonl", "test": "a.jsonl", "kind": "classification", "fields": {"text": "s", "pair": "t"},
            "limit": {"test": 1}}  # fmt: skip
    task = load_task(Recipe.parse(SHORT | {"data": data}, folder=tmp_path).data)
    assert task.split("train")[1] == {"text": "three", "pair": "four", "label": 2}
    assert len(task.split("test")) == 1
    assert number_of_labels(task) == 3
    assert number_of_labels(task, 5) == 5
    with pytest.raises(DataError, match="label=2, num_labels=2"):
        number_of_labels(task, 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "one"', "line 2"),
        ('["one", 1]', "a JSON list"),
        ('{"text": "one"}', "looked for in column 'label'"),
        ('{"text": 1, "label": 0}', "text must be of type str"),
        ('{"text": "one", "label": "yes"}', "all numbers, or all texts"),
        ('{"text": "one", "label": 1.5}', "label must be of type int"),
        ('{"text": "one", "label": true}', "label must be of type int"),
        ('{"text": "one", "pair": 3, "label": 1}', "pair must be of type str"),
        ('{"text": "one", "label": -1}', "labels must be from 0 to"),
        ('{"text": "one", "label": 123456789}', "labels must be from 0 to"),
    ],
)
def test_bad_records(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "zero", "label": 0}\n' + line + "\n")
    data = Recipe.parse(SHORT | {"data": {"train": str(tmp_path / "a.jsonl"), "kind": "classification"}}).data
    with pytest.raises(DataError, match=said):
        number_of_labels(load_task(data))


def test_a_byte_order_mark_and_windows_lines_are_no_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    data = Recipe.parse(SHORT | {"data": {"train": str(tmp_path / "a.jsonl"), "kind": "text"}}).data
    assert load_task(data).split("train") == [{"text": "one"}, {"text": "two"}]


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, said in (("empty.jsonl", "no records"), ("none.jsonl", "No such file"), (".", "directory")):
        data = Recipe.parse(SHORT | {"data": {"train": str(tmp_path / name), "kind": "text"}}).data
        with pytest.raises(DataError, match=said):
            load_task(data)


def test_examples():
    assert (EXAMPLES / "quickstart.yaml").read_text() == RECIPE
    for path in EXAMPLES.glob("*.yaml"):
        Recipe.load(path)


def test_layers_are_taken_from_a_search(tmp_path):
    found = {
        "chain": "int(bits=4) >> lora(r=8) >> regrid",
        "layers": {"down": "int(bits=8) >> lora(r=2) >> regrid", "up": "int(bits=4) >> lora(r=4) >> regrid"},
    }
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({**SHORT, **found}))

    def layers(chain, **more):
        return Recipe.parse({**SHORT, "chain": chain, "layers": {"from": "best.yaml", **more}}, folder=tmp_path).layers

    assert layers(found["chain"]) == Recipe.parse({**SHORT, **found}).layers
    # What the search varied, and nothing else; links that it had not keep their arguments.
    assert layers("int(bits=2, group=32) >> lora(r=1, init=loftq)") == {
        "down": "int(bits=8, group=32) >> lora(r=2, init=loftq)",
        "up": "int(bits=4, group=32) >> lora(r=4, init=loftq)",
    }
    assert layers("int >> dora(r=3)", up="int(bits=2) >> dora(r=3)") == {
        "down": "int(bits=8, group=64) >> dora(r=3)", "up": "int(bits=2, group=64) >> dora(r=3)",
    }  # fmt: skip
    again = Recipe.parse({**SHORT, "chain": found["chain"], "layers": {"from": str(tmp_path / "best.yaml")}})
    again.dump(tmp_path / "whole.yaml")
    assert Recipe.load(tmp_path / "whole.yaml") == again
    with pytest.raises(RecipeError, match="layers that differ in int, lora"):
        layers("nf4 >> ia3")
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(SHORT))
    with pytest.raises(RecipeError, match="no chain with layers"):
        layers("int >> lora")
