"""What the samplers share: they read all that they know from the study, and write down what they propose.

A sampler keeps no state. The random numbers of a trial follow from the seed and the number of the trial, and everything
else from the trials of the study, so that a study can be closed, reopened and shared by any number of workers.

A proposal is written to the trial, as a system attribute, before the trial runs. Then the trials are read again. Where
another trial has the same configuration, the sampler proposes another one. Of two workers that propose the same at the
same time, the one that writes last reads what the other wrote, so that no configuration is proposed twice as long as
the space has another one. Trials that start before all parameters are known also write down the seed of the initial
design, which gives the others. `study._storage` is the only way to write to a trial from a sampler; Optuna's own
samplers and those of OptunaHub use it too.
"""

from __future__ import annotations

import secrets
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from dovetail.errors import SearchError
from dovetail.searches.samplers.genes import Gene, Key, Space

Repair = Callable[[Mapping[str, Any]], dict[str, Any]]
_PROPOSAL, _DESIGN = "dovetail:proposal", "dovetail:design"
_TRIES, _ROUNDS = 50, 10


class ProposalSampler(BaseSampler):
    """A sampler without state that proposes no configuration twice.

    start     configurations that are proposed first, in this order, each as name -> value. A parameter that one of them
              leaves out is sampled
    strata    number of consecutive trials of the initial design, a Latin hypercube, that cover each range
    repair    returns the configuration to use in place of a proposal, such as one within a budget
    seed      of all random numbers; None draws one
    """

    def __init__(
        self, *, start: Sequence[Mapping[str, Any]], strata: int, repair: Repair | None, seed: int | None
    ) -> None:
        for place, parameters in enumerate(start):
            if not isinstance(parameters, Mapping) or not parameters:
                raise SearchError(
                    f"start[{place}]",
                    found=repr(parameters),
                    rule="a start is a mapping of parameter names to values",
                    fix='pass, for example, start=[{"bits": 4, "rank": 8}]',
                )
        check_setting(type(self).__name__, "seed", seed, seed is None or seed >= 0, "None or at least 0")
        self.start = [{name: _plain(value) for name, value in parameters.items()} for parameters in start]
        self._strata = strata
        self._repair: Repair = repair or dict
        self._seed = secrets.randbits(64) if seed is None else seed

    @abstractmethod
    def proposals(
        self, study: Study, trial: FrozenTrial, space: Space, others: Sequence[FrozenTrial], random: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        """Yield configurations of the space, the most wanted first; the first one that is not taken is used.

        others  all other trials of the study, in any state
        """

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        trials = _others(study, trial)
        space = intersection_search_space(trials)
        if not _any_complete(trials):
            space = dict(sorted(max((each.distributions for each in trials), key=len, default={}).items()))
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        # A trial that continues a failed one may have a proposal already.
        proposal = trial.system_attrs.get(_PROPOSAL) or self._propose(study, trial, search_space)
        if proposal in self.start:
            # A start may lack parameters or hold conditional ones: `sample_independent` reads them one by one.
            return {}
        return {name: value for name, value in proposal.items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        gene = Gene.of(param_distribution)
        proposal = trial.system_attrs.get(_PROPOSAL, {})
        if param_name in proposal and gene.allows(proposal[param_name]):
            return proposal[param_name]
        if param_name in proposal and proposal in self.start:
            raise SearchError(
                f"start[{self.start.index(proposal)}]",
                found=f"{param_name}={proposal[param_name]!r}",
                rule=f"a value must fit {param_distribution}",
                fix="change the value, or leave the parameter out of the start",
            )
        return self._design(trial, param_name, gene)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        proposal = trial.system_attrs.get(_PROPOSAL, {})
        unknown = proposal.keys() - trial.params.keys() if proposal in self.start else set()
        if state is TrialState.COMPLETE and unknown:
            raise SearchError(
                f"start[{self.start.index(proposal)}]",
                found=f"no trial parameter is named {', '.join(sorted(unknown))}",
                rule="a start names only parameters that its trial has",
                fix=f"use names of {', '.join(sorted(trial.params))}",
            )

    def design(self, trial: FrozenTrial, space: Space) -> dict[str, Any]:
        """Return the configuration of the initial design for the number of this trial."""
        return {name: self._design(trial, name, gene) for name, gene in space.genes.items()}

    def _design(self, trial: FrozenTrial, name: str, gene: Gene) -> Any:
        """Return a value such that `strata` consecutive trials cover the range (a Latin hypercube over the names)."""
        strata = min(gene.count or self._strata, self._strata)
        block, place = divmod(trial.number, strata)
        seed = trial.system_attrs.get(_DESIGN, self._seed)
        random = np.random.default_rng((seed, zlib.crc32(name.encode()), block))
        share_n = (random.permutation(strata) + random.random(strata)) / strata
        return gene.decode(gene.lower + float(share_n[place]) * (gene.upper - gene.lower))

    def _propose(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Choose a proposal and write it to the trial; choose again where another worker has just written the same."""
        random = np.random.default_rng((self._seed, trial.number))
        if not _any_complete(_others(study, trial)):
            study._storage.set_trial_system_attr(trial._trial_id, _DESIGN, self._seed)
            # A trial that was proposed meanwhile may not have read the seed.
            search_space = search_space or self.infer_relative_search_space(study, trial)
        space = Space(search_space)
        proposal: dict[str, Any] = {}
        for _ in range(_ROUNDS):
            others = _others(study, trial)
            before = {each.number: planned(each) for each in others}
            start = self._next_start(trial, others)
            if start is None and not search_space:
                return {}
            proposal = start or self._first_free(study, trial, space, others, random)
            study._storage.set_trial_system_attr(trial._trial_id, _PROPOSAL, proposal)
            after = {each.number: planned(each) for each in _others(study, trial)}
            changed = [parameters for number, parameters in after.items() if parameters != before.get(number)]
            if not any(_includes(parameters, proposal) for parameters in changed):
                break
        return proposal

    def _next_start(self, trial: FrozenTrial, others: Sequence[FrozenTrial]) -> dict[str, Any] | None:
        """Return the first start that no trial has. A trial that the user enqueued has its own parameters."""
        if "fixed_params" in trial.system_attrs:
            return None
        known = [planned(each) for each in others]
        return next((start for start in self.start if not any(_includes(each, start) for each in known)), None)

    def _first_free(
        self, study: Study, trial: FrozenTrial, space: Space, others: Sequence[FrozenTrial], random: np.random.Generator
    ) -> dict[str, Any]:
        taken = self._taken(space, others)
        first: dict[str, Any] | None = None
        for proposal in map(self._repair, islice(self.proposals(study, trial, space, others, random), _TRIES)):
            if space.key(proposal) not in taken:
                return proposal
            first = first or proposal
        free = space.free(taken, random)
        if free is not None and self._repair(free) == free:
            return free
        return first or self._repair(space.random(random))

    def _taken(self, space: Space, trials: Sequence[FrozenTrial]) -> set[Key]:
        """Return the configurations that trials have or, where they wait or run, will have.

        A trial with a parameter outside of the space, which is conditional, is not one of them: another trial with the
        same values of the space can still be another configuration.
        """
        found = set()
        for trial in trials:
            parameters = planned(trial)
            single = {name for name, distribution in trial.distributions.items() if distribution.single()}
            if not trial.state.is_finished():
                parameters = {**self.design(trial, space), **parameters}
            if parameters.keys() - single <= space.genes.keys() and space.allows(parameters):
                found.add(space.key(parameters))
        return found


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    return [each for each in study.get_trials(deepcopy=False) if each.number != trial.number]


def _any_complete(trials: Sequence[FrozenTrial]) -> bool:
    return any(trial.state is TrialState.COMPLETE for trial in trials)


def planned(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that a trial has or, where it waits or has just started, will have."""
    attributes = trial.system_attrs
    return {**attributes.get(_PROPOSAL, {}), **attributes.get("fixed_params", {}), **trial.params}


def _plain(value: Any) -> Any:
    """Return a number of NumPy as the number of Python that a storage can hold."""
    return value.item() if isinstance(value, np.generic) else value


def _includes(parameters: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    return all(name in parameters and parameters[name] == value for name, value in part.items())


def finished(trials: Sequence[FrozenTrial], space: Space) -> list[FrozenTrial]:
    """Return the trials that are complete, lie in the space, and have no NaN among their values."""
    return [
        trial
        for trial in trials
        if trial.state is TrialState.COMPLETE and space.allows(trial.params) and not np.isnan(trial.values).any()
    ]


def losses(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> NDArray[np.float64]:
    """Return the values of finished trials as losses: smaller is better. (n, m)."""
    sign_m = np.array([-1.0 if direction is StudyDirection.MAXIMIZE else 1.0 for direction in directions])
    return sign_m * np.array([trial.values for trial in trials], dtype=float).reshape(-1, len(sign_m))


def violations(trials: Sequence[FrozenTrial]) -> NDArray[np.float64]:
    """Return the sum of the positive constraints of each trial; 0 is feasible. (n,)."""
    return np.array([sum(max(value, 0.0) for value in trial.constraints.values()) for trial in trials], dtype=float)


def check_setting(where: str, name: str, value: object, valid: bool, rule: str) -> None:
    """Raise SearchError if a setting of a sampler is not valid."""
    if not valid:
        raise SearchError(where, found=f"{name}={value!r}", rule=f"{name} must be {rule}", fix=f"change {name}")
