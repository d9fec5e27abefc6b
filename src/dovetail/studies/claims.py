"""Which process runs which cell, where several processes work on one study: claims in a storage of Optuna.

A cell is a trial of the Optuna study "study NAME", with the attributes `cell` (the name of its folder) and `recipe` (a
digest). A process claims it before it runs it, and writes how it ended. All processes write to one folder, which holds
the results; the storage holds no more than who does what.

A cell whose process ended without a result waits again. On the host of that process this is seen within seconds, and on
other hosts by Optuna's heartbeats (`dovetail.searches.workers`). A process may have rows that the others do not have. A
failed cell is repeated by the next process that starts while no other one is at work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._heartbeat import BaseHeartbeatThread, get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState, create_trial

from dovetail.errors import RecipeError
from dovetail.runs.report.record import REPORT
from dovetail.searches import study as searches
from dovetail.searches.storage import explained, open_storage, quiet_optuna
from dovetail.searches.workers import UNSIGNED_SECONDS, fail_stale, has_ended, this_worker
from dovetail.studies.cells import RUNS, Job, Outcome

_CELL, _RECIPE, _WORKER, _OUTCOME = "cell", "recipe", "worker", "outcome"
_VISIBLE_SECONDS = 60.0
"""How long a file that another machine wrote to a shared folder may be invisible (the caches of NFS)."""


@contextmanager
def open_claims(url: str, folder: Path) -> Iterator[Claims]:
    """Yield the claims of the study in a folder; claims that are held at the end are given back.

    Raises SearchError for a storage that cannot be opened or reached.
    """
    storage = open_storage(url)
    try:
        with explained(url), quiet_optuna():
            name = _name(folder)
            claims = Claims(optuna.create_study(study_name=name, storage=storage, load_if_exists=True), folder)
            try:
                yield claims
            finally:
                claims.release()
    finally:
        storage.remove_session()
        storage.engine.dispose()


def delete_claims(url: str, folder: Path) -> None:
    """Delete the claims of the study in a folder, if there are any."""
    with quiet_optuna():
        searches.delete_study(url, _name(folder))


def _name(folder: Path) -> str:
    return f"study {folder.absolute().name}"


class Claims:
    """The claims of this process and of the others on the cells of one study.

    study    of Optuna; the value of a trial is the seconds of its cell
    folder   of the results, which all processes share
    """

    def __init__(self, study: optuna.Study, folder: Path) -> None:
        self._study, self._storage, self._folder = study, study._storage, folder
        self._held: dict[str, tuple[int, BaseHeartbeatThread, float]] = {}
        self._requeue()
        trials = self._trials()
        working = any(trial.state is TrialState.RUNNING for trial in trials)
        self._again = set() if working else {_key_of(trial) for trial in trials if _OUTCOME in trial.user_attrs}
        """The cells that failed in an earlier start, and have not been repeated by this one."""

    def take(self, left: list[Job]) -> Job | Outcome | None:
        """Claim a cell that waits, or tell how another process ended one, and remove it from the list.

        None: other processes run all that are left.
        """
        self._requeue()
        known: dict[tuple[str, str], list[FrozenTrial]] = {}
        for trial in self._trials():
            known.setdefault(_key_of(trial), []).append(trial)
        for job in left:
            key = _key(job)
            found = self._try(job, key, known.get(key, []))
            if found is not None:
                left.remove(job)
                return found
        return None

    def _try(self, job: Job, key: tuple[str, str], trials: list[FrozenTrial]) -> Job | Outcome | None:
        """Return the job where this process may run it, the outcome where it has ended, None where another runs it.

        trials   of the cell
        """
        states = [trial.state for trial in trials]
        if TrialState.RUNNING in states:
            return None
        if TrialState.COMPLETE in states or self._is_there(job):
            self._check_there(job)
            return Outcome(slug=job.slug)
        if TrialState.WAITING not in states:
            outcomes = [trial.user_attrs[_OUTCOME] for trial in trials if _OUTCOME in trial.user_attrs]
            if outcomes and key not in self._again:
                return Outcome.model_validate_json(outcomes[-1])
            cell, recipe = key
            attributes = {_CELL: cell, _RECIPE: recipe}
            self._study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes))
            trials = [trial for trial in self._trials() if _key_of(trial) == key]
        # Another process may have added one at the same time: both claim the first one, and one of them gets it.
        ids = [trial._trial_id for trial in trials if trial.state is TrialState.WAITING]
        running = any(trial.state is TrialState.RUNNING for trial in trials)
        return job if ids and not running and self._claim(job.slug, min(ids)) else None

    def _claim(self, slug: str, trial_id: int) -> bool:
        """Claim a trial that waits, unless another process has just done so."""
        try:
            if not self._storage.set_trial_state_values(trial_id, state=TrialState.RUNNING):
                return False
            self._storage.set_trial_user_attr(trial_id, _WORKER, this_worker())
        except UpdateFinishedTrialError:
            return False
        heartbeat = get_heartbeat_thread(trial_id, self._storage)
        heartbeat.start()
        self._held[slug] = trial_id, heartbeat, time.perf_counter()
        return True

    def end(self, outcome: Outcome) -> None:
        """Write how a cell of this process ended. After an error that ends the study, the cell waits again."""
        trial_id, heartbeat, started = self._held.pop(outcome.slug)
        heartbeat.join()
        self._again -= {key for key in self._again if key[0] == outcome.slug}
        if outcome.ends:
            self._put_back(trial_id)
            return
        with suppress(UpdateFinishedTrialError):  # by another process, which took this one for lost
            if outcome.problem:
                told = outcome.model_copy(update={"problem": outcome.problem[:2000]})
                self._storage.set_trial_user_attr(trial_id, _OUTCOME, told.model_dump_json())
                self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
            else:
                seconds = time.perf_counter() - started
                self._storage.set_trial_state_values(trial_id, state=TrialState.COMPLETE, values=[seconds])

    def release(self) -> None:
        """Give back the cells that this process has not ended."""
        for trial_id, heartbeat, _ in self._held.values():
            heartbeat.join()
            self._put_back(trial_id)
        self._held.clear()

    def _requeue(self) -> None:
        """Let the cells of lost processes wait again."""
        held = {trial_id for trial_id, _, _ in self._held.values()}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            begun = trial.datetime_start or datetime.now()
            # Before that, the name on it may be missing, or be that of a process that held it before.
            if trial._trial_id in held or datetime.now() - begun <= timedelta(seconds=UNSIGNED_SECONDS):
                continue
            worker = trial.user_attrs.get(_WORKER)
            if worker is None or worker == this_worker() or has_ended(worker):
                self._put_back(trial._trial_id)
        fail_stale(self._study)

    def _put_back(self, trial_id: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, _WORKER, None)
            self._storage.set_trial_state_values(trial_id, state=TrialState.WAITING)

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _is_there(self, job: Job) -> bool:
        return (self._folder / RUNS / job.slug / REPORT).is_file()

    def _check_there(self, job: Job) -> None:
        """Raise RecipeError where the result of a finished cell is not in the folder."""
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not self._is_there(job):
            if time.monotonic() > deadline:
                found = f"no {RUNS}/{job.slug}, which another process has finished according to the storage"
                rule = "all processes of a study must write to the same folder"
                fix = "pass the shared folder as --output; or give the new one another name, or pass --no-resume"
                raise RecipeError(f"output {self._folder}", found=found, rule=rule, fix=fix)
            time.sleep(1)


def _key(job: Job) -> tuple[str, str]:
    """Return what a cell is known by: its folder, and a digest of its recipe."""
    return job.slug, hashlib.sha256(job.recipe.model_dump_json().encode()).hexdigest()[:32]


def _key_of(trial: FrozenTrial) -> tuple[str, str]:
    return trial.user_attrs[_CELL], trial.user_attrs[_RECIPE]
