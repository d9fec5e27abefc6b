"""Whole runs: the run directory, rows, resuming, merging as asked, and what a dry run says of them before."""

from __future__ import annotations

import json
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import dovetail.runs.flow as flow
import dovetail.runs.rows as rows_of_runs
import dovetail.runs.steps as steps
from dovetail import progress
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.notation import chain
from dovetail.checkpoint.adapter import load_adapter
from dovetail.checkpoint.load import load
from dovetail.errors import CannotMerge, HistoryWarning, RecipeError, TrainError
from dovetail.runs.flow import run
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Example, Report
from dovetail.runs.rows import row_names
from dovetail.runs.steps import legal_chain, probe_of
from dovetail.tasks.find import load_task
from dovetail.tasks.playground import task
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from small_models import training_killed_at
from small_runs import MAIN, save_labels, save_model, small_recipe

FIELDS = {
    "chain", "layers", "model", "seed", "stages", "merge", "footprint", "peak_memory_nbytes", "seconds", "environment",
    "task", "examples", "verdict", "training", "checkpoint", "packed", "search", "identity", "rendered",
    "exports",
}  # fmt: skip


def quiet(recipe, output, **arguments):
    return run(recipe, output=output, progress=False, **arguments)


def left_in(folder, output):
    """What a refused run left beside the folder that it was to write."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(output))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the small recipe: its folder, its report, and the names of the rows in the order that they came."""
    seen, place = [], tmp_path_factory.mktemp("finished")
    report = quiet(small_recipe(place), place / "new" / "run", on_row=lambda row: seen.append(row.name))
    return place / "new" / "run", report, seen


@pytest.mark.parametrize(
    ("vocabulary", "kind", "shape"),
    [(128, "text", (16, 500)), (1 << 18, "text", (1, 256)), (1 << 20, "classification", (16, 500)),
     (100_000, "generation", (1, 500)), (50_000, "generation", (2, 500))],
)  # fmt: skip
def test_logits_are_compared_on_a_bounded_number(vocabulary: int, kind: str, shape: tuple[int, int]) -> None:
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=0))
    batch = {"input_ids": torch.zeros(32, 500, dtype=torch.int64), "attention_mask": torch.ones(32, 500)}
    found = probe_of(batch, model, kind)
    assert {tuple(tensor.shape) for tensor in found.values()} == {shape}


def test_a_run_directory(finished):
    folder, report, seen = finished
    assert seen == ["base", "pruned", "quantized", "tuned", "merged"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "log.jsonl", "model", "packed", "recipe.yaml", "report.html", "report.json"
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    written = json.loads((folder / "report.json").read_text())
    assert set(written) == FIELDS
    assert [counted for _, counted in written["rendered"]] == [False, True]
    assert "<mark>" in (folder / "report.html").read_text()
    assert all(set(row) == {"name", "metrics", "footprint", "seconds"} for row in written["stages"])
    assert [row["name"] for row in written["stages"]] == seen
    footprints = {row["name"]: row["footprint"] for row in written["stages"]}
    assert footprints["base"]["bits_per_weight"] == 32
    assert footprints["base"]["trainable_parameters"] == 0
    assert footprints["pruned"]["nonzero_fraction"] == 0.5
    assert footprints["quantized"]["bits_per_weight"] < 6
    assert footprints["tuned"]["trainable_parameters"] == written["footprint"]["trainable_parameters"] > 0
    assert footprints["merged"]["bits_per_weight"] == written["footprint"]["bits_per_weight"] < 5
    merge = written["merge"]
    assert merge["exact"]
    assert merge["max_abs_logit_diff"] == merge["max_abs_weight_diff"] == merge["off_grid"] == 0
    assert merge["sparsity_after"] >= 0.5
    assert written["checkpoint"]["max_abs_logit_diff"] == 0
    assert written["packed"]["max_abs_logit_diff"] == 0
    assert written["packed"]["nbytes"] == (folder / "packed" / "packed.safetensors").stat().st_size
    assert written["packed"]["bits_per_weight"] < written["footprint"]["bits_per_weight"]
    assert [step for step, _ in written["training"][0]["losses"]] == [1, 2, 3, 4]
    assert report.row("tuned").metrics == report.row("merged").metrics
    assert Report.load(folder) == report
    assert Recipe.load(folder / "recipe.yaml").chain == str(chain(MAIN))
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events.count("row") == 5
    assert events.count("loss") == 4
    assert written["training"][0]["validation"] == []
    sums = load_task(Recipe.load(folder / "recipe.yaml").data).split("test")
    assert [(shown["prompt"], shown["expected"]) for shown in written["examples"]] == [
        (record["prompt"], record["answer"]) for record in sums[:10]
    ]
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert type(stock.model.layers[0].mlp.up_proj) is torch.nn.Linear
    weights = load_file(folder / "model" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (weights == 0).float().mean() >= 0.5


def steps_in(log, event):
    """The steps of the events of one kind; a line that is not whole is none."""
    found = [line for line in log.read_text().splitlines() if f'"event": "{event}"' in line]
    return [json.loads(line)["step"] for line in found]


def test_a_pipe_gets_lines_while_a_model_is_loaded_and_merged(tmp_path, monkeypatch, capfd):
    def slow(function, told):
        """Return only once the line was printed."""

        def call(*args, **kwargs):
            err, end = "", monotonic() + 60
            while told not in err and monotonic() < end:
                sleep(0.01)
                err += capfd.readouterr().err
            assert told in err
            return function(*args, **kwargs)

        return call

    assert progress._LINE_SECONDS < 30
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.02)
    recipe = small_recipe(tmp_path)
    monkeypatch.setattr(steps, "load_base", slow(steps.load_base, f"load {recipe['model']}, "))
    monkeypatch.setattr(flow, "apply", slow(flow.apply, f"run {MAIN}, "))
    monkeypatch.setattr(flow, "merge", slow(flow.merge, "merge, "))
    run(recipe, output=tmp_path / "run")


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path)
    recipe["data"] |= {"validation": recipe["data"]["test"]}
    recipe["train"] |= {"evaluate_every": 2, "evaluate_limit": 4}
    expected = quiet(recipe, tmp_path / "whole")
    with training_killed_at(4):
        quiet(recipe, tmp_path / "run")
    assert left_in(tmp_path, "run") == ["run.partial"]
    log = tmp_path / "run.partial" / "log.jsonl"
    assert steps_in(log, "loss") == [1, 2, 3]  # the last checkpoint holds two
    lines = [line for line in log.read_text().splitlines() if '"step": 1' not in line]
    log.write_text("\n".join(lines) + '\n{"event": "lo')  # what a crash of the machine may leave
    progress = tmp_path / "run.partial" / "progress.jsonl"
    progress.write_text(progress.read_text() + '{"name": "tun')  # half a line
    with pytest.raises(RecipeError, match="another chain"):
        quiet(recipe | {"chain": "lora(r=2)"}, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"another evaluate\.batch_size: 64"):
        quiet(recipe | {"evaluate": {**recipe.get("evaluate", {}), "batch_size": 7}}, tmp_path / "run")
    assert left_in(tmp_path, "run") == ["run.partial"]
    evaluated = []

    def counted(*args, **kwargs):
        evaluated.append(1)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(rows_of_runs, "evaluate", counted)
    report = quiet(recipe, tmp_path / "run")
    assert len(evaluated) == 2  # tuned and merged
    assert left_in(tmp_path, "run") == ["run"]
    for ours, theirs in zip(report.stages, expected.stages, strict=True):
        assert (ours.name, ours.metrics, ours.footprint) == (theirs.name, theirs.metrics, theirs.footprint)
    assert report.training == [expected.training[0].model_copy(update={"seconds": report.training[0].seconds})]
    assert report.examples == expected.examples
    log = tmp_path / "run" / "log.jsonl"
    assert sorted(steps_in(log, "loss")) == [1, 2, 3, 4]
    assert steps_in(log, "validation") == [2, 4]
    assert report.merge == expected.merge
    assert [step for step, _ in report.training[0].validation] == [2, 4]
    (tmp_path / "again.partial").mkdir()
    (tmp_path / "again.partial" / "file").touch()
    with pytest.raises(RecipeError, match="no run"):
        quiet(recipe, tmp_path / "again")
    quiet(recipe, tmp_path / "again", resume=False)
    assert left_in(tmp_path, "again") == ["again"]


def test_names_of_rows():
    def names(text, **more):
        return row_names(chain(text), **more)

    assert names(MAIN) == ["pruned", "quantized", "tuned"]
    assert names("lora") == ["tuned"]
    assert names("wanda(0.5) >> nf4") == ["pruned", "quantized"]
    assert names("wanda(0.5) >> nf4", head=True) == ["pruned", "quantized", "tuned"]
    assert names("lora >> nf4 >> lora") == ["tuned, stage 1", "quantized", "tuned"]
    assert names("lora >> wanda(0.5)") == ["tuned", "pruned"]
    assert names("wanda(0.2) >> lora >> remask >> wanda(0.5) >> ia3") == [
        "pruned, stage 1", "tuned, stage 1", "pruned", "tuned"
    ]  # fmt: skip


def test_stages(tmp_path):
    recipe = small_recipe(tmp_path, chain="ia3 >> magnitude(0.5) >> lora(r=2) >> remask")
    report = quiet(recipe, tmp_path / "run")
    assert [row.name for row in report.stages] == ["base", "tuned, stage 1", "pruned", "tuned", "merged"]
    assert [stage.links for stage in report.training] == [["ia3"], ["lora(r=2)"]]
    assert report.row("pruned").footprint.nonzero_fraction == 0.5


def test_nothing_is_trained(tmp_path):
    report = quiet(small_recipe(tmp_path, chain="magnitude(0.5) >> nf4"), tmp_path / "run")
    assert [row.name for row in report.stages] == ["base", "pruned", "quantized", "merged"]
    assert report.merge is not None
    assert report.merge.exact
    assert (report.training, report.peak_memory_nbytes) == ([], 0)


def test_kept_apart(tmp_path):
    recipe = small_recipe(tmp_path, chain="nf4(block=32) >> lora(r=2) >> bottleneck(r=4)", merge="none")
    report = quiet(recipe, tmp_path / "run")
    assert report.merge is None
    assert report.stages[-1].name == "tuned"
    assert not (tmp_path / "run" / "model").exists()
    model, tokenizer = load(tmp_path / "base")
    load_adapter(model, tmp_path / "run" / "adapter")
    task_ = load_task(Recipe.parse(recipe).data)
    assert evaluate(model, tokenizer, task_, progress=False) == report.row("tuned").metrics


def test_merging_as_asked(tmp_path):
    open_chain = "wanda(0.5) >> nf4(block=32) >> lora(r=4) >> ia3"
    recipe = small_recipe(tmp_path, chain=open_chain)
    with pytest.raises(CannotMerge, match="remask >> regrid"):
        quiet(recipe | {"model": "there/is/none"}, tmp_path / "run")  # refused before anything is loaded
    with pytest.raises(CannotMerge, match="bottleneck"):
        quiet(recipe | {"chain": "bottleneck", "merge": "lossy"}, tmp_path / "run")
    assert left_in(tmp_path, "run") == []
    report = quiet(recipe | {"merge": "lossy"}, tmp_path / "run")
    assert report.merge is not None
    assert not report.merge.exact
    assert report.merge.sparsity_after >= 0.5
    assert report.merge.off_grid == 0
    assert report.verdict.startswith("Merged with loss, as the recipe asks")


def test_a_head_from_files(tmp_path):
    recipe = {
        "model": str(save_model(tmp_path / "base", labels=2)), "chain": "wanda(0.5) >> lora(r=2) >> remask",
        "data": save_labels(tmp_path), "train": {"max_steps": 2, "batch_size": 8}, "calibration": {"samples": 8},
    }  # fmt: skip
    report = quiet(recipe, tmp_path / "run")
    assert (report.task.metric, report.task.split) == ("matthews", "validation")
    assert set(report.row("base").metrics["labels"]) == {"accuracy", "matthews", "n"}
    assert list(report.training[0].learning_rates) == ["lora(r=2)", "heads"]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")


def test_examples_are_the_outputs_that_are_scored(tmp_path):
    data = save_labels(tmp_path) | {"metric": "accuracy"}
    recipe = small_recipe(tmp_path, chain="lora(r=2)", data=data, evaluate={"limit": 6})
    recipe["model"] = str(save_model(tmp_path / "bert", labels=2))
    report = quiet(recipe, tmp_path / "run")
    assert len(report.examples) == 6
    for row, side in ((report.row("base"), "before"), (report.stages[-1], "after")):
        right = sum(getattr(shown, side) == shown.expected for shown in report.examples)
        assert row.metrics["labels"]["accuracy"] == pytest.approx(right / 6)
    assert "\n" in report.examples[0].prompt  # text and pair
    record = {"prompt": "x" * 9999, "choices": ["one", "two"], "label": 1}
    long = Example.of(Task("long", "choice", "accuracy", {"test": [record]}), record, "one", "two")
    assert (len(long.prompt), long.expected) == (500, "two")
    record = {"good": "a", "bad": "b"}
    assert Example.of(Task("pairs", "pairs", "accuracy", {"test": [record]}), record, "a", "b").expected == "a"


def test_an_experiment_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("dovetail.training.settings.find_spec", lambda name: None)
    recipe = small_recipe(tmp_path, model="there/is/none", train={"report_to": "mlflow"})
    with pytest.raises(TrainError, match="pip install mlflow"):
        quiet(recipe, tmp_path / "run")
    assert left_in(tmp_path, "run") == []


def test_divergence_leaves_nothing(tmp_path):
    recipe = small_recipe(tmp_path, train={"max_steps": 4, "lr_scale": 1e30}, chain="ia3")
    with pytest.raises(TrainError, match="must be finite"):
        quiet(recipe, tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_memory_is_predicted(tmp_path):
    data = task("word_problems")
    planned = plan(MAIN, "playground", task=data, batch_size=8)
    report = quiet({
        "model": "playground", "chain": MAIN, "data": "word_problems", "train": {"max_steps": 2, "batch_size": 8},
        "evaluate": {"limit": 8},
    }, tmp_path / "run")  # fmt: skip
    assert planned.predicted_peak_memory_nbytes == pytest.approx(report.peak_memory_nbytes, rel=0.1)
    tuned = report.row("tuned").footprint
    assert planned.nbytes == tuned.nbytes
    assert planned.bits_per_weight == tuned.bits_per_weight
    assert planned.trainable_parameters == tuned.trainable_parameters == report.footprint.trainable_parameters


def test_a_packed_model_is_loaded_scored_and_adapted_like_any_other(finished, tmp_path):
    run_folder, report, _ = finished
    model, _ = load(run_folder / "packed")
    assert chain_layers(model)
    with pytest.warns(HistoryWarning, match=r"gives up the zeros .* and its quantization grid"):
        again = quiet(small_recipe(tmp_path, model=str(run_folder / "packed"), chain="lora(r=2)"), tmp_path / "more")
    assert again.merge.given_up == ("zeros", "grid")
    assert "gave up the zeros and the grid" in again.verdict
    assert again.row("base").metrics == report.row("merged").metrics
    assert again.packed is None
    assert not (tmp_path / "more" / "packed").exists()
    assert Recipe.load(tmp_path / "more" / "recipe.yaml").names_exact is False  # so it repeats the run


@pytest.mark.parametrize("folder", ["model", "packed"])
def test_a_recipe_that_names_exact_gives_up_nothing(folder, finished, tmp_path):
    base = str(finished[0] / folder)
    for text, closed in (
        ("lora(r=2)", "lora(r=2) >> remask >> regrid"), ("lora(r=2) >> remask", "lora(r=2) >> remask >> regrid"),
        ("lora(r=2) >> regrid", "lora(r=2) >> regrid >> remask"),
    ):  # fmt: skip
        recipe = small_recipe(tmp_path, model=base, chain=text, merge="exact")
        with pytest.raises(CannotMerge) as refused:
            quiet(recipe, tmp_path / "more")
        assert "gives up the" in refused.value.found
        assert refused.value.fix == f"use {closed} to keep them, or set merge: lossy"
        assert not left_in(tmp_path, "more")
    legal_chain(Recipe.parse(small_recipe(tmp_path, model=base, chain=closed, merge="exact"), folder=tmp_path))
    legal_chain(Recipe.parse(small_recipe(tmp_path, model=base, chain="lora(r=2)", merge="lossy"), folder=tmp_path))


@pytest.mark.parametrize("folder", ["model", "packed"])
def test_a_run_continues_on_the_zeros_and_the_grid_of_an_earlier_run(folder, finished, tmp_path):
    run_folder, first, _ = finished
    chain, base = "lora(r=2) >> remask >> regrid", str(run_folder / folder)
    planned = plan(chain, base, memory=False)
    again = quiet(small_recipe(tmp_path, model=base, chain=chain), tmp_path / "more")
    assert planned.legal
    assert planned.mergeable
    assert planned.bits_per_weight == again.row("tuned").footprint.bits_per_weight
    assert again.merge.exact
    assert again.merge.sparsity_after == first.merge.sparsity_after
    assert again.packed.bits_per_weight == first.packed.bits_per_weight
    assert "gives up the zeros and the grid" in plan("lora(r=2)", base, memory=False).merge_advice


def test_a_packed_classifier_keeps_its_head(tmp_path):
    recipe = small_recipe(tmp_path, chain=MAIN, data=save_labels(tmp_path), evaluate={"split": "validation"})
    recipe["model"] = str(save_model(tmp_path / "bert", labels=2))
    report = quiet(recipe, tmp_path / "run")
    assert report.packed is not None
    assert report.packed.max_abs_logit_diff == 0
