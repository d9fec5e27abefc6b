"""The files of a study: Markdown, LaTeX and CSV, and a page that a browser sorts and that fits a phone."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from html import escape

import pytest

from dovetail.studies.drawings import heat_maps, heat_table
from dovetail.studies.measures import Cell
from dovetail.studies.page import page
from dovetail.studies.standing import boards
from dovetail.studies.tables import measure_tables, tables
from dovetail.studies.texts import comma_separated, latex, markdown
from study_reports import line, matrix, study_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REPORT = matrix()
TABLES = [*tables(REPORT), *measure_tables(REPORT)]


def test_every_task_has_its_table_and_the_average_follows():
    assert [table.title for table in TABLES] == [
        "accuracy on sums", "accuracy on words", "average over 2 tasks", "Differences", "Sizes and parameters",
        "Memory and time of training",
    ]  # fmt: skip
    sums, _, average, differences, sizes, training = TABLES
    assert sums.texts[0] == ["tuned", "none", "lora", "x", "yes", "FP32", "0.0 %", "90.3 ± 0.3 %", "3"]
    assert average.texts[0] == ["tuned", "none", "lora", "85.3 ± 0.3 %", "3"]
    assert len(differences.rows) == 2 * (6 + 2)
    assert sizes.texts[0][3:8] == ["400 bytes", "90 bytes", "16 MB", "16.00", "70.0 %"]
    assert training.texts[1][-1] == "2 of 6"
    assert training.texts[1][4:6] == ["11 MB", "1 kB"]
    for table in TABLES:
        assert {len(row) for row in table.rows} == {len(table.heads)}
    assert any("seed 0 diverged: the loss rose" in remark for remark in sums.remarks)


def test_markdown_begins_with_the_outcome():
    text = markdown(REPORT)
    first = text.split("\n\n")[2].splitlines()
    assert first[0] == "- Best accuracy on the average of 2 tasks: tuned (none, dora), 86.6 ± 0.6 % (3 seeds)."
    assert [said[2:] for said in first] == REPORT.summary
    assert first[-1].startswith("- Best accuracy on sums: tuned (none, dora, x), 91.6 ± 0.6 % (3 seeds). It ")


def test_latex_compiles_as_far_as_can_be_told_without_latex():
    text = latex(REPORT)
    assert "booktabs" in text.splitlines()[0]
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(TABLES)
    assert r"Quantizers \& $<$adapters$>$" in text
    body = re.sub(r"\\[&%$#_{}]", "", text)
    assert re.search(r"\d %", body) is None
    assert body.count("{") == body.count("}")
    assert body.count("$") % 2 == 0
    for part in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        columns, rows = part
        for row in rows.splitlines():
            if row.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1


def test_csv_holds_every_run_exactly():
    report = study_of(
        line("A", [1 / 3, None], failed=(2,), point={"r": 4}, diverged="it rose"), line("B", [0.5]), vary={"r": [4]}
    )
    rows = list(csv.DictReader(io.StringIO(comma_separated(report))))
    assert [(row["row"], row["axis r"], row["seed"], row["state"]) for row in rows] == [
        ("A", "4", "0", "diverged"), ("A", "4", "1", "done"), ("A", "4", "2", "failed"), ("B", "", "0", "done")
    ]  # fmt: skip
    assert float(rows[0]["score"]) == 1 / 3 == float(rows[0]["t accuracy"])
    assert rows[1]["score"] == ""
    assert rows[2]["problem"] == "out of memory"
    assert set(Cell.model_fields) - {"point", "scores"} <= set(rows[0])
    assert [row["metric"] for row in rows] == ["accuracy"] * 4


def test_the_heat_map():
    sums, *_ = boards(REPORT)
    (found,) = heat_maps(sums, ["quantizer", "adapter", "data"])
    assert (found.down, found.across, found.rest) == ("quantizer", "adapter", {"data": "x"})
    text = heat_table(sums, found)
    heats = [int(heat) for heat in re.findall(r"--heat:(\d+)%", text)]
    assert (len(heats), min(heats), max(heats)) == (9, 0, 60)
    assert heats.index(60) == 1
    assert list(heat_maps(boards(study_of(line("A", [0.5])))[0], ["r"])) == []


def test_missing_values_are_shown_as_missing():
    report = study_of(line("A", [None, 0.5]), line("B", [0.5, 0.6], nbytes_untuned=None, score_untuned=None))
    text = page(report, None)
    assert "nan" not in text.lower().replace("isnan", "")
    assert "inf" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL).lower()


PROBE = """
<script>
const tables = [...document.querySelectorAll("table.sortable")], found = {heads: tables.length};
const column = (table, at) => [...table.tBodies[0].rows].map(row => row.cells[at].textContent);
const heads = [...tables[0].tHead.rows[0].cells].map(head => head.textContent), at = heads.indexOf("accuracy");
found.before = column(tables[0], at);
tables[0].tHead.rows[0].cells[at].click(); found.up = column(tables[0], at);
tables[0].tHead.rows[0].cells[at].click(); found.down = column(tables[0], at);
tables[0].tHead.rows[0].cells[1].click(); found.words = column(tables[0], 1);
found.sort = tables[0].tHead.rows[0].cells[1].getAttribute("aria-sort");
found.page = [document.documentElement.scrollWidth, document.documentElement.clientWidth];
found.plots = [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width);
found.heat = getComputedStyle(document.querySelectorAll("td.heat")[1]).backgroundColor;
top.document.title = JSON.stringify(found);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_sorts_the_tables_and_the_page_fits(tmp_path, width):
    """A desktop's width and a phone's, which is less than that of any window: the page stands in a frame."""
    assert BROWSER is not None
    text = page(REPORT, None)
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE)
    file = tmp_path / "study.html"
    file.write_text(f'<!doctype html><title></title><iframe width="{width}" height="900" srcdoc="{escape(probed)}">')
    asked = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path}/u",
             "--window-size=1500,1000", "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    found = json.loads(title[1])
    numbers = [float(text.split()[0]) for text in found["before"]]
    assert [float(text.split()[0]) for text in found["up"]] == sorted(numbers)
    assert [float(text.split()[0]) for text in found["down"]] == sorted(numbers, reverse=True)
    assert found["words"] == sorted(found["words"])
    assert found["sort"] == "ascending"
    assert found["page"][1] in (width, width - 15)  # without its scroll bar
    assert found["page"][0] <= found["page"][1]  # wide tables scroll in their own frame
    assert found["plots"]
    assert max(found["plots"]) <= width
    assert found["heat"] not in ("", "rgba(0, 0, 0, 0)")
