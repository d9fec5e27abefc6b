"""Commands as a user types them: output, JSON, exit codes, and how fast the help answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from signal import SIGINT, default_int_handler, signal
from time import sleep
from typing import get_type_hints

import pytest
import typer
from rich.console import Console
from typer.models import OptionInfo
from typer.testing import CliRunner

from dovetail.chains.registry import links
from dovetail.checkpoint.footprint import footprint
from dovetail.checkpoint.load import load
from dovetail.cli.main import app, main
from dovetail.display.tables import print_table
from small_runs import MAIN, save_model, save_sums, small_recipe


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `dovetail ARGUMENTS` in this process; returns exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dovetail", *map(str, arguments)])
        monkeypatch.setattr("dovetail.cli.main.quiet", lambda: None)  # it changes this process for good
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return call


def test_help_has_examples(command):
    code, out, _ = command("--help")
    assert code == 0
    for name in ("quickstart", "run", "plan", "methods", "evaluate", "report"):
        assert name in out
        code, page, _ = command(name, "--help")
        assert code == 0
        assert f"Example: dovetail {name}" in page
        assert "--json" in page


def test_help_fits_80_columns_and_names_no_type_of_a_flag():
    def walk(group, words=()):
        yield words
        for name, inner in getattr(group, "commands", {}).items():
            yield from walk(inner, (*words, name))

    for words in walk(typer.main.get_command(app)):
        page = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output
        assert "Usage: dovetail" in page
        assert "…" not in page
        assert "<bool>" not in page


def test_options_have_their_declared_names():
    """Some versions of typer take the name from the metavar: each option declares its own, in lower case."""

    def walk(group: typer.Typer):
        yield from [each.callback for each in (group.registered_callback, *group.registered_commands) if each]
        for inner in group.registered_groups:
            yield from walk(inner.typer_instance)

    count = 0
    for function in walk(app):
        for name, hint in get_type_hints(function, include_extras=True).items():
            for option in (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, OptionInfo)):
                declared = [text for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
                long = [part for text in declared for part in text.split("/") if part.startswith("--")]
                flags = {"--json"} if name == "as_json" else {f"--{name.replace('_', '-')}"}
                assert flags <= set(long) == {part.lower() for part in long}, (function.__name__, name)
                count += 1
    assert count > 60


_STARTUP = """
import sys
from dovetail.cli.main import main

recipe = sys.argv[1]

def call(*arguments):
    sys.argv = ["dovetail", *arguments]
    try:
        main()
    except SystemExit as done:
        return done.code or 0

assert call("--help") == 0
assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
sys.modules.update(dict.fromkeys(["scipy", "sklearn", "matplotlib", "numba", "datasets"]))  # cannot be imported now
assert call("methods") == 0
assert call("plan", "lorra(r=4)") == 2
assert call("run", recipe) == 2
assert "transformers" not in sys.modules
assert call("plan", "nf4 >> lora >> regrid", "--no-memory") == 0
"""


def test_commands_import_what_they_use(tmp_path):
    (tmp_path / "typo.yaml").write_text("model: playground\nchian: lora\ndata: word_problems\n")
    done = subprocess.run(
        [sys.executable, "-c", _STARTUP, tmp_path / "typo.yaml"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "did you mean chain?" in done.stderr


def test_usage_errors(command):
    for arguments in (["run"], ["plan"], ["fly"], ["plan", "lora", "--batch-size", "0"], ["evaluate", "playground"]):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err


def test_version(command):
    assert command("--version")[:2] == (0, f"dovetail {version('dovetail')}\n")


def _run_in(folder: Path) -> None:
    """Run the command in this process, which was forked and need not import everything again."""
    os.chdir(folder)
    signal(SIGINT, default_int_handler)  # a suite in the background ignores it
    sys.argv = ["dovetail", "run", "recipe.yaml", "-o", "out"]
    with open("err.txt", "w", buffering=1) as sys.stderr:
        main()


def test_ctrl_c_says_where_it_stopped_and_how_to_resume(tmp_path):
    recipe = small_recipe(
        tmp_path, train={"max_steps": 100_000, "batch_size": 4, "checkpoint_every": 2}, evaluate={"limit": 4}
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    process = get_context("fork").Process(target=_run_in, args=(tmp_path,))
    process.start()
    try:
        while not list(tmp_path.glob("out.partial/training/stage-1/checkpoint-*")):
            assert process.is_alive()
            sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, SIGINT)
        process.join(120)
    finally:
        process.kill()
        process.join()
    err = (tmp_path / "err.txt").read_text()
    assert process.exitcode == 130
    assert re.search(r"^quantized", err, re.MULTILINE)
    assert re.search(r"stopped at train sums, \d+ of 100000\nresume with: dovetail run recipe.yaml --output out\n", err)
    assert "Traceback" not in err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m dovetail methods --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_methods(command):
    code, out, _ = command("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == set(links())
    assert rows["lora"]["arguments"]["alpha"] is None
    assert rows["lora"]["learning_rate"] == 4e-4
    assert rows["remask"]["keeps_zeros"]
    assert not rows["bottleneck"]["mergeable"]
    assert all(row["kind"] and row["summary"] for row in rows.values())
    code, out, _ = command("methods")
    assert code == 0
    assert "lora(r=8, alpha=none, dropout=" in out


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
def test_tables_cut_no_number(width):
    heads = ["stage", "applied once", "bits per\nweight", "bytes\nof the model"]
    rows = [["1", "wanda(0.5)\nint(bits=4, group=64)", "4.625", "1,234,567,890"], ["2", "nf4", "16", "987,654"]]
    written = StringIO()
    print_table(Console(file=written, width=width), heads, rows, words=2)
    for row in rows:
        for cell in row:
            assert all(word in written.getvalue() for word in cell.split())


def test_plan(command, tmp_path):
    model = save_model(tmp_path / "base")
    (model / "model.safetensors").unlink()  # a config is enough
    code, out, _ = command("plan", MAIN, "--model", model, "--batch-size", 4, "--length", 8, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["legal"]
    assert set(plan) >= {"chain", "legal", "stages", "bits_per_weight", "nbytes", "trainable_parameters",
                         "predicted_peak_memory_nbytes"}  # fmt: skip
    code, out, _ = command("plan", MAIN, "--model", model, "--batch-size", 4, "--length", 8)
    assert code == 0
    assert f"{plan['nbytes']:,}" in out
    assert "trains nothing" not in out
    assert "merges without loss" in out
    code, out, _ = command("plan", "lora >> nf4 >> regrid", "--model", model, "--no-memory")
    assert code == 0
    assert "note: stage 2 trains nothing: regrid follows no adapter." in out
    assert "trains nothing" not in command("plan", "wanda(0.5) >> nf4", "--model", model, "--no-memory")[1]
    code, out, err = command("plan", "nf4 >> int", "--model", model)
    assert (code, out) == (2, "")
    assert "a chain has at most one quantizer" in err
    code, out, _ = command("plan", "nf4 >> int", "--model", model, "--json")
    assert code == 2
    assert json.loads(out)["legal"] is False


def test_run_report_evaluate(command, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(small_recipe(tmp_path, train={"max_steps": 1, "batch_size": 4})))
    code, out, err = command("run", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert code == 0
    assert "Merged without loss" in out
    assert "report.html" in out
    assert [line.split()[0] for line in err.splitlines() if "bits per weight" in line] == [
        "base", "pruned", "quantized", "tuned", "merged"
    ]  # fmt: skip
    page = tmp_path / "run" / "report.html"
    whole = page.read_text()
    page.unlink()
    code, out, _ = command("report", tmp_path / "run")
    assert code == 0
    assert "merged" in out
    assert page.read_text() == whole
    code, out, _ = command("report", tmp_path / "run", "--json")
    report = json.loads(out)
    assert report["merge"]["exact"]
    code, out, _ = command("evaluate", tmp_path / "run" / "model", "--task", tmp_path / "recipe.yaml", "--json")
    assert code == 0
    assert json.loads(out) == report["stages"][-1]["metrics"]
    code, out, _ = command("evaluate", tmp_path / "base", "--task", tmp_path / "recipe.yaml", "--adapter",
                           tmp_path / "run" / "adapter")  # fmt: skip
    assert code == 0
    assert "exact match" in out
    model, _ = load(tmp_path / "run" / "model")
    assert footprint(model).nonzero_fraction == pytest.approx(report["footprint"]["nonzero_fraction"])


def test_quickstart_and_json(command, tmp_path, monkeypatch):
    small = json.dumps(small_recipe(tmp_path, train={"max_steps": 1, "batch_size": 4}, data=save_sums(tmp_path)))
    monkeypatch.setattr("dovetail.runs.quickstart.RECIPE", small)
    monkeypatch.chdir(tmp_path)
    code, out, err = command("quickstart", "--json")
    assert code == 0
    assert json.loads(out)["stages"][0]["name"] == "base"
    assert "bits per weight" not in err
    code, _, _ = command("quickstart")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart", "quickstart-2"]
