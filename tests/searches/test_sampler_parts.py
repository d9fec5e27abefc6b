"""The parts of the samplers against their definitions: Pareto rank, crowding, operators, scores, and the stages."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import optuna
import pytest
import torch
from numpy.typing import NDArray
from optuna.distributions import IntDistribution
from optuna.trial import Trial

from dovetail.searches import PRGASampler, RefineSampler, ThreeStageSampler
from dovetail.searches.pareto import crowding_distance, pareto_rank
from dovetail.searches.samplers.genes import Space
from dovetail.searches.samplers.prga import crossover, mutate, paper_crossover, paper_mutate, tournament
from dovetail.searches.samplers.refine import expected_improvement, weighted_score

INF = math.inf


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def test_pareto_ranks_of_a_small_case() -> None:
    losses_nm = np.array([(1, 5), (2, 3), (4, 1), (2, 4), (5, 2), (3, 5), (5, 5), (2, 3)], dtype=float)
    assert pareto_rank(losses_nm).tolist() == [1, 1, 1, 2, 2, 3, 4, 1]


def test_crowding_distances_of_a_small_case() -> None:
    losses_nm = np.array([(0, 10), (1, 6), (4, 3), (10, 0), (9, 9), (11, 8)], dtype=float)
    assert crowding_distance(losses_nm, pareto_rank(losses_nm)).tolist() == pytest.approx(
        [INF, 4 / 10 + 7 / 10, 9 / 10 + 6 / 10, INF, INF, INF]
    )


def algorithm_1(losses_nm: NDArray[np.float64]) -> list[int]:
    """The loops of QR-Adaptor, Algorithm 1."""

    def dominates(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
        return bool((a <= b).all() and (a < b).any())

    count = len(losses_nm)
    dominated = [[q for q in range(count) if dominates(losses_nm[p], losses_nm[q])] for p in range(count)]
    left = [sum(dominates(losses_nm[q], losses_nm[p]) for q in range(count)) for p in range(count)]
    ranks, front = [0] * count, [p for p in range(count) if left[p] == 0]
    rank = 1
    while front:
        following = []
        for p in front:
            ranks[p] = rank
            for q in dominated[p]:
                left[q] -= 1
                if left[q] == 0:
                    following.append(q)
        front, rank = following, rank + 1
    return ranks


def algorithm_2(losses_nm: NDArray[np.float64]) -> list[float]:
    """The loops of QR-Adaptor, Algorithm 2."""
    distance = [0.0] * len(losses_nm)
    for loss_n in losses_nm.T:
        order = sorted(range(len(loss_n)), key=lambda n: loss_n[n])
        distance[order[0]] = distance[order[-1]] = INF
        for before, n, after in zip(order, order[1:], order[2:], strict=False):
            distance[n] += (loss_n[after] - loss_n[before]) / (loss_n[order[-1]] - loss_n[order[0]])
    return distance


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_rank_and_crowding_are_the_algorithms_of_the_paper(objectives: int) -> None:
    random = np.random.default_rng(objectives)
    for levels in (3, 1000):
        losses_nm = random.integers(levels, size=(40, objectives)).astype(float)
        assert pareto_rank(losses_nm).tolist() == algorithm_1(losses_nm)
    ranks = pareto_rank(losses_nm)
    for rank in set(ranks.tolist()):
        members = ranks == rank
        assert crowding_distance(losses_nm, ranks)[members].tolist() == pytest.approx(algorithm_2(losses_nm[members]))


def test_infeasible_points_rank_after_feasible_ones_by_their_violation() -> None:
    losses_nm = np.array([(9, 9), (1, 1), (2, 2), (0, 0), (8, 9)], dtype=float)
    assert pareto_rank(losses_nm, np.array([0.0, 3.0, 1.0, 3.0, -1.0])).tolist() == [2, 4, 3, 4, 1]


def test_nothing_is_ranked_and_infinities_give_no_nan() -> None:
    nothing = np.zeros((0, 2))
    assert len(pareto_rank(nothing, np.zeros(0))) == len(crowding_distance(nothing, np.zeros(0, dtype=int))) == 0
    losses_nm = np.array([(-INF, 3), (1, 2), (INF, 1), (INF, INF)], dtype=float)
    assert pareto_rank(losses_nm).tolist() == [1, 1, 1, 2]
    assert not np.isnan(crowding_distance(losses_nm, pareto_rank(losses_nm))).any()


# --- Operators -------------------------------------------------------------------------------------------------------
def test_a_tournament_returns_two_places_and_prefers_the_better_ones() -> None:
    random = np.random.default_rng(0)
    drawn = np.array([tournament(5, random) for _ in range(4000)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    # The smaller of two drawn out of five: 9/25, 7/25, 5/25, 3/25, 1/25.
    assert np.bincount(drawn[:, 0]) / 4000 == pytest.approx([0.36, 0.28, 0.2, 0.12, 0.04], abs=0.03)
    assert tournament(1, random) == (0, 0)


@pytest.mark.parametrize("eta", [0, 2, 20])
def test_bounded_operators_stay_within_the_bounds_and_reach_all_of_them(eta: float) -> None:
    random = np.random.default_rng(0)
    lower, upper = np.array([0.0, -3.0]), np.array([1.0, 7.0])
    first, second = np.array([0.2, 7.0]), np.array([0.6, -2.0])
    children = np.array([crossover(first, second, lower, upper, eta, random) for _ in range(2000)])
    mutants = np.array([mutate(first, lower, upper, eta, random) for _ in range(2000)])
    for made in (children, mutants):
        assert (made >= lower).all()
        assert (made <= upper).all()
    # A parent on its bound is crossed to one side only; in between there are children on both sides of both parents.
    assert (children[:, 0] < 0.2).any()
    assert (children[:, 0] > 0.6).any()
    assert (mutants[:, 0] > 0.2).any()
    assert (mutants[:, 1] < 7).any()


def test_larger_eta_keeps_children_closer_to_their_parents() -> None:
    lower, upper, first, second = np.zeros(1), np.ones(1), np.array([0.4]), np.array([0.6])
    spread = {}
    for eta in (1, 5, 20):
        random = np.random.default_rng(0)
        children = np.array([crossover(first, second, lower, upper, eta, random)[0] for _ in range(2000)])
        spread[eta] = np.minimum(np.abs(children - 0.4), np.abs(children - 0.6)).mean()
    assert spread[1] > spread[5] > spread[20]


def test_the_children_of_algorithm_3_have_the_mean_of_their_parents() -> None:
    random = np.random.default_rng(0)
    first, second = np.array([2.0, 5.0]), np.array([8.0, 5.0])
    children = np.array([paper_crossover(first, second, 5, random) for _ in range(4000)])
    assert children.mean(0) == pytest.approx([5, 5], abs=0.2)
    assert children[:, 1] == pytest.approx(5)


def test_in_algorithm_4_integers_of_15_ranks_never_mutate_at_eta_20() -> None:
    space, random = Space({"rank": IntDistribution(2, 16)}), np.random.default_rng(0)
    moves = []
    for rank in range(2, 17):
        genes = space.encode({"rank": rank})
        for _ in range(500):
            mutant = paper_mutate(genes, space.smallest, space.largest, 20, random)
            moves.append(abs(mutant - genes)[0])
            assert space.decode(mutant) == {"rank": rank}
    # 14 (1/20) (19/20)^19
    assert 0.25 < max(moves) < 0.2642
    assert any(space.decode(mutate(genes, space.lower, space.upper, 20, random)) != {"rank": 16} for _ in range(500))


# --- Refinement ------------------------------------------------------------------------------------------------------
def test_the_weighted_score_is_equation_5() -> None:
    random = np.random.default_rng(0)
    quality, memory = random.random(9), 1e9 * random.random(9)
    by_hand = 0.7 * (quality - quality.mean()) / quality.std() - 0.3 * (memory - memory.mean()) / memory.std()
    assert weighted_score(np.stack([-quality, memory], 1), 0.7).tolist() == pytest.approx(by_hand.tolist())
    # One objective has the whole weight; three share the rest; a constant one adds nothing.
    assert weighted_score(memory[:, None], 0.3).argmax() == memory.argmin()
    thirds = weighted_score(np.stack([memory, memory, memory], 1), 0.4)
    assert thirds.tolist() == pytest.approx(weighted_score(memory[:, None], 1).tolist())
    assert weighted_score(np.stack([np.ones(9), memory], 1), 0.5).tolist() == pytest.approx((thirds / 2).tolist())


def test_the_expected_improvement_is_equation_8() -> None:
    random = np.random.default_rng(0)
    mean, deviation = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 2.0])
    drawn = (mean + deviation * random.normal(size=(200_000, 3)) - 0.7).clip(0).mean(0)
    assert expected_improvement(mean, deviation, 0.7) == pytest.approx(drawn, abs=0.01)


@pytest.mark.parametrize("kernel", ["rbf", "matern"])
def test_refinement_finds_better_trials_than_the_design(kernel: str) -> None:
    def bowl(trial: Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_int("y", 0, 20)
        kind = trial.suggest_categorical("kind", ["good", "bad"])
        return (x - 0.3) ** 2 + (y / 20 - 0.6) ** 2 + 0.2 * (kind == "bad")

    study = optuna.create_study(sampler=RefineSampler(kernel=kernel, start_after=6, seed=0))
    study.optimize(bowl, n_trials=14)
    values = [trial.value for trial in study.trials]
    assert min(values[6:]) < 0.2 * min(values[:6])
    assert min(values) < 0.01


def test_alpha_decides_which_objective_refinement_follows() -> None:
    means = {}
    for alpha in (0.0, 1.0):
        sampler = RefineSampler(alpha=alpha, kernel="rbf", seed=0)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        study.optimize(lambda trial: (size := trial.suggest_int("x", 0, 36), size**2), n_trials=12)
        means[alpha] = np.mean([trial.values[0] for trial in study.trials[5:]])
    assert means[0.0] < 8
    assert means[1.0] > 28


def test_without_alpha_each_proposal_has_its_own_preference() -> None:
    sampler = RefineSampler(alpha=None, kernel="rbf", seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.optimize(lambda trial: (size := trial.suggest_int("x", 0, 36), size**2), n_trials=14)
    sizes = [trial.values[0] for trial in study.trials[5:]]
    assert min(sizes) <= 4
    assert max(sizes) >= 32


def test_the_shadow_study_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    try:
        study = optuna.create_study(study_name="mine", sampler=RefineSampler(start_after=2, seed=0))
        with caplog.at_level(logging.INFO):
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
        assert "refine-" not in caplog.text
        optuna.create_study(study_name="yours")
        assert "yours" in caplog.text
    finally:
        optuna.logging.disable_propagation()


# --- Stages ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("start", "explored"), [([], 5 + 5), ([{"x": 3}, {"x": 4}], 2 + 5)])
def test_three_stages_follow_each_other_by_the_number_of_finished_trials(
    monkeypatch: pytest.MonkeyPatch, start: list[dict[str, int]], explored: int
) -> None:
    stages = []
    for sampler in (PRGASampler, RefineSampler):

        def spied(self, study, trial, space, others, random, _real=sampler.proposals, _name=sampler.__name__):  # type: ignore[no-untyped-def]
            stages.append((_name, sum(other.state.is_finished() and other.value is not None for other in others)))
            return _real(self, study, trial, space, others, random)

        monkeypatch.setattr(sampler, "proposals", spied)
    study = optuna.create_study(sampler=ThreeStageSampler(start=start, kernel="rbf", seed=0))

    def objective(trial: Trial) -> float:
        value = trial.suggest_int("x", 0, 100) + trial.suggest_float("y", 0, 1)
        return math.nan if trial.number == 6 else value

    study.optimize(objective, n_trials=14)
    assert {finished for stage, finished in stages if stage == "PRGASampler"} <= set(range(explored))
    assert {finished for stage, finished in stages if stage == "RefineSampler"} == set(range(explored, 13))


def test_dovetail_is_imported_without_optuna() -> None:
    code = "import sys, dovetail.cli.main, dovetail.searches; print('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
