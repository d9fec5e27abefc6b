"""The page: self-contained, hostile text escaped, every part present; plots, and the outcome in words."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console

from dovetail.checkpoint.footprint import Footprint
from dovetail.checkpoint.merge import MergeReport
from dovetail.display.format import duration, format_score, size
from dovetail.errors import LoadError
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.page import page, running_mean
from dovetail.runs.report.record import Checkpoint, Example, Losses, Merge, Packed, Report, Row, TaskInfo
from dovetail.runs.report.summary import learned_nothing, print_summary, verdict
from dovetail.tasks.task import Task

HOSTILE = '<script>alert("x")</script>&[bold]'
CHAIN = "ia3 >> wanda(0.5) >> int(bits=4) >> lora(r=4) >> remask >> regrid"
FOOTPRINT = Footprint(bits_per_weight=4.5, nbytes=1_234_567, nonzero_fraction=0.5, trainable_parameters=12_345)


def make_report(**changes) -> Report:
    rows = [
        Row(name=name, metrics={HOSTILE: {"exact_match": 0.25, "n": 8}, "text": {"perplexity": math.inf, "n": 8}},
            footprint=FOOTPRINT, seconds=75)
        for name in ("base", "pruned", "tuned", "merged")
    ]  # fmt: skip
    report = Report(
        task=TaskInfo(name=HOSTILE, kind="generation", metric="exact_match", split="test"), chain=CHAIN, model=HOSTILE,
        seed=3, stages=rows, verdict=HOSTILE,
        merge=Merge(exact=True, max_abs_weight_diff=0, max_abs_logit_diff=None, sparsity_before=0.5,
                    sparsity_after=0.5, off_grid=0),
        footprint=FOOTPRINT, peak_memory_nbytes=10**9, seconds=4000,
        training=[Losses(links=["ia3"], losses=[(1, 2.0), (2, 1.0)], learning_rates={HOSTILE: 1e-2}, seconds=1.5),
                  Losses(links=["lora"], losses=[(1, float("nan")), (2, 1.0)], learning_rates={}, seconds=1.5)],
        checkpoint=Checkpoint(nbytes=2_000_000, max_abs_logit_diff=0.0),
        examples=[Example(prompt=HOSTILE, expected=HOSTILE, before="<img src=x onerror=alert(1)>", after="")] * 2,
        packed=Packed(nbytes=900_000, bits_per_weight=3.31, max_abs_logit_diff=0.0), environment={HOSTILE: HOSTILE},
    )  # fmt: skip
    return report.model_copy(update=changes)


RECIPE = Recipe.parse({"model": HOSTILE, "chain": CHAIN, "data": {"task": HOSTILE}})


class Strict(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "changes", [{}, {"merge": None, "checkpoint": None, "packed": None, "training": [], "examples": []}]
)
def test_the_page(changes):
    text = page(make_report(**changes), RECIPE)
    parsed = Strict()
    parsed.feed(text)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "url(" not in text
    assert "@import" not in text
    for part in ("Chain", "After each stage", "Merge", "Run", "Recipe", "stage 2", "25.0 %", "not finite", "bits 4"):
        assert part in text
    assert ("Learning rates" in text) == ("training" not in changes)
    assert text.count("&lt;img src=x") == (0 if "examples" in changes else 2)


def test_the_summary_prints_hostile_text_as_it_is(tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(console, make_report(), tmp_path)
    text = console.export_text()
    assert HOSTILE in text
    assert "25.0 %" in text
    assert "900 kB, 3.31 bits per weight on disk" in text


def plots(report) -> list[ElementTree.Element]:
    """The plots of training on the page of a report."""
    found = re.findall(r'<svg viewBox="0 0 720.*?</svg>', page(report, RECIPE), re.DOTALL)
    return [ElementTree.fromstring(text) for text in found]


def losses(*values, **fields) -> Losses:
    return Losses(links=[], losses=list(enumerate(values, 1)), learning_rates={}, seconds=1, **fields)


def test_the_plots_of_training():
    training = [losses(2.0, 1.0, validation=[(1, 0.25), (2, 0.5)]), losses(float("nan"), 1.0)]
    loss, validation = plots(make_report(training=training))
    lines = [element for element in loss.iter() if element.tag == "polyline"]
    assert [line.attrib["class"] for line in lines] == ["raw", "raw", "mean", "mean"]
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert all(64 <= x <= 704 and 0 <= y <= 240 for x, y in points)
    assert len([element for element in validation.iter() if element.tag == "circle"]) == 2
    assert [element.text for element in validation.iter() if element.tag == "text"][:6] == [
        "0", "10", "20", "30", "40", "50"
    ]  # fmt: skip
    assert plots(make_report(training=[losses(float("nan"))])) == []
    assert len(plots(make_report(training=[losses(0.0, 0.0)]))) == 1
    assert len(page(make_report(training=[losses(*[1.0] * 100_000)]), RECIPE)) < 100_000


def test_the_running_mean_starts_at_the_first_loss():
    points = [(step, 5.0 if step == 1 else 1.0) for step in range(1, 1001)]
    mean = running_mean(points)
    assert mean[0] == (1, 5.0)
    assert [step for step, _ in mean] == [step for step, _ in points]
    assert mean[-1][1] == pytest.approx(1.0)
    assert running_mean(points[:1]) == points[:1]


def scored(*values, metric="accuracy", n=500, chance=None, names=("base", "pruned", "tuned", "merged")) -> Report:
    rows = [
        Row(name=name, metrics={"task": {metric: value, "n": n}}, footprint=FOOTPRINT, seconds=1)
        for name, value in zip(names, values, strict=True)
    ]
    task = TaskInfo(name="task", kind="choice", metric=metric, split="test", chance=chance)
    return make_report(stages=rows, task=task)


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (scored(0.11, 0.10, 0.99, 0.99), ""),
        (scored(0.11, 0.11, 0.11, 0.11), "learned nothing: accuracy is 11.0 % before training and 11.0 % after."),
        (scored(0.11, 0.11, 0.12, 0.12), "within two standard errors"),
        (scored(0.60, 0.30, 0.59, 0.59), "no better than its base: accuracy is 60.0 % for the base, 30.0 % before"),
        (scored(0.26, 0.20, 0.28, 0.28, chance=0.25), "at chance, which is 25.0 %"),
        (scored(0.26, 0.20, 0.60, 0.60, chance=0.25), ""),
        (scored(0.1, 0.0, 0.05, 0.05, metric="matthews", chance=0.0), "at chance, which is 0.000"),
        (scored(90.0, 120.0, 80.0, 80.0, metric="perplexity"), ""),
        (scored(90.0, 120.0, 100.0, 100.0, metric="perplexity"), "no better than its base"),
        (scored(None, None, 100.0, 100.0, metric="perplexity"), ""),
        (scored(90.0, 120.0, None, None, metric="perplexity"), "learned nothing"),
        (scored(0.1, 0.1, names=("base", "pruned")).model_copy(update={"training": []}), ""),
    ],
)
def test_a_run_that_learned_nothing_says_so_first(report, told, tmp_path):
    warning = learned_nothing(report)
    assert told in warning
    assert bool(told) == bool(warning)
    console = Console(width=300, record=True, file=io.StringIO())
    print_summary(console, report, tmp_path)
    first = console.export_text().strip().splitlines()[0]
    assert first.startswith(warning or CHAIN)
    assert ('<div class="verdict lossy"><span class="mark">!' in page(report, RECIPE)) == bool(warning)


@pytest.mark.parametrize(
    ("kind", "metric", "records", "chance"),
    [
        ("choice", "accuracy", [{"prompt": "", "choices": ["a"] * count, "label": 0} for count in (2, 4)], 0.375),
        ("pairs", "accuracy", [{"good": "a", "bad": "b"}], 0.5),
        ("classification", "accuracy", [{"text": "", "label": label} for label in (0, 1, 1, 2)], 0.5),
        ("classification", "matthews", [{"text": "", "label": 0}], 0.0),
        ("regression", "spearman", [{"text": "", "label": 0.5}], 0.0),
        ("generation", "exact_match", [{"prompt": "", "answer": "a"}], None),
    ],
)
def test_the_score_at_chance(kind, metric, records, chance):
    assert TaskInfo.of(Task("task", kind, metric, {"test": records}), "test").chance == chance


def test_a_narrow_console_cuts_no_number(tmp_path):
    for width in (20, 40, 60, 80):
        console = Console(width=width, record=True, file=io.StringIO())
        print_summary(console, scored(0.11, 0.10, 0.99, 0.99), tmp_path)
        text = console.export_text()
        assert "…" not in text
        assert text.count("1.23 MB") == 4


def test_scores_sizes_and_durations_as_text():
    assert format_score("exact_match", 0.1234) == "12.3 %"
    assert format_score("pearson", -0.5) == "-0.500"
    assert format_score("perplexity", None) == "not finite"
    assert [size(n) for n in (0, 999, 1000, 1_234_567)] == ["0 bytes", "999 bytes", "1 kB", "1.23 MB"]
    assert [duration(s) for s in (0.04, 59.9, 61, 3700)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 1 min"]


def test_verdicts():
    def merged(exact, difference):
        return MergeReport(exact, difference, difference, 0.5, 0.5, 0, difference, FOOTPRINT)

    assert verdict(merged(True, 0.0), lossy=True, quantized=True).startswith("Merged without loss")
    assert "off the quantization grid: 0" in verdict(merged(True, 0.0), lossy=False, quantized=True)
    assert verdict(merged(False, 0.1), lossy=True, quantized=False).startswith("Merged with loss")
    assert verdict(merged(False, 1e-9), lossy=False, quantized=False).startswith("Merged, rounded once")
    other = MergeReport(False, 0.0, 0.9, 0.5, 0.5, 0, 0.0, FOOTPRINT)
    assert "computes something else" in verdict(other, lossy=False, quantized=False)
    assert verdict(None, lossy=False, quantized=True).startswith("Not merged")


def test_reading_a_report_back(tmp_path):
    report = make_report(training=[])
    with pytest.raises(LoadError, match="No such file"):
        Report.load(tmp_path)
    report.save(tmp_path)
    again = Report.load(tmp_path)
    assert again.stages == report.stages
    whole = (tmp_path / "report.json").read_text()
    (tmp_path / "report.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match="JSON"):
        Report.load(tmp_path)
    (tmp_path / "report.json").write_text(whole.replace('"metric": "exact_match"', '"metric": "other"'))
    with pytest.raises(LoadError, match="without other"):
        Report.load(tmp_path)


def test_the_recipe_in_the_page_repeats_the_run(tmp_path):
    text = page(make_report(), Recipe.parse({"model": "playground", "chain": CHAIN, "data": "word_problems"}))
    shown = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert shown is not None
    values = yaml.safe_load(shown.group(1).replace("&gt;", ">"))
    assert Recipe.parse(values).chain == str(Recipe.parse(values | {"chain": CHAIN}).chain)
