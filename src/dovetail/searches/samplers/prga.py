"""PRGA: a genetic algorithm with Pareto ranks, one child at a time (QR-Adaptor §3.2, Algorithms 1 to 4; NSGA-II).

parents   the `population_size` best finished trials, by Pareto rank, then by crowding distance, larger first
select    two parents, each the better of two drawn ones (binary tournament)
cross     simulated binary crossover of each gene with probability 1/2, otherwise the gene of either parent
mutate    each gene with probability 1/d by polynomial mutation
child     rounded to the values of the space; drawn again where the study has it already

Crossover and mutation are the bounded forms of Deb's NSGA-II code: their distributions end at the bounds of the gene,
and no probability is lost to clipping. A category takes the choice of either parent, and mutates to any choice.

The method differs from NSGA-II in that it has no generations: all finished trials compete to be parents, so a worker
never waits for others, and elite retention needs no state. Infeasible trials rank after feasible ones, by their total
violation (Deb et al. 2002, §VI). Pruned and failed trials and those with NaN are never parents.

`variant="paper"` uses Algorithms 3 and 4 of QR-Adaptor to the letter, for ablations:

    cross   child = ((1 + beta) a + (1 - beta) b) / 2    beta = (2u)^(1 / (eta + 1)), or (1 / (2 - 2u))^(1 / (eta + 1))
    mutate  x + (x_max - x_min) y (1 - |y|)^(eta - 1)    y uniform in [-1, 1]

The largest step of that mutation is (x_max - x_min) (1 / eta) (1 - 1 / eta)^(eta - 1). At eta = 20 a gene of 15 ranks
moves by at most 0.27, and after rounding not at all: integers never mutate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial

from dovetail.searches.pareto import crowding_distance, pareto_rank
from dovetail.searches.samplers.genes import Space
from dovetail.searches.samplers.proposal import ProposalSampler, Repair, check_setting, finished, losses, violations

Array = NDArray[np.float64]
_CHILDREN = 25
"""Children that are drawn before neighbours of the parents are tried instead."""


class PRGASampler(ProposalSampler):
    """The Pareto ranking genetic algorithm of QR-Adaptor as an Optuna sampler, for one or more objectives.

    population_size  number of parents; also the number of trials of the initial design (a Latin hypercube), which is
                     used where `start` is empty
    crossover_prob   probability that a child has two parents
    crossover_eta    distribution index of the crossover; larger keeps a child closer to its parents
    mutation_prob    probability that a gene mutates; None is 1 / number of genes
    mutation_eta     distribution index of the mutation; larger moves a gene less
    start            configurations that are proposed first: the initial population
    variant          "bounded", or "paper" for Algorithms 3 and 4 to the letter
    repair           returns the configuration to use in place of a proposal, such as one within a budget
    seed             of all random numbers; None draws one
    errors           SearchError for a setting out of range

    The sampler keeps no state besides the study: it works with any storage and any number of workers, and proposes no
    configuration twice as long as the space has another one.
    """

    def __init__(
        self,
        *,
        population_size: int = 5,
        crossover_prob: float = 0.9,
        crossover_eta: float = 5,
        mutation_prob: float | None = None,
        mutation_eta: float = 5,
        start: Sequence[Mapping[str, Any]] = (),
        variant: Literal["bounded", "paper"] = "bounded",
        repair: Repair | None = None,
        seed: int | None = None,
    ) -> None:
        where = type(self).__name__
        check_setting(where, "population_size", population_size, population_size >= 2, "at least 2")
        check_setting(where, "crossover_prob", crossover_prob, 0 <= crossover_prob <= 1, "in [0, 1]")
        check_setting(where, "crossover_eta", crossover_eta, crossover_eta >= 0, "at least 0")
        check_setting(
            where, "mutation_prob", mutation_prob, mutation_prob is None or 0 <= mutation_prob <= 1, "None or in [0, 1]"
        )
        check_setting(where, "mutation_eta", mutation_eta, mutation_eta >= 1, "at least 1")
        check_setting(where, "variant", variant, variant in ("bounded", "paper"), '"bounded" or "paper"')
        super().__init__(start=start, strata=population_size, repair=repair, seed=seed)
        self._population_size = population_size
        self._crossover_prob, self._crossover_eta = crossover_prob, crossover_eta
        self._mutation_prob, self._mutation_eta = mutation_prob, mutation_eta
        self._make_child = self._bounded_child if variant == "bounded" else self._paper_child

    def proposals(
        self, study: Study, trial: FrozenTrial, space: Space, others: Sequence[FrozenTrial], random: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        parents = self._parents(study, space, others)
        if not parents or trial.number < (len(self.start) or self._population_size):
            yield self.design(trial, space)
            while True:
                yield space.random(random)
        genes_nd = np.stack([space.encode(parent.params) for parent in parents])
        for _ in range(_CHILDREN):
            yield space.decode(self._child(space, genes_nd, random))
        while True:
            yield space.neighbour(parents[random.integers(len(parents))].params, random)

    def _parents(self, study: Study, space: Space, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the best finished trials, the best one first."""
        trials = finished(trials, space)
        losses_nm = losses(trials, study.directions)
        rank_n = pareto_rank(losses_nm, violations(trials))
        order_n = np.lexsort((-crowding_distance(losses_nm, rank_n), rank_n))
        return [trials[place] for place in order_n[: self._population_size]]

    def _child(self, space: Space, genes_nd: Array, random: np.random.Generator) -> Array:
        first, second = tournament(len(genes_nd), random)
        if random.random() >= self._crossover_prob:
            second = first
        mutation_prob = 1 / genes_nd.shape[1] if self._mutation_prob is None else self._mutation_prob
        mutates_d = random.random(genes_nd.shape[1]) < mutation_prob
        numbers_d = self._make_child(space, genes_nd[first], genes_nd[second], mutates_d, random)
        choices_d = np.where(random.random(len(mutates_d)) < 0.5, genes_nd[first], genes_nd[second])
        choices_d = np.where(mutates_d, random.uniform(space.lower, space.upper), choices_d)
        return np.where(space.ordered, numbers_d, choices_d)

    def _bounded_child(
        self, space: Space, first_d: Array, second_d: Array, mutates_d: NDArray[np.bool_], random: np.random.Generator
    ) -> Array:
        child_d = crossover(first_d, second_d, space.lower, space.upper, self._crossover_eta, random)
        return np.where(mutates_d, mutate(child_d, space.lower, space.upper, self._mutation_eta, random), child_d)

    def _paper_child(
        self, space: Space, first_d: Array, second_d: Array, mutates_d: NDArray[np.bool_], random: np.random.Generator
    ) -> Array:
        child_d = paper_crossover(first_d, second_d, self._crossover_eta, random)
        return np.where(
            mutates_d, paper_mutate(child_d, space.smallest, space.largest, self._mutation_eta, random), child_d
        )


def tournament(count: int, random: np.random.Generator) -> tuple[int, int]:
    """Return two different places of a list that is sorted from best to worst, each the better of two drawn ones."""
    first = int(random.integers(count, size=2).min())
    if count == 1:
        return first, first
    # Places of the list without the first parent.
    second = int(random.integers(count - 1, size=2).min())
    return first, second + (second >= first)


def crossover(
    first_d: Array, second_d: Array, lower_d: Array, upper_d: Array, eta: float, random: np.random.Generator
) -> Array:
    """Return one child by bounded simulated binary crossover of half of the genes (Deb and Agrawal 1995).

    first_d, second_d  (d,)  genes of the parents, within the bounds
    lower_d, upper_d   (d,)  bounds
    returns            (d,)  genes of the child, within the bounds
    """
    low_d, high_d = np.minimum(first_d, second_d), np.maximum(first_d, second_d)
    gap_d = high_d - low_d
    u_d, swap_d, cross_d = random.random((3, len(first_d)))

    def spread(room_d: Array) -> Array:
        """Return beta: its distribution is cut off where the child would leave the bound `room_d` away."""
        beta_d = 1 + 2 * room_d / np.where(gap_d > 0, gap_d, 1)
        alpha_d = 2 - beta_d ** -(eta + 1)
        return np.where(u_d * alpha_d <= 1, u_d * alpha_d, 1 / (2 - u_d * alpha_d)) ** (1 / (eta + 1))

    left_d = (low_d + high_d - spread(low_d - lower_d) * gap_d) / 2
    right_d = (low_d + high_d + spread(upper_d - high_d) * gap_d) / 2
    crossed_d = np.where(swap_d < 0.5, left_d, right_d)
    kept_d = np.where(swap_d < 0.5, first_d, second_d)
    return np.clip(np.where((cross_d < 0.5) & (gap_d > 0), crossed_d, kept_d), lower_d, upper_d)


def mutate(genes_d: Array, lower_d: Array, upper_d: Array, eta: float, random: np.random.Generator) -> Array:
    """Return all genes after bounded polynomial mutation (Deb's NSGA-II code, revision 1.1.6)."""
    width_d = upper_d - lower_d
    u_d = random.random(len(genes_d))
    power = eta + 1
    to_lower_d, to_upper_d = (genes_d - lower_d) / width_d, (upper_d - genes_d) / width_d
    down_d = (2 * u_d + (1 - 2 * u_d) * (1 - to_lower_d) ** power).clip(0) ** (1 / power) - 1
    up_d = 1 - (2 * (1 - u_d) + (2 * u_d - 1) * (1 - to_upper_d) ** power).clip(0) ** (1 / power)
    return np.clip(genes_d + np.where(u_d <= 0.5, down_d, up_d) * width_d, lower_d, upper_d)


def paper_crossover(first_d: Array, second_d: Array, eta: float, random: np.random.Generator) -> Array:
    """Return one of the two children of QR-Adaptor, Algorithm 3; they may leave the bounds.

    The paper draws one u for a layer's pair of bits and rank. A search space has no pairs: each gene draws its own.
    """
    u_d = random.random(len(first_d))
    beta_d = np.where(u_d <= 0.5, 2 * u_d, 1 / (2 * (1 - u_d))) ** (1 / (eta + 1))
    children_2d = (
        ((1 + beta_d) * first_d + (1 - beta_d) * second_d) / 2,
        ((1 - beta_d) * first_d + (1 + beta_d) * second_d) / 2,
    )
    return children_2d[random.integers(2)]


def paper_mutate(genes_d: Array, smallest_d: Array, largest_d: Array, eta: float, random: np.random.Generator) -> Array:
    """Return all genes after the mutation of QR-Adaptor, Algorithm 4; they may leave the bounds."""
    y_d = random.uniform(-1, 1, len(genes_d))
    return genes_d + (largest_d - smallest_d) * (y_d * (1 - np.abs(y_d)) ** (eta - 1))
