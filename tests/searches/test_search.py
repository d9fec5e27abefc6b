"""A whole search on a small model: its folder, its report, its resumption, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dovetail
from dovetail.cli.main import app
from dovetail.errors import DovetailError, RecipeError, SearchError
from dovetail.runs.recipe import Recipe
from dovetail.searches.chains import ChainSpace
from dovetail.searches.report import Trial, best, front, growth
from small_runs import save_labels, save_model, save_sums


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {
        "model": str(save_model(folder / "base")),
        "data": save_sums(folder),
        "train": {"epochs": 2, "batch_size": 16},
        "calibration": {"samples": 8},
        "merge": "none",
        "search": {
            "kind": "chains", "prefix": "nf4", "trials": 3, "seeds": [0, 1],
            "objectives": ["quality", "trainable_parameters"],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A search that was not stopped: its report and its folder."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return dovetail.search(recipe, output=output, progress=False), output


def test_the_folder(whole, recipe):
    report, output = whole
    names = {path.name for path in output.iterdir()}
    assert names == {
        "search.yaml", "search.db", "search.json", "report.html", "best.yaml", "front", "winner"
    }  # fmt: skip
    assert dovetail.SearchReport.load(output) == report
    assert Recipe.load(output / "search.yaml") == Recipe.parse(recipe)
    assert Recipe.load(output / "best.yaml") == report.recipe(report.best)
    assert {path.stem for path in (output / "front").iterdir()} == set(map(str, report.front))
    assert not output.with_name("out.partial").exists()


def test_the_report(whole):
    report, output = whole
    assert [trial.number for trial in report.trials] == [0, 1, 2]
    assert report.best in report.front
    for trial in report.trials:
        assert trial.state == "complete"
        assert len(trial.details["scores"]) == 2  # after each epoch
        assert trial.values["quality"] == max(trial.details["scores"])
        made = dovetail.plan(report.recipe(trial).chain, report.model, memory=False)
        assert trial.values["trainable_parameters"] == made.trainable_parameters
        assert trial.details["nbytes"] == made.nbytes
    runs = [dovetail.Recipe.load(output / "winner" / f"seed-{seed}" / "recipe.yaml") for seed in (0, 1)]
    assert [run.seed for run in runs] == [0, 1]
    assert {run.chain for run in runs} == {report.trial(report.best).chain}
    assert len(report.finish["scores"]) == 2
    page = (output / "report.html").read_text()
    assert "<script" not in page
    assert report.trial(report.best).chain in page.replace("&gt;", ">")
    assert page.count("<circle") == 3


def test_a_search_that_is_stopped_and_resumed_finds_the_same(whole, recipe, tmp_path, monkeypatch):
    report, _ = whole
    output, seen = tmp_path / "out", []

    def stop(trial):
        seen.append(trial.number)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dovetail.search(recipe, output=output, progress=False, on_trial=stop)
    assert output.with_name("out.partial").is_dir()

    def stop_finish(self, folder, report, *, progress):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ChainSpace, "finish", stop_finish)
        with pytest.raises(KeyboardInterrupt):
            dovetail.search(recipe, output=output, progress=False)
    resumed = dovetail.search(recipe, output=output, progress=False, on_trial=stop)
    assert seen == [0, 1]  # the third was run by the second start
    assert [trial.values for trial in resumed.trials] == [trial.values for trial in report.trials]
    assert [trial.params for trial in resumed.trials] == [trial.params for trial in report.trials]
    assert (resumed.front, resumed.best, resumed.finish) == (report.front, report.best, report.finish)
    assert dovetail.search(recipe, output=output, progress=False) == resumed  # it is finished


def test_a_search_is_not_continued_with_another_base(whole, recipe, tmp_path):
    """The weights at a path may be replaced: neither a finished nor an unfinished search takes them for its own."""
    report, finished = whole
    weights = Path(recipe["model"]) / "model.safetensors"
    before = weights.read_bytes()

    def stop(trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dovetail.search(recipe, output=tmp_path / "out", progress=False, on_trial=stop)
    tensors = load_file(weights)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    try:
        with pytest.raises(SearchError, match="a search with other model"):
            dovetail.search(recipe, output=tmp_path / "out", progress=False)
        with pytest.raises(RecipeError, match="made with another model"):
            dovetail.search(recipe, output=finished, progress=False)
    finally:
        weights.write_bytes(before)
    assert dovetail.search(recipe, output=finished, progress=False) == report


def test_a_finished_or_unfinished_search_with_another_recipe(whole, recipe, tmp_path):
    _, output = whole
    other = recipe | {"seed": 5}
    with pytest.raises(RecipeError, match="another seed"):
        dovetail.search(other, output=output)
    with pytest.raises(DovetailError, match="new or empty"):
        dovetail.search(recipe, output=output, resume=False)
    partial = tmp_path / "out.partial"
    partial.mkdir()
    Recipe.parse(other).dump(partial / "search.yaml")
    with pytest.raises(RecipeError, match="another seed"):
        dovetail.search(recipe, output=tmp_path / "out")
    (partial / "search.yaml").rename(partial / "notes.yaml")
    with pytest.raises(RecipeError, match="no search"):
        dovetail.search(recipe, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({"search": None, "chain": "lora(r=4)"}, {}, "no search"),
        ({"search": {"kind": "ranks"}, "chain": "lora(r=4)"}, {}, "kind ranks"),
        ({}, {"workers": 0}, "workers"),
        ({}, {"storage": "nowhere"}, "URL"),
        ({"model": "no/such/model"}, {}, "no/such/model"),
        ({}, {"storage": "sqlite:////no/such/folder/search.db"}, "unable to open"),
    ],
)
def test_bad_input_leaves_nothing(recipe, tmp_path, changes, options, problem):
    with pytest.raises(DovetailError, match=problem):
        dovetail.search(recipe | changes, output=tmp_path / "out", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_search_names_the_command(recipe, tmp_path):
    with pytest.raises(RecipeError, match="dovetail search"):
        dovetail.run(recipe, output=tmp_path / "out")


def test_a_task_with_a_head_and_its_validation_split_as_test(tmp_path):
    recipe = {
        "model": str(save_model(tmp_path / "base", labels=2)),
        "data": save_labels(tmp_path),
        "train": {"max_steps": 2, "batch_size": 8},
        "search": {"kind": "chains", "slots": 1, "trials": 2, "seeds": [4], "sampler": "random"},
    }
    report = dovetail.search(recipe, output=tmp_path / "out", progress=False)
    assert (report.finish["split"], report.task.split, report.task.metric) == ("validation", "validation", "matthews")
    assert report.finish["sd"] is None


def test_the_command(recipe, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe | {"search": recipe["search"] | {"seeds": [0], "slots": 1, "trials": 2}}))
    output = tmp_path / "out"
    shown = CliRunner().invoke(app, ["search", str(path), "--plan", "--json"])
    assert shown.exit_code == 0, shown.output
    cost = json.loads(shown.stdout)
    assert (cost["points"], cost["trials"]) == ((1 + 4 + 4 + 5) * 4, 2)
    assert cost["seconds"] > 0
    assert cost["peak_memory_nbytes"] > 0
    assert not output.exists()
    done = CliRunner().invoke(app, ["search", str(path), "--output", str(output), "--workers", "2"])
    assert done.exit_code == 0, done.output
    assert f"dovetail run {output / 'best.yaml'}" in done.stdout
    again = CliRunner().invoke(app, ["search", str(path), "--output", str(output), "--json"])
    found = json.loads(again.stdout)
    assert 2 <= len(found["trials"]) <= 3
    bad = CliRunner().invoke(app, ["search", str(path), "--output", str(tmp_path / "x"), "--workers", "0"])
    assert bad.exit_code == 2


def trial(number, quality, nbytes, **more):
    values = {"quality": quality, "nbytes": nbytes}
    return Trial(**{
        "number": number, "state": "complete", "rung": 0, "params": {"a": number}, "values": values, "seconds": 1.0,
        "ended": float(number), "recipe": {}, **more,
    })  # fmt: skip


def test_front_and_best():
    objectives = {"quality": "maximize", "nbytes": "minimize"}
    trials = [
        trial(0, 0.5, 100), trial(1, 0.9, 300), trial(2, 0.4, 200), trial(3, 0.9, 300),
        trial(4, 0.0, 50, state="failed", values={}), trial(5, 0.2, 90),
    ]  # fmt: skip
    assert [each.number for each in front(trials, objectives)] == [1, 0, 5]
    assert best(trials, objectives, 1.0).number == 1
    assert best(trials, objectives, 0.0).number == 5
    assert [each.number for each in front(trials, {"quality": "maximize"})] == [1]
    promoted = [*trials, trial(6, 0.95, 100, rung=1, params={"a": 0})]
    assert [each.number for each in front(promoted, objectives)] == [6, 5]


def test_growth():
    trials = [trial(0, 0.5, 100), trial(1, 0.4, 200), trial(2, 1.0, 300)]
    assert growth(trials, {"quality": "maximize"}) == [(1, 0.0, 0.5), (2, 1.0, 0.5), (3, 2.0, 1.0)]
    grown = growth(trials, {"quality": "maximize", "nbytes": "minimize"})
    assert [value for _, _, value in grown] == pytest.approx([
        (1.1 - 5 / 6) * 1.1, (1.1 - 5 / 6) * 1.1, (1.1 - 5 / 6) * 1.1 + (5 / 6) * 0.1
    ])  # fmt: skip


def test_a_report_names_its_trials(whole):
    report, _ = whole
    with pytest.raises(SearchError, match="trials 0, 1, 2"):
        report.recipe(7)
