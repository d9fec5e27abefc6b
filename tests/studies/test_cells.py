"""Cells: each run of a study in a process of its own; what is killed or runs out of memory is a row and no more."""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib import import_module
from random import Random

import psutil
import pytest

import dovetail
from dovetail.chains import registry
from dovetail.errors import OutputError, RecipeError
from dovetail.links.adapt.ia3 import IA3
from dovetail.runs.recipe import Recipe
from dovetail.studies import cells, runner, server
from dovetail.studies.cells import InOrder, Job, Outcome, lost, run_cells
from small_runs import small_recipe


def small_study(folder, chains, **changes):
    """One row for each chain, with one seed."""
    common = {key: value for key, value in small_recipe(folder).items() if key != "chain"}
    common |= {"train": {"max_steps": 2, "batch_size": 8, "checkpoint_every": 1}, "merge": "none", **changes}
    rows = [{"name": f"row {at}", "chain": chain} for at, chain in enumerate(chains)]
    return {"title": "Cells", "common": common, "rows": rows}


def cell_of(folder, chain="lora(r=2)", **changes):
    return Job(slug="one", recipe=Recipe.parse({**small_recipe(folder), "chain": chain, **changes}), study=folder,
                verify=False)  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The name of a link that a module of the user registers; another, idle, waits where IA3 computes."""
    (tmp_path / "my_links.py").write_text(
        "import time\nfrom dovetail.links import register\nfrom dovetail.links.adapt.ia3 import IA3\n"
        "@register('mine')\nclass Mine(IA3):\n    pass\n"
        "@register('idle')\nclass Idle(IA3):\n    def lower(self, p):\n        time.sleep(0.05)\n"
        "        return super().lower(p)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_module("my_links")
    yield "mine"
    del registry._REGISTERED["mine"], registry._REGISTERED["idle"], sys.modules["my_links"]


def ended(process: psutil.Process) -> bool:
    """Return whether a process has ended. In a container, nothing may reap one whose parent has ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_cells_are_processes_that_may_be_killed(tmp_path, monkeypatch, mine):
    """Cells are killed at random moments, then the study is stopped; the next start repeats no finished cell."""
    asked = small_study(tmp_path, ["lora(r=2)", "nf4 >> lora(r=2)", f"nf4 >> {mine}", "ia3"])
    endless = {"name": "endless", "chain": "idle", "with": {"train": {"max_steps": 100_000}}}
    random, events, kills = Random(0), [], []

    def stopped(event):
        events.append(event)
        running = [p for p in psutil.Process().children(recursive=True) if p.parent() != psutil.Process()]
        if event.state == "begins" and event.number > 2 and len(kills) < 3:
            time.sleep(random.random())
            random.choice(running).kill()
            kills.append(event.number)
        if event.number == 5 and event.state != "begins":  # the last one
            kills.append(running)
            raise KeyboardInterrupt

    there = tmp_path / "there"
    rows = [endless, *asked["rows"]]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_cells", run_cells)
        with pytest.raises(KeyboardInterrupt):
            dovetail.study({**asked, "rows": rows}, output=there, jobs=2, progress=False, on_run=stopped)
    assert [(event.state, event.number) for event in events[:2]] == [("begins", 1), ("begins", 2)]
    failed = [event for event in events if event.state == "failed"]
    assert failed
    assert all("killed (SIGKILL)" in event.problem for event in failed)
    for _ in range(600):
        if all(map(ended, kills[-1])):
            break
        time.sleep(0.1)
    assert all(map(ended, kills[-1]))
    made = {path.parent.name: path.stat().st_mtime_ns for path in (there / "runs").glob("row-?-s0/report.json")}
    assert {event.name for event in events if event.state == "done"} <= made.keys()

    events.clear()
    report = dovetail.study(asked, output=there, progress=False, on_run=events.append)
    assert {event.name for event in events if event.state == "kept"} == made.keys()
    for slug, time_ns in made.items():
        assert (there / "runs" / slug / "report.json").stat().st_mtime_ns == time_ns
    expected = dovetail.study(asked, output=tmp_path / "here", progress=False)
    assert report.results == expected.results
    assert all(event.left_seconds is not None for event in events if event.state in ("done", "kept"))


def test_out_of_memory_is_a_kind_of_failure(tmp_path, monkeypatch):
    cell, told = cell_of(tmp_path), {}
    for error, kind in {
        MemoryError(): "memory",
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."): "memory",
        RuntimeError("shapes do not fit"): "error",
        ZeroDivisionError(): "error",
    }.items():

        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(cells, "run", fails)
        outcome = cell.done()
        told[outcome.problem] = outcome.kind, kind
    assert len(told) == 4
    assert all(found == wanted for found, wanted in told.values())
    assert lost("one", -signal.SIGKILL).kind == "killed"
    assert "code 3" in lost("one", 3).problem


@pytest.mark.parametrize("kind", [RecipeError, OutputError])
def test_an_error_of_the_folder_ends_the_study(tmp_path, monkeypatch, kind):
    def fails(*args, **kwargs):
        raise kind("output x", found="0 MB", rule="there must be room", fix="make room")

    monkeypatch.setattr(cells, "run", fails)
    outcome = Outcome.model_validate_json(cell_of(tmp_path).done().model_dump_json())
    with pytest.raises(kind, match="make room"):
        outcome.check()


def test_without_fork_a_cell_is_a_new_interpreter(tmp_path, monkeypatch):
    """As on macOS; the interpreter only says what it got."""
    monkeypatch.setattr(server, "FORKS", False)
    monkeypatch.setattr(server, "COMMAND", [sys.executable, "-c", "import sys; print(*sys.argv[1:])"])
    cell = cell_of(tmp_path)
    pipe, process = server._start(cell, 7, ["my_links"])
    with os.fdopen(pipe, "rb") as file:
        assert file.read().decode() == f"7 {cell.model_dump_json()} my_links\n"
    assert os.waitpid(process, 0)[1] == 0


def test_a_link_of_the_main_program_runs_in_it(tmp_path, monkeypatch):
    """No other process could import it."""
    monkeypatch.setattr(IA3, "__module__", "__main__")
    monkeypatch.setattr(cells, "_Server", lambda modules: pytest.fail("another process"))
    monkeypatch.setattr(cells, "run", lambda *args, **kwargs: None)
    assert list(run_cells([cell_of(tmp_path, "ia3")], 1, InOrder())) == ["one", Outcome(slug="one")]
