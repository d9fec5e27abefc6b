"""The measures of each run of a study, against independent counts; what counts as diverged; interrupted trainings."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from torch.nn import Linear

import dovetail
from dovetail.checkpoint.load import load
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Losses, Report
from dovetail.studies import measures
from dovetail.studies.matrix import expand
from dovetail.studies.measures import divergence
from dovetail.studies.report import Result, StudyReport
from dovetail.studies.spec import Study
from small_models import training_killed_at
from small_runs import small_recipe

ROWS = [
    {"name": "quantized", "of": "nf", "stage": "quantized"},
    {"name": "nf", "chain": "nf4(block=32) >> lora(r=2)", "with": {"merge": "none"}},
    {"name": "both", "chain": "wanda(0.5) >> int(bits=4, group=32) >> lora(r=2) >> remask >> regrid"},
    {"name": "late", "chain": "ia3 >> wanda(0.5) >> lora(r=2) >> remask"},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A study of four rows, its folder and its report; the run of `nf` is interrupted once."""
    folder = tmp_path_factory.mktemp("measures")
    common = {key: value for key, value in small_recipe(folder).items() if key != "chain"}
    common["train"] = {"max_steps": 4, "batch_size": 8, "checkpoint_every": 2}
    asked = {"title": "measures", "common": common, "rows": ROWS}
    with training_killed_at(4):
        dovetail.study(asked, output=folder / "out", progress=False)
    return folder, dovetail.study(asked, output=folder / "out", progress=False)


def cell_of(report: StudyReport, row: str) -> measures.Cell:
    (found,) = [cell for cell in report.cells if cell.row == row]
    return found


def test_every_run_has_its_measures(small):
    folder, report = small
    assert [(cell.row, cell.stage) for cell in report.cells] == [
        ("quantized", "quantized"), ("nf", "tuned"), ("both", "merged"), ("late", "merged")
    ]  # fmt: skip
    for cell in report.cells:
        run = Report.load(folder / "out" / "runs" / cell.run)
        row = run.row(cell.stage)
        assert cell.score == run.score(row)
        assert cell.score_base == run.score(run.stages[0])
        assert (cell.nbytes_base, cell.nbytes) == (run.stages[0].footprint.nbytes, row.footprint.nbytes)
        assert cell.scores["sums exact_match"] == cell.score
        assert cell.diverged == ""
    late, both, nf = (cell_of(report, row) for row in ("late", "both", "nf"))
    assert late.score_untuned is None is late.nbytes_untuned  # tuned before it is pruned
    run = Report.load(folder / "out" / "runs" / both.run)
    assert both.score_untuned == run.score(run.row("quantized"))
    assert both.nbytes_untuned == run.row("quantized").footprint.nbytes
    assert (both.mergeable, nf.mergeable, cell_of(report, "quantized").mergeable) == (True, False, None)
    assert both.merge.startswith("Merged without loss")


def test_counts_against_the_model(small):
    folder, report = small
    model, _ = load(folder / "base")
    layers = [m for name, m in model.named_modules() if isinstance(m, Linear) and "lm_head" not in name]
    weights = sum(layer.weight.numel() for layer in layers)
    rank = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    total = sum(p.numel() for p in model.parameters())
    nf, both = cell_of(report, "nf"), cell_of(report, "both")
    assert nf.trained_parameters == both.trained_parameters == rank
    assert nf.trained_share == rank / (total + rank)
    assert nf.adapter_nbytes_16_bit == 2 * rank
    file = folder / "out" / "runs" / nf.run / "adapter" / "adapter.safetensors"
    assert nf.adapter_nbytes == file.stat().st_size
    with safe_open(file, framework="pt") as tensors:
        assert sum(tensors.get_tensor(key).numel() for key in tensors.keys()) == rank  # noqa: SIM118
    code_bits = 4 + 32 / 32  # nf4: a float32 scale a block of 32
    dense = Report.load(folder / "out" / "runs" / nf.run).row("tuned").footprint.nonzero_fraction
    assert nf.bit_reduction == pytest.approx(1 - (dense * code_bits * weights + 16 * rank) / (16 * weights))
    quantized = cell_of(report, "quantized")
    assert quantized.bit_reduction == pytest.approx(1 - dense * code_bits / 16)
    assert quantized.trained_parameters == quantized.steps == 0
    assert quantized.peak_memory_nbytes is None is quantized.adapter_nbytes
    merged = 1 - both.nonzero_fraction * both.bits_per_weight / 16  # it stores no mask, and no adapter is left
    assert both.bit_reduction == pytest.approx(merged)


def test_memory_beside_the_plan(small):
    """Also of the run that was interrupted before its widest batch was measured again."""
    for cell in small[1].cells:
        if cell.stage != "quantized":
            assert cell.planned_memory_nbytes == pytest.approx(cell.peak_memory_nbytes, rel=0.1)


def test_time_of_an_interrupted_training(small):
    folder, report = small
    nf, both, late = (cell_of(report, row) for row in ("nf", "both", "late"))
    assert (nf.steps, both.steps, late.steps) == (4, 4, 8)
    for cell in (nf, both, late):
        run = Report.load(folder / "out" / "runs" / cell.run)
        assert cell.training_seconds == sum(stage.seconds for stage in run.training)
        assert cell.step_seconds == (cell.training_seconds or 0) / cell.steps


def test_what_a_configuration_says_is_computed_once(small, monkeypatch):
    folder, report = small
    kept = folder / "out" / "planned"
    assert len(list(kept.iterdir())) == 3
    monkeypatch.setattr(measures, "plan", lambda *args, **kwargs: pytest.fail("it planned again"))
    asked = Study.load(folder / "out" / "study.yaml")
    line = next(line for line in expand(asked).lines if line.row == "nf")
    assert measures.cell(line, line.runs[0], "tuned", folder / "out", False) == cell_of(report, "nf")
    seeded = line.runs[0].recipe.model_copy(update={"seed": 5})
    assert measures.planned(seeded, kept) == measures.planned(line.runs[0].recipe, kept)


def test_the_plan_keeps_weights_as_the_recipe_asks(tmp_path):
    chain = "wanda(0.5) >> lora(r=2) >> remask"
    peaks = []
    for keep in (True, False):
        train = {"max_steps": 1, "batch_size": 1, "keep_weights": keep}
        recipe = Recipe.parse(small_recipe(tmp_path, chain=chain, train=train))
        peaks.append(measures.planned(recipe, tmp_path / "planned").peak_memory_nbytes)
    assert peaks[0] > peaks[1]


def test_a_study_of_a_quantized_folder(tmp_path):
    recipe = small_recipe(tmp_path, chain="keep >> lora(r=2) >> regrid", train={"max_steps": 1, "batch_size": 4})
    model, tokenizer = load(tmp_path / "base")
    dovetail.apply(model, "int(bits=4, group=32, symmetric=signed)")
    dovetail.merge(model, packed=True)
    dovetail.export(model, "gptq", tmp_path / "gptq", dtype="float16", tokenizer=tokenizer)
    row, base = {"name": "kept", "chain": recipe.pop("chain")}, {"name": "base", "of": "kept", "stage": "base"}
    asked = {"title": "t", "common": {**recipe, "model": str(tmp_path / "gptq")}, "rows": [row, base]}
    report = dovetail.study(asked, output=tmp_path / "out", progress=False)
    assert [(each.failed, each.stage, each.mergeable, each.precision) for each in report.results] == [
        ([], "merged", True, "KEEP"), ([], "base", None, "KEEP")
    ]  # fmt: skip
    assert len(report.cells) == 2
    for cell in report.cells:
        assert cell.bits_per_weight < 5
        assert cell.bit_reduction == pytest.approx(1 - cell.nonzero_fraction * cell.bits_per_weight / 16)


def trained(*stages: list[float]) -> Report:
    """A report of stages of training with these losses; nothing else of it is read."""
    training = [
        Losses.model_construct(links=["lora"], losses=list(enumerate(losses, 1)), learning_rates={}, seconds=2.0)
        for losses in stages
    ]
    return Report.model_construct(training=training)


FALLING = [3.0 - 0.02 * step for step in range(100)]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([FALLING], ""),
        ([FALLING[::-1]], "the loss of stage 1 rose from 1.11 to 2.91 (means of 10 steps)"),
        ([FALLING, FALLING[::-1]], "stage 2 rose"),
        ([[2.0, 2.1] * 50], ""),
        ([[2.0] * 5 + [3.0] * 5], "stage 1 rose from 2 to 3 (means of 5 steps)"),
        ([[2.0, 2.3, 2.1, 2.2, 2.0, 2.1, 2.3, 2.2, 2.1, 2.2]], ""),  # noise
        ([[2.0, 9.0]], ""),
        ([[]], ""),
        ([[2.0, float("nan"), 1.0]], "not finite at step 2"),
        ([[*FALLING, float("inf")]], "not finite at step 101"),
    ],
)
def test_what_counts_as_diverged(stages, told):
    found = divergence(trained(*stages))
    assert told in found
    assert bool(told) == bool(found)


def test_means_with_and_without_diverged_runs(tmp_path, monkeypatch):
    common = {key: value for key, value in small_recipe(tmp_path).items() if key != "chain"}
    common["train"] = {"max_steps": 1, "batch_size": 4}
    asked = {"title": "t", "common": common, "seeds": [0, 1], "rows": [{"name": "a", "chain": "ia3"}]}
    monkeypatch.setattr(measures, "divergence", lambda report: "the loss rose" if report.seed == 1 else "")
    report = dovetail.study(asked, output=tmp_path / "out", progress=False)
    (result,) = report.results
    assert isinstance(result, Result)
    assert result.figure.n == 2
    assert result.stable is not None
    assert result.stable.values == result.figure.values[:1]
    assert [cell.diverged for cell in report.cells] == ["", "the loss rose"]
