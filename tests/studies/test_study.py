"""Studies: the matrix, what is refused before anything runs, resuming, failures, and tables that tell the truth."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.notation import chain
from dovetail.checkpoint.adapter import load_adapter
from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import merge
from dovetail.cli.main import main
from dovetail.display.plots import spaced_ticks
from dovetail.errors import CannotMerge, ChainError, DovetailError, RecipeError, TrainError
from dovetail.runs.report.record import Report
from dovetail.runs.yaml import read_yaml
from dovetail.studies import cells, cost, runner, verify
from dovetail.studies.drawings import curve, score_axis
from dovetail.studies.matrix import expand, unique_runs
from dovetail.studies.report import Result, Spread, StudyReport
from dovetail.studies.spec import Study
from dovetail.studies.tables import spread
from dovetail.training.trainer import StageTrainer
from places import ROOT
from small_models import training_killed_at
from small_runs import MAIN, small_recipe

OPEN = "wanda({sparsity}) >> lora(r=2)"
CLOSED = "wanda(0.5) >> int(bits=4, group=32) >> lora(r=2) >> remask >> regrid"


def small_study(folder, **changes):
    """A pipeline at two sparsities and one at a single one, with two seeds; and two rows without runs of their own."""
    common = {key: value for key, value in small_recipe(folder).items() if key != "chain"}
    common["train"] = {"max_steps": 2, "batch_size": 8, "checkpoint_every": 1}
    return {
        "title": "A <small> study",
        "common": common,
        "seeds": [0, 1],
        "vary": {"sparsity": [0.25, 0.5]},
        "rows": [
            {"name": "dense", "of": "open", "stage": "base"},
            {"name": "sparse", "of": "open", "stage": "pruned"},
            {"name": "open", "chain": OPEN, "with": {"merge": "lossy"}},
            {"name": "closed", "chain": CLOSED},
        ],
        **changes,
    }  # fmt: skip


def plain(folder, *rows, **changes):
    """A study without axes, of these rows and one seed."""
    return small_study(folder, rows=list(rows), vary={}, seeds=[0], **changes)


def done(asked, output, **arguments):
    return dovetail.study(asked, output=output, progress=False, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small study done, with costs; its folder and report."""
    folder = tmp_path_factory.mktemp("study")
    asked = small_study(folder, compare=[["closed", "open"], ["closed", "dense"]], cost=["open", "closed"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ROUNDS", "TRAINING_ROUNDS", "FEW_STEPS"):
            patch.setattr(cost, name, 1)
        patch.setattr(cost, "MORE_STEPS", 2)
        patch.setattr(cost, "NEW_TOKENS", 4)
        report = done(asked, folder / "out")
    return folder / "out", report, asked


def test_rows_times_points_times_seeds(tmp_path):
    lines = expand(Study.parse(small_study(tmp_path))).lines
    assert [(line.row, line.point, line.stage) for line in lines] == [
        ("dense", {}, "base"),
        ("sparse", {"sparsity": 0.25}, "pruned"), ("sparse", {"sparsity": 0.5}, "pruned"),
        ("open", {"sparsity": 0.25}, None), ("open", {"sparsity": 0.5}, None),
        ("closed", {}, None),
    ]  # fmt: skip
    runs = list(unique_runs(lines))
    assert len(runs) == 6
    assert [run.recipe.seed for run in runs] == [0, 0, 0, 1, 1, 1]
    assert runs[1].slug == "open-sparsity-0.5-s0"
    assert runs[1].recipe.chain == "wanda(0.5) >> lora(r=2)"
    assert runs[1].recipe.merge == "lossy"
    assert runs[2].recipe.merge == "exact"


def test_axes_of_text_make_a_matrix_and_equal_recipes_run_once(tmp_path):
    rows = [
        {"name": "grid", "chain": "{quantizer} >> {adapter}", "with": {"merge": "none"}},
        {"name": "half", "chain": "nf4 >> {adapter}", "with": {"merge": "none"}},
    ]
    vary = {"quantizer": ["nf4", "int(bits=4, group=32)"], "adapter": ["lora(r=2)", "ia3"]}
    lines = expand(Study.parse(small_study(tmp_path, rows=rows, vary=vary, seeds=[3]))).lines
    assert [line.runs[0].recipe.chain for line in lines] == [
        "nf4 >> lora(r=2)", "nf4 >> ia3", "int(bits=4, group=32) >> lora(r=2)", "int(bits=4, group=32) >> ia3",
        "nf4 >> lora(r=2)", "nf4 >> ia3",
    ]  # fmt: skip
    assert [line.point for line in lines][4:] == [{"adapter": "lora(r=2)"}, {"adapter": "ia3"}]
    assert len(list(unique_runs(lines))) == 4
    assert lines[4].runs == lines[0].runs


def test_recipe_files_under_common_under_the_row(tmp_path):
    (tmp_path / "recipes").mkdir()
    whole = small_recipe(tmp_path, train={"max_steps": 7, "batch_size": 4, "warmup": 0.5}, seed=9, model="../base")
    (tmp_path / "recipes" / "one.yaml").write_text(json.dumps(whole))
    asked = {
        "title": "files", "common": {"train": {"max_steps": 2, "batch_size": 8}}, "seeds": [4],
        "rows": [{"name": "a", "recipe": "recipes/one.yaml"},
                 {"name": "b", "recipe": "recipes/one.yaml", "with": {"train": {"max_steps": 1}, "merge": "lossy"}}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(asked))
    found = Study.load(tmp_path / "study.yaml")
    a, b = (line.runs[0].recipe for line in expand(found).lines)
    assert (a.train.max_steps, a.train.batch_size, a.train.warmup, a.seed, a.merge) == (2, 8, 0.5, 4, "exact")
    assert (b.train.max_steps, b.train.batch_size, b.train.warmup, b.merge) == (1, 8, 0.5, "lossy")
    assert a.model == str(tmp_path / "base")
    found.dump(tmp_path / "recipes" / "resolved.yaml")
    assert expand(Study.load(tmp_path / "recipes" / "resolved.yaml")) == expand(found)


def grid_study(folder, **changes):
    """Quantizers, none among them, with adapters and two tasks of the playground; one seed."""
    common = {key: value for key, value in small_recipe(folder).items() if key not in ("chain", "data")}
    return {
        "title": "grid",
        "common": {**common, "merge": "none", "train": {"max_steps": 2, "lr_scale": 2}},
        "vary": {
            "quantizer": ["none", "nf4"],
            "adapter": {"lora": "lora(r=2)", "loftq": "lora(r=2, init=loftq)"},
            "data": {"words": {"task": "word_problems"}, "pairs": {"task": "acceptability"}},
        },
        "rows": [{"name": "grid", "chain": "{quantizer} >> {adapter}"}],
        **changes,
    }  # fmt: skip


def test_axes_are_links_and_keys_of_the_recipe(tmp_path):
    rows = [
        {"name": "grid", "chain": "{quantizer} >> {adapter}"},
        {"name": "one", "chain": "ia3", "with": {"data": {"task": "perplexity"}, "train": {"max_steps": 1}}},
        {"name": "untuned", "of": "grid", "stage": "base"},
        {"name": "quantized", "of": "grid", "stage": "quantized"},
    ]
    vary = {**grid_study(tmp_path)["vary"], "train.max_steps": [2, 3]}
    asked = grid_study(tmp_path, rows=rows, vary=vary, skip=[{"quantizer": "none", "adapter": "loftq"}])
    for study in (Study.parse(asked), Study.parse(read_yaml(dumped(Study.parse(asked), tmp_path)))):
        matrix = expand(study)
        lines = [line for line in matrix.lines if line.row == "grid"]
        assert [(*line.point.values(), line.task) for line in lines[:4]] == [
            ("none", "lora", "words", 2, "word_problems"), ("none", "lora", "words", 3, "word_problems"),
            ("none", "lora", "pairs", 2, "acceptability"), ("none", "lora", "pairs", 3, "acceptability"),
        ]  # fmt: skip
        assert [line.runs[0].recipe.chain for line in lines[::4]] == [
            "lora(r=2)", "nf4 >> lora(r=2)", "nf4 >> lora(r=2, init=loftq)"
        ]  # fmt: skip
        assert lines[1].runs[0].slug == "grid-quantizer-none-adapter-lora-data-words-train.max-steps-3-s0"
        assert [line.runs[0].recipe.train.max_steps for line in lines[:2]] == [2, 3]
        assert lines[0].runs[0].recipe.train.lr_scale == 2
        (one,) = (line for line in matrix.lines if line.row == "one")
        assert (one.point, one.task, one.runs[0].recipe.train.max_steps) == ({}, "perplexity", 1)
        untuned = [(line.point, line.task) for line in matrix.lines if line.row == "untuned"]
        assert untuned == [({"data": "words"}, "word_problems"), ({"data": "pairs"}, "acceptability")]
        quantized = [line.point for line in matrix.lines if line.row == "quantized"]  # at points with a quantizer
        assert quantized[0] == {"quantizer": "nf4", "adapter": "lora", "data": "words"}
        assert len(quantized) == 4
        assert not matrix.refused


def dumped(study, folder):
    study.dump(folder / "dumped.yaml")
    return folder / "dumped.yaml"


def test_scores_that_the_adapter_does_not_change_are_one_line(tmp_path):
    rows = [*grid_study(tmp_path)["rows"], {"name": "untuned", "of": "grid", "stage": "quantized"}]
    vary = {"quantizer": ["nf4", "int(bits=4, group=32)"], "adapter": ["lora(r=2)", "ia3", "lora(r=2, init=loftq)"]}
    asked = grid_study(tmp_path, rows=rows, vary=vary, common=grid_study(tmp_path)["common"] | {"data": "perplexity"})
    lines = [line for line in expand(Study.parse(asked)).lines if line.row == "untuned"]
    assert [line.point for line in lines] == [
        {"quantizer": "nf4"}, {"quantizer": "nf4", "adapter": "lora(r=2, init=loftq)"},
        {"quantizer": "int(bits=4, group=32)"},
        {"quantizer": "int(bits=4, group=32)", "adapter": "lora(r=2, init=loftq)"},
    ]  # fmt: skip


def test_a_seed_may_be_an_axis(tmp_path):
    asked = grid_study(tmp_path, vary={"seed": [3, 5]}, rows=[ROW], common=small_study(tmp_path)["common"])
    lines = expand(Study.parse(asked)).lines
    assert [(line.point, [run.recipe.seed for run in line.runs]) for line in lines] == [
        ({"seed": 3}, [3]), ({"seed": 5}, [5])
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="seeds are given once"):
        Study.parse({**asked, "seeds": [1, 2]})


def test_paths_of_an_axis_are_relative_to_the_study(tmp_path, monkeypatch):
    data = small_recipe(tmp_path)["data"]
    asked = grid_study(
        tmp_path, rows=[{"name": "a", "chain": "{quantizer} >> lora(r=2)"}],
        vary={"quantizer": ["none", "nf4", "int(bits=4, group=32)"],
              "data": {"sums": {**data, "train": "train.jsonl", "test": "test.jsonl"}, "pairs": "acceptability"},
              "layers": {"same": {}, "searched": {"from": "best.yaml"}}},
    )  # fmt: skip
    found = {"chain": "int(bits=4, group=32) >> lora(r=8)", "layers": {"down": "int(bits=8, group=32) >> lora(r=4)"}}
    (tmp_path / "best.yaml").write_text(json.dumps({**small_recipe(tmp_path), **found}))
    (tmp_path / "study.yaml").write_text(json.dumps(asked))
    (tmp_path / "elsewhere").mkdir()
    study = Study.load(tmp_path / "study.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    lines = expand(Study.load(dumped(study, tmp_path / "elsewhere"))).lines
    assert lines == expand(study).lines
    first, second, *_, last = lines
    assert first.runs[0].recipe.data.files["train"] == tmp_path / "train.jsonl"
    assert (first.task, last.task) == ("sums", "acceptability")
    assert (first.runs[0].recipe.evaluate.split, last.runs[0].recipe.evaluate.split) == ("test", "test")
    assert second.runs[0].recipe.layers == {"down": "lora(r=4)"}
    assert last.runs[0].recipe.layers == {"down": "int(bits=8, group=32) >> lora(r=4)"}


def test_illegal_points_are_told_and_not_run(tmp_path):
    matrix = expand(Study.parse(grid_study(tmp_path)))
    assert len(matrix.lines) == 6
    assert [(one.row, one.point) for one in matrix.refused] == [
        ("grid", {"quantizer": "none", "adapter": "loftq", "data": "words"}),
        ("grid", {"quantizer": "none", "adapter": "loftq", "data": "pairs"}),
    ]  # fmt: skip
    assert "no quantizer before it" in matrix.refused[0].why
    vary = {"quantizer": ["none", "int(bits=4, group=48)", "nf4"], "adapter": ["none", "lora(r=2)"]}
    common = small_study(tmp_path)["common"]
    matrix = expand(Study.parse(grid_study(tmp_path, vary=vary, common={**common, "merge": "exact"})))
    assert [line.point for line in matrix.lines] == [
        {"quantizer": "none", "adapter": "lora(r=2)"}, {"quantizer": "nf4", "adapter": "none"}
    ]  # fmt: skip
    reasons = ["no links", "group must divide", "grid", "grid"]
    assert all(reason in one.why for reason, one in zip(reasons, matrix.refused, strict=True))


def test_each_export_is_checked(tmp_path):
    rows = [ROW, {"name": "b", "chain": "lora(r=2)", "with": {"export": {"to": "peft"}}}]
    with pytest.raises(RecipeError, match="peft with merge: exact"):
        expand(Study.parse(plain(tmp_path, *rows)))


def test_quick_keeps_a_part(tmp_path):
    quick = {"vary": {"adapter": ["lora"], "data": ["pairs"]}, "seeds": [7], "common": {"train": {"max_steps": 1}}}
    skip = [{"quantizer": "nf4", "data": ["words", "pairs"]}, {"adapter": "loftq"}]
    (line,) = expand(Study.parse(grid_study(tmp_path, quick=quick, skip=skip)).quickly()).lines
    assert line.point == {"quantizer": "none", "adapter": "lora", "data": "pairs"}
    assert (line.runs[0].recipe.seed, line.runs[0].recipe.train.max_steps, line.runs[0].recipe.train.lr_scale) == (
        7, 1, 2
    )  # fmt: skip
    with pytest.raises(RecipeError, match="no key quick"):
        Study.parse(grid_study(tmp_path)).quickly()


ROW = {"name": "a", "chain": "lora(r=2)"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sedes": [1]}, "did you mean seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [True]}, "seeds"),
        ({"seeds": [1, 1]}, "must be unique"),
        ({"rows": [{**ROW, "chian": "x"}]}, "did you mean chain"),
        ({"rows": [{"name": "a"}]}, "exactly one of recipe"),
        ({"rows": [{**ROW, "of": "b"}]}, "exactly one of recipe"),
        ({"rows": [ROW, {"name": "b", "of": "a"}]}, "given together"),
        ({"rows": [ROW, {"name": "b", "of": "c", "stage": "base"}]}, "'c'"),
        ({"rows": [ROW, {"name": "b", "of": "a", "stage": "pruned"}]}, "stages of a: base, tuned, merged"),
        ({"rows": [ROW, ROW]}, "two rows"),
        ({"rows": [ROW, {"name": "A", "chain": "ia3"}]}, "second run called a-s0"),
        ({"rows": [{**ROW, "with": {"seed": 1}}]}, "key 'seed'"),
        ({"rows": [{**ROW, "with": {"trian": {}}}]}, "did you mean train"),
        ({"rows": [{**ROW, "with": {"train": {"epochs": -1}}}]}, "epochs"),
        ({"rows": [{**ROW, "chain": "wanda({x}) >> lora"}]}, "{x}"),
        ({"vary": {"x": [1]}}, "must be named in the chain of some row"),
        ({"vary": {"dtata": [1]}}, "did you mean data"),
        ({"vary": {"train.max_stesp": [1]}}, "did you mean max_steps"),
        ({"vary": {"train.max_steps": [1, 1]}}, "1 stands there twice"),
        ({"vary": {"train.max_steps": []}}, "at least one value"),
        ({"vary": {"data": [{"task": "word_problems"}]}}, "must have a label"),
        ({"vary": {"data": {"a": {"preset": "alpaka"}}}}, "the preset must be one of"),
        ({"vary": {"merge": ["none"]}, "rows": [{**ROW, "with": {"merge": "lossy"}}]}, "merge, which every row sets"),
        ({"vary": {"merge": ["none"]}, "skip": [{"data": "x"}]}, "must be an axis under vary"),
        ({"vary": {"merge": ["none"]}, "skip": [{"merge": "x"}]}, "must be a value of the axis merge"),
        ({"vary": {"merge": ["none"]}, "skip": [{"merge": "none"}]}, "skip must leave a point"),
        ({"vary": {"merge": ["none"]}, "quick": {"vary": {"merge": ["lossy"]}}}, "must be a value of the axis merge"),
        ({"quick": {"sedes": [1]}}, "did you mean seeds"),
        ({"compare": [["a", "z"]]}, "'z'"),
        ({"compare": "z"}, "'z'"),
        ({"compare": ["a"]}, "the name of a row, or {axis: value}, or pairs of names"),
        ({"compare": {"x": 1}}, "this must be an axis under vary"),
        ({"cost": ["z"]}, "'z'"),
        ({"common": {"output": "x"}}, "key 'output'"),
        ({"rows": [{"name": "a", "recipe": "gone.yaml"}]}, "gone.yaml"),
    ],
)  # fmt: skip
def test_a_bad_study_is_one_message(tmp_path, changes, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        done(plain(tmp_path, ROW) | changes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "error", "told"),
    [
        ({"chain": "wanda(0.5) >> laro(r=2)"}, ChainError, "row bad"),
        ({"chain": "remask"}, ChainError, "no pruner"),
        ({"chain": "lora(r=0)"}, ChainError, "r=0"),
        ({"chain": "int(bits=4, group=48) >> lora(r=2) >> regrid"}, ChainError, "group must divide"),
        ({"chain": "wanda(0.5) >> lora(r=2)"}, CannotMerge, "zeros"),
        ({"chain": "lora(r=2)", "with": {"data": {"task": "word_problems"}}}, RecipeError, "row bad"),
    ],
)  # fmt: skip
def test_no_row_runs_when_one_is_bad(tmp_path, monkeypatch, row, error, told):
    monkeypatch.setattr(cells, "run", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(error, match=told):
        done(plain(tmp_path, ROW, {"name": "bad", **row}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_job_at_all_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="jobs=0"):
        done(plain(tmp_path, {"name": "one", "chain": "lora"}), tmp_path / "out", jobs=0)


def test_the_files(finished):
    folder, report, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "cost.json", "curve.png", "merging", "planned", "runs", "shared", "study.html", "study.json",
        "study.yaml", "table.csv", "table.md", "table.tex",
    ]  # fmt: skip
    assert StudyReport.model_validate_json((folder / "study.json").read_bytes()) == report
    assert len(list((folder / "runs").iterdir())) == 6
    table = (folder / "table.md").read_text()
    for result in report.results:
        told = spread("exact_match", result.figure)
        line = next(line for line in table.splitlines() if line.startswith(f"| {result.row} |") and told in line)
        assert f"| {result.precision} |" in line
    with Image.open(folder / "curve.png") as picture:
        assert picture.width > 600


def test_figures_are_those_of_the_runs(finished):
    folder, report, _ = finished
    stages = {"dense": "base", "sparse": "pruned", "open": "tuned", "closed": "merged"}
    for result in report.results:
        runs = [Report.load(folder / "runs" / slug) for slug in result.runs]
        assert result.stage == stages[result.row]
        assert result.figure.values == [run.score(run.row(result.stage)) for run in runs]
        assert result.figure.n == 2
        zeros = [1 - run.row(result.stage).footprint.nonzero_fraction for run in runs]
        assert result.sparsity == pytest.approx(sum(zeros) / 2)
        assert (result.merged_lossy is not None) == (result.row == "open")
    assert [result.precision for result in report.results] == [
        "FP32", "FP32", "FP32", "FP32 + FP32", "FP32 + FP32", "INT4"
    ]  # fmt: skip
    pairs = [(found.row, found.minus, found.point) for found in report.compare]
    assert pairs == [
        ("closed", "open", {"sparsity": 0.25}), ("closed", "open", {"sparsity": 0.5}),
        ("closed", "dense", {}),
    ]  # fmt: skip
    ours, theirs = report.results[5].figure.values, report.results[3].figure.values
    assert report.compare[0].figure.values == [a - b for a, b in zip(ours, theirs, strict=True)]


def test_mergeable_is_the_truth(finished):
    folder, report, _ = finished
    assert [result.mergeable for result in report.results] == [None, None, None, False, False, True]
    for result in report.results[3:]:
        run = folder / "runs" / result.runs[0]
        model, _ = load(folder.parent / "base")
        load_adapter(model, run / "adapter")
        if result.mergeable:
            used = {name: layer.used_weight().clone() for name, layer in chain_layers(model).items()}
            merged = AutoModelForCausalLM.from_pretrained(run / "model")
            assert all(
                torch.equal(merged.get_submodule(name).get_parameter("weight"), weight) for name, weight in used.items()
            )
            assert not result.why
        else:
            with pytest.raises(CannotMerge):
                merge(model)
            assert "zeros" in result.why


def test_costs_are_there_and_kept(finished, monkeypatch):
    folder, report, asked = finished
    assert [(line.row, line.point.get("sparsity"), line.shipped) for line in report.cost] == [
        ("open", 0.25, "base and adapter"), ("open", 0.5, "base and adapter"),
        ("closed", None, "merged, packed"), ("closed", None, "merged, stock"),
    ]  # fmt: skip
    for line in report.cost:
        assert min(line.storage_nbytes, line.prefill_tokens_a_second, line.decode_tokens_a_second) > 0
        assert line.tuning_nbytes > line.inference_nbytes > 0
    packed, stock = report.cost[2:]
    assert packed.storage_nbytes < report.cost[1].storage_nbytes < report.cost[0].storage_nbytes
    checkpoint = folder / "runs" / "closed-s0" / "model" / "model.safetensors"
    assert packed.storage_nbytes < stock.storage_nbytes == checkpoint.stat().st_size
    assert packed.inference_nbytes < stock.inference_nbytes
    assert packed.step_seconds == stock.step_seconds
    monkeypatch.setattr(cells, "run", lambda *args, **kwargs: pytest.fail("it ran again"))
    monkeypatch.setattr(cost, "_medians", lambda *args: pytest.fail("it measured again"))
    monkeypatch.setattr(verify, "_verify", lambda *args: pytest.fail("it merged again"))
    events = []
    assert done(asked, folder, on_run=events.append) == report
    assert [event.state for event in events] == ["kept"] * 6 + ["measures"]


def test_the_page_needs_nothing_from_outside(finished):
    folder, report, _ = finished
    page = (folder / "study.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\">" in page  # no other script runs
    assert "A &lt;small&gt; study" in page
    assert [source[:22] for source in re.findall(r'src="([^"]*)"', page)] == ["data:image/png;base64,"]
    assert "default-src 'none'" in page
    assert spread("exact_match", report.results[-1].figure) in page


def test_a_killed_study_goes_on(tmp_path, monkeypatch):
    rows = [{"name": "one", "chain": MAIN}, {"name": "two", "chain": "lora(r=2)"}]
    asked = plain(tmp_path, *rows)
    with training_killed_at(4):  # the second step of the second run
        done(asked, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "runs").iterdir()) == ["one-s0", "two-s0.partial"]
    first = (tmp_path / "out" / "runs" / "one-s0" / "report.json").stat().st_mtime_ns

    step, seen = StageTrainer.training_step, []

    def counted(*args, **kwargs):
        seen.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", counted)
    events = []
    report = done(asked, tmp_path / "out", on_run=events.append)
    assert len(seen) == 1  # from its checkpoint
    assert [(event.state, event.name) for event in events] == [
        ("kept", "one-s0"), ("begins", "two-s0"), ("done", "two-s0")
    ]  # fmt: skip
    assert (tmp_path / "out" / "runs" / "one-s0" / "report.json").stat().st_mtime_ns == first
    assert [result.mergeable for result in report.results] == [True, False]  # the second is rounded
    assert "changes logits" in report.results[1].why
    whole = done(plain(tmp_path, rows[1]), tmp_path / "whole")
    assert whole.results[0].figure == report.results[1].figure

    more = plain(tmp_path, *rows, {"name": "three", "chain": "ia3"})
    assert [r.row for r in done(more, tmp_path / "out").results] == ["one", "two", "three"]
    changed = plain(tmp_path, {"name": "one", "chain": "lora(r=3)"})
    with pytest.raises(RecipeError, match="one-s0, made with chain"):
        done(changed, tmp_path / "out")
    stale = tmp_path / "out" / "planned" / "stale.json"
    stale.touch()
    assert done(changed, tmp_path / "out", resume=False).results[0].chain == "lora(r=3)"
    assert not stale.exists()
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["one-s0"]


def test_runs_of_another_base_are_not_mixed(tmp_path, monkeypatch):
    """The weights at a path may be replaced, between two starts of a study or while it runs."""
    asked = plain(tmp_path, {"name": "one", "chain": "lora(r=2)"}, {"name": "two", "chain": "ia3"})
    weights, real = tmp_path / "base" / "model.safetensors", cells.run

    def replaces(recipe, **arguments):
        report = real(recipe, **arguments)
        tensors = load_file(weights)
        save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
        return report

    with monkeypatch.context() as patch:
        patch.setattr(cells, "run", replaces)
        with pytest.raises(RecipeError, match=r"two-s0, made with another model than \S*base has now"):
            done(asked, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "runs").rglob("report.json")}
    with pytest.raises(RecipeError, match=r"one-s0, made with another model(.|\n)*--no-resume"):
        done(asked, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in before}
    assert len(done(asked, tmp_path / "out", resume=False).results) == 2


def test_the_folder_of_an_older_study_is_told(tmp_path):
    for text in ('{"chain": "lora"}', "no json"):
        place = tmp_path / "out" / "runs" / "a-s0"
        place.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "study.yaml").write_text("rows: []")
        (place / "recipe.yaml").write_text(json.dumps(small_recipe(tmp_path) | {"chain": "lora(r=2)"}))
        (place / "report.json").write_text(text)
        with pytest.raises(RecipeError, match=r"a-s0, which cannot be read(.|\n)*--no-resume"):
            done(plain(tmp_path, ROW), tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(DovetailError, match=r"thesis\.txt"):
        done(plain(tmp_path, ROW), tmp_path / "out", resume=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_failed_run_is_told_and_tried_again(tmp_path, monkeypatch):
    asked = small_study(tmp_path, vary={}, rows=[{"name": "weak", "chain": "ia3"}, ROW], cost=["weak", "a"])
    real, measured = cells.run, []

    def measures(lines, folder, **arguments):
        measured.append([line.row for line, _ in lines])
        return []

    monkeypatch.setattr(runner, "measure", measures)

    def diverges(recipe, **arguments):
        if recipe.chain == "ia3" and recipe.seed == 1:
            raise TrainError("train", found="loss nan at step 3", rule="finite", fix="a smaller lr_scale")
        return real(recipe, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cells, "run", diverges)
        events = []
        report = done(asked, tmp_path / "out", on_run=events.append)
    weak, fine = report.results
    assert [event.state for event in events if event.name == "weak-s1"] == ["begins", "failed"]
    assert (weak.figure.n, weak.figure.sd, fine.figure.n) == (1, None, 2)
    assert weak.failed[0].seed == 1
    for name in ("table.md", "study.html"):
        assert "weak, seed 1 failed: TrainError: train found: loss nan" in (tmp_path / "out" / name).read_text()
    again = done(asked, tmp_path / "out")
    assert again.results[0].figure.n == 2
    assert not again.results[0].failed
    assert measured == [["a"], ["weak", "a"]]


def test_spread():
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(values=[1, 2, 3], mean=2, sd=1)
    assert Spread.of([1.0]).sd is None
    assert Spread.of([1.0, float("inf")]).mean is None
    assert spread("exact_match", Spread.of([0.5, 0.25])) == "37.5 ± 17.7 %"
    assert spread("exact_match", Spread.of([0.015]), signed=True) == "+1.5 points"
    assert spread("perplexity", Spread.of([2.0, 3.0])) == "2.500 ± 0.707"
    assert spread("accuracy", Spread.of([])) == "–"


def scored(metric, *means, sd=0.0) -> StudyReport:
    """A study of rows that have these mean scores at the points of one axis."""
    results = [
        Result(row="a", point={"r": 2**at}, task="t", chain="lora", stage="tuned", sparsity=None, mergeable=None,
               why="", precision="FP32", figure=Spread(values=[mean], mean=mean, sd=sd), merged_lossy=None, failed=[],
               runs=[])
        for at, mean in enumerate(means)
    ]  # fmt: skip
    return StudyReport(
        title="", task="t", metric=metric, split="test", model="m", seeds=[0],
        vary={"r": [2**at for at in range(len(means))]}, results=results, cost=[], compare=[], seconds=0,
        environment={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "low", "high", "span"),
    [
        (scored("exact_match", 0.0, 0.0), 0, 0, 11),
        (scored("exact_match", 0.0, 0.002), 0, 0.2, 11),
        (scored("accuracy", 0.998, 1.0), 99.8, 100, 11),
        (scored("accuracy", 0.2, 0.8, sd=0.1), 10, 90, 88),
        (scored("matthews", 0.001, -0.002), -0.002, 0.001, 0.11),
        (scored("perplexity", 20.0, 20.1), 20, 20.1, 2.211),
    ],
)
def test_the_axis_of_scores_does_not_zoom_into_noise(report, low, high, span):
    limits = score_axis(report)
    assert limits is not None
    bottom, top = limits
    assert bottom < low
    assert top > high
    assert top - bottom == pytest.approx(span)
    assert curve(report)


def test_an_axis_without_scores_has_no_limits():
    assert score_axis(scored("accuracy")) is None


def test_labels_of_ticks_do_not_collide():
    assert spaced_ticks([0.3, 0.5, 0.51, 0.52, 0.7], log=False) == [0.3, 0.5, 0.7]
    assert spaced_ticks([256, 1, 2, 4, 8], log=True) == [1, 2, 4, 8, 256]
    assert spaced_ticks([256, 1, 2, 4, 8], log=False) == [1, 256]


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.yaml").write_text(json.dumps(plain(tmp_path, {"name": "one", "chain": MAIN})))
    (tmp_path / "bad.yaml").write_text(json.dumps(plain(tmp_path, {"name": "one", "chain": "nope"})))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dovetail", "study", *map(str, arguments)])
        monkeypatch.setattr("dovetail.cli.main.quiet", lambda: None)
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    code, out, _ = call("--help")
    assert code == 0
    assert "Example: dovetail study" in out
    code, out, err = call(tmp_path / "bad.yaml", "--output", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err.startswith(f"ChainError: {tmp_path / 'bad.yaml'}, row one")
    code, out, err = call(tmp_path / "study.yaml", "--output", tmp_path / "out")
    assert code == 0
    assert "[1 of 1]" in err
    assert "exact match" in err
    assert "mergeable" in out
    assert "INT4" in out
    code, out, _ = call(tmp_path / "study.yaml", "--output", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "study.json").read_text())


def test_the_studies_of_papers_are_whole():
    """Quantizers with adapters (the study of PEFT on quantized models), and QR-Adaptor's tables and figures."""
    study = Study.load(ROOT / "examples" / "qpeft" / "playground.yaml")
    matrix = expand(study)
    assert len(list(unique_runs(matrix.lines))) == (6 * 8 - 1) * 2 * 2
    assert {tuple(one.point.values()) for one in matrix.refused} == {
        ("none", "loftq", "word problems"), ("none", "loftq", "multiple choice")
    }  # fmt: skip
    assert len(list(unique_runs(expand(study.quickly()).lines))) == 3 * 3
    folder = ROOT / "examples" / "qr_adaptor"
    found = read_yaml(folder / "best.yaml")
    for name, count in (("table1", 11), ("table6", 3)):
        matrix = expand(Study.load(folder / f"{name}.yaml"))
        assert not matrix.refused
        assert len(list(unique_runs(matrix.lines))) == count * 3 * 3
        *_, last = matrix.lines
        assert last.row == "QR-Adaptor"
        assert last.runs[0].recipe.layers == found["layers"]
    for name, count in (("figure2", 1 + 6), ("figure3", 2 + 3)):
        matrix = expand(Study.load(folder / f"{name}.yaml"))
        assert not matrix.refused
        assert len(list(unique_runs(matrix.lines))) == count * 3
    for row in (line for line in matrix.lines if line.row == "random ranks"):
        ranks = [list(chain(text))[-1].r for text in row.runs[0].recipe.layers.values()]
        assert (len(ranks), sum(ranks)) == (4, 4 * 8)
    quick = expand(Study.load(folder / "table1.yaml").quickly())
    assert len(list(unique_runs(quick.lines))) == 11


def test_the_examples_are_whole():
    folder = ROOT / "examples" / "sqft"
    table = expand(Study.load(folder / "table.yaml")).lines
    curve = expand(Study.load(folder / "curve.yaml")).lines
    used = {row["recipe"] for row in read_yaml(folder / "table.yaml")["rows"] if "recipe" in row}
    others = {path.name for path in folder.glob("*.yaml")} - used
    assert others == {"table.yaml", "curve.yaml", "without_tuning.yaml"}
    assert len(list(unique_runs(table))) == 9 * 3
    assert len(list(unique_runs(curve))) == 4 * 4 * 3
