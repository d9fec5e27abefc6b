"""Several processes on one study: no run is done twice, and none is lost with a process that is killed."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import time
from datetime import datetime, timedelta

import pytest
import torch
from optuna.trial import TrialState

import dovetail
from dovetail.errors import RecipeError, SearchError
from dovetail.runs.recipe import Recipe
from dovetail.searches.storage import GRACE_SECONDS
from dovetail.studies import cells, claims
from dovetail.studies.cells import Job, Outcome
from dovetail.studies.claims import open_claims
from small_runs import small_recipe

torch.set_num_threads(1)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'claims.db'}"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(claims, "UNSIGNED_SECONDS", 0)
    monkeypatch.setattr(claims, "_VISIBLE_SECONDS", 0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Three cells of one study; they are claimed and not run."""
    folder = tmp_path_factory.mktemp("jobs")
    recipes = [Recipe.parse(small_recipe(folder, seed=seed)) for seed in range(3)]
    return [Job(slug=f"cell-{at}", recipe=recipe, study=folder, verify=False) for at, recipe in enumerate(recipes)]


def finish(mine, job, folder):
    """Write the result of a cell, as far as claims read it, and say so."""
    place = folder / "runs" / job.slug
    place.mkdir(parents=True)
    (place / "report.json").touch()
    mine.end(Outcome(slug=job.slug))


@pytest.fixture
def strangers(monkeypatch):
    """Whoever signs a cell is a process of another host."""
    numbers = itertools.count(1)
    monkeypatch.setattr(claims, "this_worker", lambda: {"host": "another", "pid": next(numbers), "started": 0.0})


@pytest.mark.usefixtures("strangers")
def test_each_cell_has_one_process(url, jobs, tmp_path):
    with open_claims(url, tmp_path) as one, open_claims(url, tmp_path) as two:
        left, others = list(jobs), list(jobs)
        first, second = one.take(left), two.take(others)
        assert (first, second) == (jobs[0], jobs[1])
        assert (left, others) == (jobs[1:], [jobs[0], jobs[2]])
        assert two.take(others) == jobs[2]
        assert two.take(others) is None  # the other one runs it
        finish(one, jobs[0], tmp_path)
        finish(two, jobs[1], tmp_path)
        assert two.take(others) == Outcome(slug=jobs[0].slug)
        assert one.take(left) == Outcome(slug=jobs[1].slug)
        assert one.take(left) is None
    with open_claims(url, tmp_path) as three:  # the second one gave its last cell back
        assert three.take(left) == jobs[2]
        assert [trial.state for trial in three._trials()].count(TrialState.RUNNING) == 1


@pytest.mark.usefixtures("strangers")
def test_a_failure_is_told_to_the_others_and_repeated_by_the_next_start(url, jobs, tmp_path):
    failure = Outcome(slug=jobs[0].slug, problem="TrainError: loss nan")
    with open_claims(url, tmp_path) as one, open_claims(url, tmp_path) as two:
        left, others = list(jobs[:2]), list(jobs[:1])
        assert one.take(left) == jobs[0]
        one.end(failure)
        assert two.take(others) == failure
        assert one.take(left) == jobs[1]
        with open_claims(url, tmp_path) as late:  # the first one is at work
            assert late.take([jobs[0]]) == failure
    with open_claims(url, tmp_path) as again:
        assert again.take([jobs[0]]) == jobs[0]
        again.end(failure)
        assert again.take([jobs[0]]) == failure  # once
        assert again.take([jobs[1]]) == jobs[1]
        again.end(Outcome(slug=jobs[1].slug, ends={"type": "OutputError", "where": "a full disk"}))
        assert again.take([jobs[1]]) == jobs[1]


def test_a_result_must_be_in_the_shared_folder(url, jobs, tmp_path):
    with open_claims(url, tmp_path / "a" / "out") as one:
        assert one.take([jobs[0]]) == jobs[0]
        finish(one, jobs[0], tmp_path / "a" / "out")
    with (
        open_claims(url, tmp_path / "b" / "out") as two,
        pytest.raises(RecipeError, match=r"no runs/cell-0(.|\n)*the same folder"),
    ):
        two.take([jobs[0]])


@pytest.mark.usefixtures("strangers")
def test_a_cell_of_another_host_is_repeated_without_heartbeat(url, jobs, tmp_path):
    with open_claims(url, tmp_path) as one:
        assert one.take([jobs[0]]) == jobs[0]
        held = one._held.pop(jobs[0].slug)
        held[1].join()  # its machine is lost
    with open_claims(url, tmp_path) as two:
        assert two.take([jobs[0]]) is None
        long_ago = datetime.now() - timedelta(seconds=2 * GRACE_SECONDS + 86400)
        with two._storage._backend.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = ?", (str(long_ago),))
        assert two.take([jobs[0]]) == jobs[0]
        finish(two, jobs[0], tmp_path)
        assert [trial.state for trial in two._trials()] == [TrialState.FAIL, TrialState.COMPLETE]


def test_processes_that_claim_at_the_same_time(url, jobs, tmp_path, monkeypatch):
    """Each process looks, finds that the cell waits, and claims it; one of them gets it."""
    monkeypatch.setattr(claims, "UNSIGNED_SECONDS", 600)  # a claim without a name is not lost
    context = multiprocessing.get_context("fork")
    with open_claims(url, tmp_path):
        pass  # the tables are there
    barrier, got = context.Barrier(4), context.Queue()

    def race(number):
        with open_claims(url, tmp_path) as mine:
            for job in jobs:
                barrier.wait(60)
                got.put((job.slug, number) if mine.take([job]) == job else None)
            barrier.wait(60)

    processes = [context.Process(target=race, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    found = [got.get(timeout=60) for _ in range(4 * len(jobs))]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(slug for slug, _ in filter(None, found)) == [job.slug for job in jobs]


def test_two_processes_one_of_which_is_killed(url, tmp_path, monkeypatch):
    """All runs are there, each done once to its end, and the report is that of one process alone."""
    common = {key: value for key, value in small_recipe(tmp_path).items() if key != "chain"}
    common["train"] = {"max_steps": 1, "batch_size": 8}
    chains = ["lora(r=1)", "lora(r=2)", "lora(r=3)"]
    rows = [{"name": f"row {at}", "chain": chain, "with": {"merge": "none"}} for at, chain in enumerate(chains)]
    asked = {"title": "Claims", "common": common, "rows": rows}
    expected = dovetail.study(asked, output=tmp_path / "alone", progress=False)

    log, folder = tmp_path / "log", tmp_path / "out"

    def quick(recipe, *, output, **arguments):
        """Copy the run; the process that is to be killed does not come to an end."""
        with log.open("a") as file:
            file.write(f"{output.name}\n")
        time.sleep(600 if multiprocessing.current_process().name == "killed" else 0.1)
        shutil.copytree(tmp_path / "alone" / "runs" / output.name, output)

    def work():
        dovetail.study(asked, output=folder, storage=url, progress=False)

    def wait_for(lines):
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr(cells, "run", quick)
    context = multiprocessing.get_context("fork")
    killed, other = (context.Process(target=work, name=name) for name in ("killed", "other"))
    killed.start()
    wait_for(1)
    other.start()
    wait_for(2)
    killed.kill()
    other.join()
    assert other.exitcode == 0
    begun = log.read_text().splitlines()
    assert begun[:2] == ["row-0-s0", "row-1-s0"]
    assert sorted(begun[2:]) == ["row-0-s0", "row-2-s0"]
    assert (folder / "study.json").is_file()
    killed.join()

    seen = []
    report = dovetail.study(asked, output=folder, storage=url, progress=False, on_run=seen.append)
    assert [event.state for event in seen] == ["kept"] * 3
    assert report.results == expected.results
    monkeypatch.undo()
    assert dovetail.study(asked, output=folder, progress=False).results == expected.results
    dovetail.study({**asked, "rows": rows[:1]}, output=folder, storage=url, progress=False, resume=False)
    assert [path.name for path in (folder / "runs").iterdir()] == ["row-0-s0"]


def test_a_storage_that_ends_with_the_process_is_refused(tmp_path):
    common = {key: value for key, value in small_recipe(tmp_path).items() if key != "chain"}
    asked = {"title": "Claims", "common": common, "rows": [{"name": "a", "chain": "lora(r=1)"}]}
    with pytest.raises(SearchError, match="in memory"):
        dovetail.study(asked, output=tmp_path / "out", storage="sqlite:///:memory:")
    assert not (tmp_path / "out").exists()
