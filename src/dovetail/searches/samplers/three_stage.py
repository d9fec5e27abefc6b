"""The three stages of QR-Adaptor (§3.2, Figure 1) as one sampler: start, explore with PRGA, refine.

finished trials                    proposal
less than start + explore          the starts, then children of PRGA
more                               refinement of the weighted objective

With the defaults and five starts that is 5 + 5 trials, and the third stage for all that follow: the paper spends 5 on
it. The number of finished trials decides, so that any worker continues the study where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from dovetail.searches.samplers.genes import Space
from dovetail.searches.samplers.prga import PRGASampler
from dovetail.searches.samplers.proposal import ProposalSampler, Repair, check_setting, finished
from dovetail.searches.samplers.refine import RefineSampler


class ThreeStageSampler(ProposalSampler):
    """Start, global exploration with PRGA, and local refinement, by the number of finished trials.

    start            configurations that are proposed first; a Latin hypercube of `population_size` trials if empty
    explore          number of trials of the second stage
    alpha, kernel    of the third stage (`RefineSampler`). By default no objective is preferred: each proposal draws its
                     own alpha, and the whole front is refined. The paper states one alpha
    population_size, crossover_prob, crossover_eta, mutation_prob, mutation_eta
                     of the second stage (`PRGASampler`)
    repair           returns the configuration to use in place of a proposal, such as one within a budget
    seed             of all random numbers; None draws one
    errors           SearchError for a setting out of range
    """

    def __init__(
        self,
        *,
        start: Sequence[Mapping[str, Any]] = (),
        explore: int = 5,
        population_size: int = 5,
        crossover_prob: float = 0.9,
        crossover_eta: float = 5,
        mutation_prob: float | None = None,
        mutation_eta: float = 5,
        alpha: float | None = None,
        kernel: Literal["matern", "rbf"] = "matern",
        repair: Repair | None = None,
        seed: int | None = None,
    ) -> None:
        check_setting(type(self).__name__, "explore", explore, explore >= 0, "at least 0")
        self._explore = PRGASampler(
            population_size=population_size,
            crossover_prob=crossover_prob,
            crossover_eta=crossover_eta,
            mutation_prob=mutation_prob,
            mutation_eta=mutation_eta,
            start=start,
            seed=seed,
        )
        self._refine = RefineSampler(alpha=alpha, kernel=kernel, start_after=2, seed=seed)
        self._explored = (len(start) or population_size) + explore
        super().__init__(start=start, strata=population_size, repair=repair, seed=seed)

    def proposals(
        self, study: Study, trial: FrozenTrial, space: Space, others: Sequence[FrozenTrial], random: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        stage = self._explore if len(finished(others, space)) < self._explored else self._refine
        yield from stage.proposals(study, trial, space, others, random)
