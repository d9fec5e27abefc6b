"""Trials are never lost: workers that are killed, that end by an error, or that race for the same trial."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime, timedelta

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from dovetail.errors import NotFinite, SearchError
from dovetail.searches.storage import GRACE_SECONDS
from dovetail.searches.study import finished, open_study, requeue, work
from dovetail.searches.workers import this_worker
from quick_space import KILLS, NAME, QuickSpace, RacingSpace, begin, check_nothing_lost, kill_workers

IDENTITY = {"recipe": "quick"}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'search.db'}"


def trials_of(url, space):
    """Run the search with one worker, and return its trials."""
    with open_study(url, NAME, space, IDENTITY) as study:
        work(study, space)
        return finished(study, space)


def told(trials):
    return [(trial.number, trial.state, trial.params, trial.values) for trial in trials]


def test_workers_that_are_killed(url):
    space = RacingSpace(3 * KILLS, seconds=0.1)
    kill_workers(url, space, workers=2, kills=KILLS, seed=0)
    trials = check_nothing_lost(url, space, workers=2)
    assert sum(trial.rung for trial in trials) >= 3


@pytest.mark.parametrize("sampler", ["tpe", "prga"])
def test_a_killed_worker_resumes_to_the_same_trials(tmp_path, sampler):
    space = QuickSpace(8, seconds=0.03, sampler=sampler, objectives=("quality", "nbytes"))
    whole = trials_of(
        f"sqlite:///{tmp_path / 'whole.db'}", QuickSpace(8, sampler=sampler, objectives=("quality", "nbytes"))
    )
    url = f"sqlite:///{tmp_path / 'killed.db'}"
    kill_workers(url, space, workers=1, kills=2, seed=1)
    assert told(trials_of(url, space)) == told(whole)


def test_a_lost_trial_is_repeated_at_once_with_its_number_and_parameters(url):
    space = QuickSpace(1, seconds=60)
    process = begin(url, space)
    deadline = time.monotonic() + 60
    with open_study(url, NAME, space, IDENTITY) as study:
        while not any(trial.params.keys() >= {"a", "b"} for trial in study.get_trials()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = study.get_trials()[0]
        requeue(study)
        assert study.get_trials()[0].state is TrialState.RUNNING  # its worker is alive
        os.kill(process.pid, signal.SIGKILL)
        while process.is_alive():  # not joined: it is a zombie
            time.sleep(0.01)
        requeue(study)
        (waiting,) = study.get_trials()
        assert (waiting.state, waiting.params) == (TrialState.WAITING, before.params)
        space.seconds = 0
        work(study, space)
        (trial,) = finished(study, space)
    process.join()
    assert (trial.number, trial.params) == (0, before.params)


def test_a_trial_of_another_host_is_repeated_without_heartbeat(url, monkeypatch):
    space = QuickSpace(1)
    with open_study(url, NAME, space, IDENTITY) as study:
        monkeypatch.setattr("dovetail.searches.study.this_worker", lambda: this_worker() | {"host": "another"})
        with pytest.warns(UserWarning, match="Heartbeat"):
            trial = study.ask()
        monkeypatch.undo()
        space.suggest(trial)
        study._storage.record_heartbeat(trial._trial_id)
        requeue(study)
        assert study.get_trials()[0].state is TrialState.RUNNING
        long_ago = datetime.now() - timedelta(seconds=2 * GRACE_SECONDS + 86400)
        backend = study._storage._backend
        with backend.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = ?", (str(long_ago),))
        work(study, space)
        (copy,) = finished(study, space)
    assert copy.params == trial.params
    assert copy.number == 1


def test_a_trial_that_no_worker_signed_is_repeated(url, monkeypatch):
    space = QuickSpace(1)
    with open_study(url, NAME, space, IDENTITY) as study:
        study._storage.create_new_trial(study._study_id)  # a worker is killed right here
        requeue(study)
        assert study.get_trials()[0].state is TrialState.RUNNING
        monkeypatch.setattr("dovetail.searches.study.UNSIGNED_SECONDS", 0)
        work(study, space)
        assert [trial.number for trial in finished(study, space)] == [0]


def test_a_kill_while_the_study_is_created(url, monkeypatch):
    """Whatever a killed process leaves of the tables, the next one has a study with all of them."""

    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sqlalchemy.Index, "create", killed)
        patched.setattr(sqlalchemy.sql.ddl.CreateIndex, "__init__", killed)
        with pytest.raises(KeyboardInterrupt):
            trials_of(url, QuickSpace(1))
    assert len(trials_of(url, QuickSpace(1))) == 1
    indices = sqlalchemy.inspect(sqlalchemy.create_engine(url)).get_indexes("studies")
    assert any(index["unique"] and index["column_names"] == ["study_name"] for index in indices)


def test_an_error_ends_the_worker_and_leaves_its_trial(url):
    space = QuickSpace(2)

    class Failing(QuickSpace):
        def score(self, candidate, report):
            raise KeyboardInterrupt

    with open_study(url, NAME, space, IDENTITY) as study:
        with pytest.raises(KeyboardInterrupt):
            work(study, Failing(2))
        assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]
        work(study, space)
        assert [trial.number for trial in finished(study, space)] == [0, 1]


def test_a_candidate_that_diverges_is_a_failed_trial(url):
    class Diverging(QuickSpace):
        def score(self, candidate, report):
            if candidate.params["a"] % 2:
                raise NotFinite("train", found="loss=nan")
            return super().score(candidate, report)

    space = Diverging(6)
    trials = trials_of(url, space)
    assert len(trials) == 6
    assert {trial.state for trial in trials} == {"complete", "failed"}
    for trial in trials:
        assert (trial.state == "failed") == ("loss=nan" in trial.problem) == (trial.params["a"] % 2 == 1)


def test_a_candidate_is_scored_once(url):
    class Small(QuickSpace):
        scored = 0

        def suggest(self, trial):
            trial.suggest_int("a", 0, 1)
            trial.suggest_int("b", 0, 1)

        def score(self, candidate, report):
            self.scored += 1
            return super().score(candidate, report)

    space = Small(10)
    trials = trials_of(url, space)
    assert len(trials) == 10
    assert space.scored == len({tuple(sorted(trial.params.items())) for trial in trials}) <= 4
    by_params = {}
    for trial in trials:
        assert by_params.setdefault(str(trial.params), trial.values) == trial.values


def test_values_that_are_not_finite_fail_the_trial(url):
    class Infinite(QuickSpace):
        def score(self, candidate, report):
            scored = super().score(candidate, report)
            return type(scored)({"quality": float("inf")}, scored.details)

    (trial,) = trials_of(url, Infinite(1))
    assert (trial.state, trial.values) == ("failed", {})


def test_fixed_candidates_and_rungs(url):
    space = RacingSpace(5)
    trials = trials_of(url, space)
    assert [trial.params for trial in trials[:2]] == [{"a": 10, "b": 50}, {"a": 20, "b": 50}]
    assert [trial.rung for trial in trials] == [0] * 5 + [1] * 3
    best = sorted(trials[:5], key=lambda trial: -trial.values["quality"])[:3]
    assert [trial.params for trial in trials[5:]] == [trial.params for trial in best]


def test_workers_race_for_fixed_candidates(url):
    space = RacingSpace(6, seconds=0.05)
    processes = [begin(url, space) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with open_study(url, NAME, space, IDENTITY) as study:
        keys = [t.user_attrs["key"] for t in study.get_trials(states=(TrialState.COMPLETE,)) if "key" in t.user_attrs]
        assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    assert len(keys) == len(set(keys))
    assert {"start 10", "start 20"} <= set(keys)


def test_pruned_trials_count(url):
    space = QuickSpace(12, pruning="median")
    trials = trials_of(url, space)
    assert len(trials) == 12
    assert {trial.state for trial in trials} == {"complete", "pruned"}


def test_a_study_of_another_recipe_is_refused(url):
    space = QuickSpace(1)
    trials_of(url, space)
    with pytest.raises(SearchError, match="other recipe"), open_study(url, NAME, space, {"recipe": "another"}):
        pass
    optuna.create_study(study_name="foreign", storage=url).add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(SearchError, match="no search of Dovetail"), open_study(url, "foreign", space, IDENTITY):
        pass


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("search.db", "URL"),
        ("nosuch://host/search", "nosuch"),
        ("sqlite:///:memory:", "memory"),
        ("sqlite:////no/such/folder/search.db", "unable to open"),
        ("postgresql+pg8000://user:secret@127.0.0.1/search", "pg8000"),
        ("postgresql+psycopg://user:secret@127.0.0.1:1/search", "refused"),
    ],
)
def test_a_storage_that_cannot_be_opened(url, problem, monkeypatch):
    monkeypatch.setattr("dovetail.searches.storage._OPENINGS", 1)
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    with pytest.raises(SearchError, match=problem) as caught, open_study(url, NAME, QuickSpace(1), IDENTITY):
        pass
    assert "secret" not in str(caught.value)


def test_a_trial_that_another_worker_finished_before_it_was_signed_is_left(url, monkeypatch):
    space = QuickSpace(3)
    with open_study(url, NAME, space, IDENTITY) as study:
        pop = optuna.Study._pop_waiting_trial_id
        stolen = []

        def popped(self):
            found = pop(self)
            if found is not None and not stolen:
                stolen.append(found)
                self._storage.set_trial_state_values(found, state=TrialState.FAIL)
            return found

        monkeypatch.setattr(optuna.Study, "_pop_waiting_trial_id", popped)
        work(study, space)
        states = [trial.state for trial in study.get_trials()]
    assert stolen
    assert states.count(TrialState.COMPLETE) == 3
    assert TrialState.RUNNING not in states
