"""The page: self-contained, hostile text escaped, every part there; charts and words of figures."""

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
from dovetail.display.format import duration, figure, size
from dovetail.errors import LoadError
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.charts import loss_curve
from dovetail.runs.report.page import page
from dovetail.runs.report.record import Checkpoint, Losses, Merge, Packed, Report, Row, TaskInfo
from dovetail.runs.report.summary import print_summary
from dovetail.runs.report.verdict import verdict

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


@pytest.mark.parametrize("changes", [{}, {"merge": None, "checkpoint": None, "packed": None, "training": []}])
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
    for part in ("Chain", "After each stage", "Merge", "Run", "Recipe", "stage 2", "25.0 %", "infinite", "bits 4"):
        assert part in text
    assert ("Training loss" in text) == ("training" not in changes)


def test_the_summary_prints_hostile_text_as_it_is(tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(console, make_report(), tmp_path)
    text = console.export_text()
    assert HOSTILE in text
    assert "25.0 %" in text
    assert "900 kB, 3.31 bits a weight on disk" in text


def test_the_loss_curve():
    drawn = ElementTree.fromstring(loss_curve(make_report().training))
    lines = [element for element in drawn.iter() if element.tag == "polyline"]
    assert len(lines) == 4  # raw and mean of two stages
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert all(0 <= x <= 720 and 0 <= y <= 240 for x, y in points)
    assert loss_curve([]) == ""
    long = [Losses(links=[], losses=[(n, 1.0) for n in range(1, 100_001)], learning_rates={}, seconds=1)]
    assert len(loss_curve(long)) < 100_000


def test_figures_in_words():
    assert figure("exact_match", 0.1234) == "12.3 %"
    assert figure("pearson", -0.5) == "-0.500"
    assert figure("perplexity", None) == "infinite"
    assert [size(n) for n in (0, 999, 1000, 1_234_567)] == ["0 bytes", "999 bytes", "1 kB", "1.23 MB"]
    assert [duration(s) for s in (0.04, 59.9, 61, 3700)] == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 1 min"]


def test_verdicts():
    def merged(exact, difference):
        return MergeReport(exact, difference, difference, 0.5, 0.5, 0, difference, FOOTPRINT)

    assert verdict(merged(True, 0.0), lossy=True, quantized=True).startswith("Merged without loss")
    assert "off the quantization grid: 0" in verdict(merged(True, 0.0), lossy=False, quantized=True)
    assert verdict(merged(False, 0.1), lossy=True, quantized=False).startswith("Merged with loss")
    assert verdict(merged(False, 1e-9), lossy=False, quantized=False).startswith("Merged, rounded once")
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
