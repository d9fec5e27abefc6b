"""The trials of a search as an Optuna study, and the workers that share it.

All state is the study's. Any number of processes on any number of machines run `work` on one study; each takes the next
trial until enough of them are finished. What one worker needs to know of another is on the trial: its host, its process
and the start time of that process.

A trial whose worker ended without a result waits in the queue again, with its number and its parameters, and the next
free worker repeats it. On the host of the lost worker that happens at once, since its process is gone. On other hosts
the heartbeats of Optuna tell, after `storage.GRACE_SECONDS`; then the trial fails and a copy of it waits.

Numbers of a sampler follow from the seed of the recipe, the number of the trial and the name of the parameter. So one
worker that was killed and resumed proposes what it would have proposed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from math import isfinite
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState, create_trial

from dovetail.errors import NotFinite, SearchError, TrainError
from dovetail.runs.search_settings import ChainSettings, LayerSettings
from dovetail.searches.report import Trial
from dovetail.searches.samplers import PRGASampler, RefineSampler, ThreeStageSampler
from dovetail.searches.samplers.proposal import ProposalSampler
from dovetail.searches.space import Candidate, Scored, SearchSpace
from dovetail.searches.storage import explained, hidden, open_storage
from dovetail.searches.workers import UNSIGNED_SECONDS, fail_stale, has_ended, this_worker

if TYPE_CHECKING:
    from optuna.pruners import BasePruner

_WAIT_SECONDS = 1.0
"""Time between two looks at the study while other workers run the last trials."""
_IDENTITY, _PREPARED = "dovetail:identity", "dovetail:prepared"
_WORKER, _KEY, _RUNG, _SECONDS, _DETAILS, _PROBLEM = "worker", "key", "rung", "seconds", "details", "problem"


# Opening a study.


@contextmanager
def open_study(url: str, name: str, space: SearchSpace, identity: Mapping[str, str]) -> Iterator[optuna.Study]:
    """Yield the study of that name, new or of an earlier start, and close the storage afterwards.

    url       of the storage, as SQLAlchemy reads it
    identity  what every worker must share: digests of the recipe, of the data and of the base

    Raises SearchError for a storage that cannot be opened, and for a study of another recipe. An error of the storage
    later on becomes a SearchError too.
    """
    storage = open_storage(url)
    try:
        with explained(url):
            directions = list(space.objectives.values())
            study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
            _check_identity(study, identity, url)
            study.sampler = _sampler(space)
            study.pruner = _pruner(space)
            yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def delete_study(url: str, name: str) -> None:
    """Delete a study and all its trials, if there is one."""
    storage = open_storage(url)
    with explained(url), suppress(KeyError):
        optuna.delete_study(study_name=name, storage=storage)
    storage.engine.dispose()


def _check_identity(study: optuna.Study, identity: Mapping[str, str], url: str) -> None:
    """Write the identity to a new study, and compare it with that of an old one."""
    if _IDENTITY not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr(_IDENTITY, dict(identity))
    found = study.user_attrs.get(_IDENTITY)
    other = "trials that no search of Dovetail made"
    if found is not None:
        # An earlier version did not write the base.
        differing = [name for name in identity if found.get(name, identity[name]) != identity[name]]
        if not differing:
            return
        other = f"a search with other {' and '.join(differing)}"
    where = f"study {study.study_name} in {hidden(url)}"
    rule = "all workers and all starts of a search must have the same recipe, the same data and the same base"
    raise SearchError(where, found=other, rule=rule, fix="choose another --output, or pass --no-resume to start again")


# Samplers and pruners.


def _sampler(space: SearchSpace) -> BaseSampler:
    """Return the sampler that the recipe names."""
    settings, seed = space.settings, space.recipe.seed
    match settings.sampler:
        case "tpe":
            return _Signed(lambda number: optuna.samplers.TPESampler(seed=number), space)
        case "nsga2":
            return _Signed(lambda number: optuna.samplers.NSGAIISampler(seed=number), space)
        case "random":
            return _Signed(lambda number: optuna.samplers.RandomSampler(seed=number), space)
    named: BaseSampler = {
        "prga": lambda: PRGASampler(repair=space.repaired, seed=seed),
        "refine": lambda: RefineSampler(alpha=settings.alpha, repair=space.repaired, seed=seed),
        "three_stage": lambda: ThreeStageSampler(repair=space.repaired, seed=seed),
    }[settings.sampler]()
    return _Signed(lambda number: named, space)


class _Signed(BaseSampler):
    """Signs a trial with the name of its worker, leaves its parameters to another sampler, and keeps the budget.

    make   makes that sampler for a seed; each question to it has its own seed, so that its answer does not depend on
           the questions before
    """

    def __init__(self, make: Callable[[int], BaseSampler], space: SearchSpace) -> None:
        self._make, self._space, self._seed = make, space, space.recipe.seed
        self._known = {name: each for name, each in space.distributions.items() if not each.single()}

    def _of(self, trial: FrozenTrial, question: str = "") -> BaseSampler:
        return self._make(zlib.crc32(f"{self._seed}/{trial.number}/{question}".encode()))

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        study._storage.set_trial_user_attr(trial._trial_id, _WORKER, this_worker())
        self._of(trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._known or self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        inner = self._of(trial)
        if not self._known or isinstance(inner, ProposalSampler):
            return inner.sample_relative(study, trial, search_space)
        found = inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))
        for name in search_space.keys() - found.keys():
            found[name] = self.sample_independent(study, trial, name, search_space[name])
        return self._space.repaired(found)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(trial).after_trial(study, trial, state, values)


def _pruner(space: SearchSpace) -> BasePruner:
    match space.settings:
        case ChainSettings(pruning="median"):
            return optuna.pruners.MedianPruner()
        case ChainSettings(pruning="hyperband"):
            return optuna.pruners.HyperbandPruner()
        case ChainSettings() | LayerSettings():
            return optuna.pruners.NopPruner()


# Workers.


def requeue(study: optuna.Study) -> None:
    """Put the trials of lost workers back into the queue."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get(_WORKER)
        if worker is None:
            begun = trial.datetime_start or datetime.now()
            lost = datetime.now() - begun > timedelta(seconds=UNSIGNED_SECONDS)
        else:
            # A trial with the name of this worker, which runs none now, is one that was killed before it was signed.
            lost = worker == this_worker() or has_ended(worker)
        if lost:
            _put_back(study, trial._trial_id)
    fail_stale(study)


def _put_back(study: optuna.Study, trial_id: int) -> None:
    with suppress(UpdateFinishedTrialError):  # it was not lost
        # Until the next worker signs the trial, it would look lost with the name of the last one.
        study._storage.set_trial_user_attr(trial_id, _WORKER, this_worker())
        study._storage.set_trial_state_values(trial_id, state=TrialState.WAITING)


def work(study: optuna.Study, space: SearchSpace, *, on_trial: Callable[[Trial], None] | None = None) -> None:
    """Run trials until as many as the recipe asks for are finished, and none is left running or waiting.

    on_trial   called with each trial that this worker finished

    An error that is not one of a single candidate ends the worker; its trial waits for another one.
    """
    asked = space.settings.trials
    if _PREPARED not in study.user_attrs:
        study.set_user_attr(_PREPARED, space.prepare())
    space.begin(study.user_attrs[_PREPARED])
    while True:
        requeue(study)
        trials = study.get_trials(deepcopy=False)
        _enqueue(study, space, trials)
        done = sum(_rung(trial) == 0 and _finished(trial) for trial in trials)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        waiting = any(trial.state is TrialState.WAITING for trial in study.get_trials(deepcopy=False))
        if not waiting and done + sum(_rung(trial) == 0 for trial in running) < asked:
            study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={_WORKER: this_worker()}))
            waiting = True
        if waiting:
            number = _run(study, space)
            if on_trial is not None and number is not None:
                for trial in finished(study, space):
                    if trial.number == number:
                        on_trial(trial)
        elif running:
            time.sleep(_WAIT_SECONDS)
        else:
            return


def _enqueue(study: optuna.Study, space: SearchSpace, trials: Sequence[FrozenTrial]) -> None:
    """Enqueue the fixed candidates that are not in the study yet."""
    known = {trial.user_attrs.get(_KEY) for trial in trials}
    for fixed in space.fixed(_records(trials, space)):
        if fixed.key not in known:
            attributes = {_KEY: fixed.key, _RUNG: fixed.candidate.rung}
            study.enqueue_trial(dict(fixed.candidate.params), user_attrs=attributes)


def _run(study: optuna.Study, space: SearchSpace) -> int | None:
    """Run the next trial that waits, and return its number; None where other workers have taken all that waited."""
    # Optuna's `ask` would make a new trial then, one more than asked for, and without a name.
    study._thread_local.cached_all_trials = None
    trial_id = study._pop_waiting_trial_id()
    if trial_id is None:
        return None
    try:
        trial = optuna.Trial(study, trial_id)  # signs it
    except UpdateFinishedTrialError:  # the worker that enqueued it took it for lost before that, and has finished it
        return None
    with get_heartbeat_thread(trial._trial_id, study._storage):
        try:
            if _duplicate(study, trial):
                _tell(study, trial, state=TrialState.FAIL)
                return trial.number
            started = time.perf_counter()
            values, state = _score(study, space, trial)
            trial.set_user_attr(_SECONDS, time.perf_counter() - started)
            _tell(study, trial, values, state)
        except UpdateFinishedTrialError:
            pass  # another worker took this one for lost, and has finished the trial
        except BaseException:
            _put_back(study, trial._trial_id)
            raise
    return trial.number


def _duplicate(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Return whether another worker enqueued the same fixed candidate before, at the same time as this one."""
    key = trial.user_attrs.get(_KEY)
    return key is not None and any(
        other.number < trial.number and other.user_attrs.get(_KEY) == key and other.state is not TrialState.FAIL
        for other in study.get_trials(deepcopy=False)
    )


def _score(
    study: optuna.Study, space: SearchSpace, trial: optuna.Trial
) -> tuple[list[float] | None, TrialState | None]:
    """Score the candidate of a trial; return its values, or the state of a trial without any."""
    reported = set(study._storage.get_trial(trial._trial_id).intermediate_values)  # by a worker that was lost

    def report(step: int, quality: float) -> None:
        if len(space.objectives) == 1 and isfinite(quality):
            if step not in reported:
                trial.report(quality, step)
            if trial.should_prune():
                raise TrialPruned

    try:
        space.suggest(trial)
        candidate = Candidate(trial.params, trial.user_attrs.get(_RUNG, 0))
        scored = _known(study, space, candidate) or space.score(candidate, report)
    except TrialPruned:
        return None, TrialState.PRUNED
    except (NotFinite, TrainError) as error:
        trial.set_user_attr(_PROBLEM, f"{type(error).__name__}: {error}"[:2000])
        return None, TrialState.FAIL
    trial.set_user_attr(_DETAILS, dict(scored.details))
    values = [float(scored.values[name]) for name in space.objectives]
    if not all(map(isfinite, values)):
        trial.set_user_attr(_PROBLEM, f"values that are not finite: {dict(scored.values)}")
        return None, TrialState.FAIL
    return values, None


def _known(study: optuna.Study, space: SearchSpace, candidate: Candidate) -> Scored | None:
    """Return the result of an earlier trial of the same candidate, which would be the same again; None without one."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.params == candidate.params and _rung(trial) == candidate.rung:
            return Scored(dict(zip(space.objectives, trial.values, strict=True)), trial.user_attrs[_DETAILS])
    return None


def _tell(
    study: optuna.Study, trial: optuna.Trial, values: list[float] | None = None, state: TrialState | None = None
) -> None:
    """Finish a trial, unless another worker that took this one for lost has finished it."""
    if study._storage.get_trial(trial._trial_id).state is TrialState.WAITING:
        study._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING)
    study.tell(trial, values, state, skip_if_finished=True)


# What the trials say.


def finished(study: optuna.Study, space: SearchSpace) -> list[Trial]:
    """Return the finished trials, in the order of their numbers."""
    return _records(study.get_trials(deepcopy=False), space)


def _finished(trial: FrozenTrial) -> bool:
    """Return whether a trial has a result; one that failed without a problem was lost, and a copy of it waits."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state is TrialState.FAIL and _PROBLEM in trial.user_attrs
    )


def _rung(trial: FrozenTrial) -> int:
    return trial.user_attrs.get(_RUNG, 0)


def _records(trials: Sequence[FrozenTrial], space: SearchSpace) -> list[Trial]:
    """Return the finished trials of a study as a report holds them."""
    begun = min((trial.datetime_start for trial in trials if trial.datetime_start), default=datetime.now())
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    return [
        Trial(
            number=trial.number,
            state=names[trial.state],  # pyright: ignore[reportArgumentType]
            rung=_rung(trial),
            params=trial.params,
            values=dict(zip(space.objectives, trial.values or (), strict=False))
            if trial.state is TrialState.COMPLETE
            else {},
            seconds=trial.user_attrs.get(_SECONDS, 0.0),
            ended=((trial.datetime_complete or begun) - begun).total_seconds(),
            recipe=space.candidate_recipe(Candidate(trial.params, _rung(trial))).model_dump(mode="json"),
            details=trial.user_attrs.get(_DETAILS, {}),
            problem=trial.user_attrs.get(_PROBLEM, ""),
        )
        for trial in trials
        if _finished(trial)
    ]
