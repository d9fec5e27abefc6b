"""Contract of the samplers: what holds for each of them, on any study, any storage and any number of workers."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import Trial, TrialState

import dovetail.searches.samplers.proposal as proposal
from dovetail.errors import SearchError
from dovetail.searches import PRGASampler, RefineSampler, ThreeStageSampler
from dovetail.searches.pareto import pareto_rank
from dovetail.searches.samplers.genes import Gene, Space

Make = Callable[..., BaseSampler]
SAMPLERS: Mapping[str, Make] = {
    "prga": PRGASampler,
    "prga paper": lambda **given: PRGASampler(variant="paper", **given),
    "refine rbf": lambda **given: RefineSampler(kernel="rbf", **given),
    "refine matern": RefineSampler,
    "three stages": lambda **given: ThreeStageSampler(population_size=3, explore=3, kernel="rbf", **given),
}
each_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
FAST = {name: make for name, make in SAMPLERS.items() if name != "refine matern"}
each_fast_sampler = pytest.mark.parametrize("make", FAST.values(), ids=FAST)
GOOD = {name: make for name, make in FAST.items() if name != "prga paper"}
each_good_sampler = pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
DISTRIBUTIONS: Mapping[str, BaseDistribution] = {
    "float": FloatDistribution(-1, 3),
    "log": FloatDistribution(1e-4, 1, log=True),
    "stepped": FloatDistribution(0, 1, step=0.1),
    "integer": IntDistribution(2, 16, step=2),
    "log integer": IntDistribution(1, 1000, log=True),
    "category": CategoricalDistribution(["a", "b", None]),
    "bits": CategoricalDistribution([2, 3, 4, 8]),
    "one": IntDistribution(3, 3),
    "one choice": CategoricalDistribution(["only"]),
}


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


# --- Optuna's own contract -------------------------------------------------------------------------------------------
class TestPRGAIsASampler(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Make:
        return lambda: PRGASampler(population_size=2, seed=0)


class TestRefineIsASampler(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Make:
        return lambda: RefineSampler(kernel="rbf", start_after=8, seed=0)


class TestThreeStageIsASampler(BasicSamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Make:
        return lambda: ThreeStageSampler(population_size=2, explore=7, kernel="rbf", seed=0)


# --- Studies ---------------------------------------------------------------------------------------------------------
def two_objectives(sampler: BaseSampler, directions: tuple[str, str] = ("minimize", "minimize"), **given: Any) -> Study:
    return optuna.create_study(directions=directions, sampler=sampler, **given)


def grid(trial: Trial) -> tuple[float, float]:
    """Two objectives of six integers, in conflict."""
    genes = [trial.suggest_int(f"x{place}", 0, 10) for place in range(6)]
    return genes[0] + sum(genes[1:]) / 10, (10 - genes[0]) ** 2 + sum(genes[1:])


def tiny(trial: Trial) -> tuple[float, float]:
    """Two objectives in a space of 36 configurations."""
    a, b = trial.suggest_int("a", 1, 4), trial.suggest_int("b", 1, 3)
    return a + b, a * b - (trial.suggest_categorical("c", ["u", "v", "w"]) == "v") * 4


def mixed(trial: Trial) -> tuple[float, float]:
    value = {
        "float": trial.suggest_float("float", -1, 3),
        "log": trial.suggest_float("log", 1e-4, 1, log=True),
        "stepped": trial.suggest_float("stepped", 0, 1, step=0.1),
        "integer": trial.suggest_int("integer", 2, 16, step=2),
        "log integer": trial.suggest_int("log integer", 1, 1000, log=True),
        "category": trial.suggest_categorical("category", ["a", "b", None]),
        "bits": trial.suggest_categorical("bits", [2, 3, 4, 8]),
        "one": trial.suggest_int("one", 3, 3),
        "one choice": trial.suggest_categorical("one choice", ["only"]),
    }
    if value["category"] == "a":
        trial.suggest_float("conditional", 0, 1)
    trial.set_constraint("float below 2", value["float"] - 2)
    return value["float"] ** 2 + value["integer"] / 16, value["stepped"] + value["log"] + value["log integer"] / 1000


def history(study: Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


def repeats(study: Study) -> int:
    configurations = [tuple(sorted(trial.params.items())) for trial in study.trials]
    return len(configurations) - len(set(configurations))


# --- No state --------------------------------------------------------------------------------------------------------
@each_sampler
def test_the_same_seed_gives_the_same_trials(make: Make) -> None:
    trials = 6 if make is RefineSampler else 10
    runs = []
    for seed in (0, 0, 1):
        study = two_objectives(make(seed=seed))
        study.optimize(mixed, n_trials=trials)
        runs.append(history(study))
    assert runs[0] == runs[1] != runs[2]


def sqlite(file: Path) -> optuna.storages.BaseStorage:
    return optuna.storages.RDBStorage(f"sqlite:///{file}")


def journal(file: Path) -> optuna.storages.BaseStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))


@pytest.mark.parametrize(
    ("name", "opened"),
    [("three stages", sqlite), ("prga", journal), ("refine rbf", journal), ("refine matern", journal)],
)
def test_a_storage_reopened_between_any_two_trials_changes_nothing(
    name: str, opened: Callable[[Path], optuna.storages.BaseStorage], tmp_path: Path
) -> None:
    whole = two_objectives(SAMPLERS[name](seed=3))
    whole.optimize(mixed, n_trials=6)
    for number in range(6):
        sampler = pickle.loads(pickle.dumps(SAMPLERS[name](seed=3)))
        storage = opened(tmp_path / "study")
        study = two_objectives(sampler, study_name="s", storage=storage, load_if_exists=True)
        study.optimize(mixed, n_trials=1)
        assert study.trials[number].params == whole.trials[number].params
        if isinstance(storage, optuna.storages.RDBStorage):
            storage.engine.dispose()


@each_good_sampler
def test_trials_of_another_sampler_are_continued(make: Make) -> None:
    study = two_objectives(RandomSampler(seed=0))
    study.optimize(grid, n_trials=12)
    study.sampler = make(seed=0)
    study.optimize(grid, n_trials=12)
    before, after = np.split(pareto_rank(proposal.losses(study.trials, study.directions)), 2)
    assert (after == 1).sum() > (before == 1).sum()


def test_without_a_seed_two_samplers_differ() -> None:
    first, second = two_objectives(PRGASampler()), two_objectives(PRGASampler())
    for study in (first, second):
        study.optimize(grid, n_trials=3)
    assert history(first) != history(second)


# --- Spaces ----------------------------------------------------------------------------------------------------------
@each_sampler
def test_every_kind_of_parameter_gets_values_of_its_distribution(make: Make) -> None:
    study = two_objectives(make(seed=1), directions=("minimize", "maximize"))
    study.optimize(mixed, n_trials=7 if make is RefineSampler else 14)
    for trial in study.trials:
        for name, distribution in DISTRIBUTIONS.items():
            assert trial.distributions[name] == distribution
            assert distribution.single() or Gene.of(distribution).allows(trial.params[name])
        assert ("conditional" in trial.params) == (trial.params["category"] == "a")
        assert type(trial.params["integer"]) is int
        assert type(trial.params["float"]) is float


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_gene_decodes_to_the_value_that_it_encodes(name: str) -> None:
    distribution = DISTRIBUTIONS[name]
    gene, random = Gene.of(distribution), np.random.default_rng(0)
    for _ in range(100):
        value = gene.decode(random.uniform(gene.lower, gene.upper))
        assert gene.allows(value)
        again = gene.decode(gene.encode(value))
        assert again == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)
    if gene.count is not None:
        values = [gene.at(place) for place in range(gene.count)]
        assert len(set(values)) == gene.count
        assert [gene.index(value) for value in values] == list(range(gene.count))
        assert gene.decode(gene.lower) == values[0]
        assert gene.decode(gene.upper) == values[-1]


def test_a_gene_allows_no_value_outside_of_its_distribution() -> None:
    refused: dict[str, list[Any]] = {
        "float": [-1.1, 3.1, "1", None],
        "stepped": [0.05, 1.1],
        "integer": [3, 0, 18, 4.5, True],
        "category": ["c", 1],
        "bits": [5, 16],
    }
    for name, values in refused.items():
        assert not any(map(Gene.of(DISTRIBUTIONS[name]).allows, values)), name


@pytest.mark.parametrize(
    ("choices", "ordered"),
    [((2, 3, 4, 8), True), ((0.5, 0.1), True), ((2, 8, 4), False), ((1, "a"), False), ((1, None), False)],
)
def test_a_category_of_sorted_numbers_is_ordered(choices: tuple[Any, ...], ordered: bool) -> None:
    assert Gene.of(CategoricalDistribution(choices)).ordered == ordered
    space, random = Space({"x": CategoricalDistribution(choices)}), np.random.default_rng(0)
    reached = {space.neighbour({"x": choices[0]}, random)["x"] for _ in range(50)}
    assert reached == ({choices[0], choices[1]} if ordered else set(choices[1:]))


def test_a_neighbour_differs_in_at_most_one_parameter() -> None:
    space, random = Space({k: v for k, v in DISTRIBUTIONS.items() if not v.single()}), np.random.default_rng(0)
    center = space.random(random)
    for _ in range(100):
        moved = space.neighbour(center, random)
        assert np.isclose(space.encode(moved), space.encode(center), rtol=1e-9).sum() >= len(center) - 1
        assert space.allows(moved)


def test_the_initial_design_is_a_latin_hypercube() -> None:
    study = two_objectives(PRGASampler(population_size=11, seed=5))
    study.optimize(grid, n_trials=11)
    for place in range(6):
        assert sorted(trial.params[f"x{place}"] for trial in study.trials) == list(range(11))


# --- No configuration twice ------------------------------------------------------------------------------------------
@each_fast_sampler
def test_a_small_space_is_searched_without_a_repeat_until_it_is_exhausted(make: Make) -> None:
    study = two_objectives(make(seed=0))
    study.optimize(tiny, n_trials=36)
    assert repeats(study) == 0
    study.optimize(tiny, n_trials=2)
    assert repeats(study) == 2


def test_matern_repeats_no_configuration() -> None:
    study = two_objectives(RefineSampler(seed=0))
    study.optimize(lambda trial: (trial.suggest_int("a", 0, 2), -trial.suggest_int("b", 0, 2)), n_trials=9)
    assert repeats(study) == 0


@each_fast_sampler
def test_trials_that_wait_or_run_are_not_repeated(make: Make) -> None:
    study = two_objectives(make(seed=0))
    study.optimize(tiny, n_trials=6)
    enqueued = [{"a": a, "b": b, "c": c} for a, b, c in itertools.product((1, 2), (1, 2, 3), ("u", "v", "w"))]
    for parameters in enqueued:
        study.enqueue_trial(parameters, skip_if_exists=True)
    study.optimize(tiny, n_trials=30)
    assert repeats(study) == 0


@each_fast_sampler
def test_interleaved_workers_propose_different_configurations(make: Make) -> None:
    study = two_objectives(make(seed=0))
    study.optimize(tiny, n_trials=4)
    for _ in range(8):
        asked = [study.ask() for _ in range(4)]
        for suggest in (
            lambda trial: trial.suggest_int("a", 1, 4),
            lambda trial: trial.suggest_int("b", 1, 3),
            lambda trial: trial.suggest_categorical("c", ["u", "v", "w"]),
        ):
            for trial in asked:
                suggest(trial)
        for trial in asked:
            study.tell(trial, (trial.params["a"], -trial.params["b"]))
    assert repeats(study) == 0


def test_a_worker_that_reads_the_same_proposal_of_another_one_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    study = two_objectives(PRGASampler(seed=0))
    study.optimize(tiny, n_trials=8)
    rival = study.ask()
    choose, chosen = PRGASampler._first_free, []

    def choose_the_same(self: PRGASampler, study: Study, *given: Any) -> dict[str, Any]:
        chosen.append(choose(self, study, *given))
        if len(chosen) == 1:  # The other worker writes between our reading and our writing.
            study._storage.set_trial_system_attr(rival._trial_id, proposal._PROPOSAL, chosen[0])
        return chosen[-1]

    monkeypatch.setattr(PRGASampler, "_first_free", choose_the_same)
    trial = study.ask()
    tiny(trial)
    assert len(chosen) == 2
    assert trial.params == chosen[1] != chosen[0]


def interrupted(trial: Trial) -> Iterator[tuple[float, float]]:
    """Yield after the first parameter of `tiny`, and its values thereafter."""
    trial.suggest_int("a", 1, 4)
    yield 0.0, 0.0
    yield tiny(trial)


@each_fast_sampler
@pytest.mark.parametrize("other_seed", [0, 1])
def test_a_trial_that_knew_no_parameter_is_not_repeated_by_later_ones(make: Make, other_seed: int) -> None:
    study = two_objectives(make(seed=0))
    trials = [study.ask() for _ in range(3)]
    parts = [interrupted(trial) for trial in trials]
    for part in parts:
        next(part)
    study.sampler = make(seed=other_seed)
    study.optimize(tiny, n_trials=29)
    study.sampler = make(seed=0)
    for trial, part in zip(trials, parts, strict=True):
        study.tell(trial, next(part))
    assert repeats(study) == 0


def test_a_trial_that_continues_a_failed_one_keeps_its_proposal() -> None:
    study = two_objectives(PRGASampler(seed=0))
    study.optimize(tiny, n_trials=8)
    lost = study.ask()
    lost.suggest_int("a", 1, 4)
    lost = study.trials[lost.number]
    study.tell(lost.number, state=TrialState.FAIL)
    given = {"params": lost.params, "distributions": lost.distributions, "system_attrs": lost.system_attrs}
    study.add_trial(optuna.create_trial(state=TrialState.WAITING, **given))
    study.optimize(tiny, n_trials=1)
    assert study.trials[-1].params == proposal.planned(lost)


def test_a_conditional_space_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, chosen = PRGASampler._first_free, []

    def counted(*given: Any) -> dict[str, Any]:
        chosen.append(choose(*given))
        return chosen[-1]

    monkeypatch.setattr(PRGASampler, "_first_free", counted)
    study = two_objectives(PRGASampler(seed=0))
    study.optimize(lambda t: (x := t.suggest_float(t.suggest_categorical("kind", ["a", "b"]), 0, 1), -x), n_trials=20)
    assert len(chosen) <= 20


@each_fast_sampler
def test_four_threads_repeat_no_configuration(make: Make) -> None:
    study = two_objectives(make(seed=0))
    study.optimize(tiny, n_trials=32, n_jobs=4)
    assert len(study.trials) == 32
    assert repeats(study) == 0


def test_four_workers_with_their_own_connections_repeat_no_configuration(tmp_path: Path) -> None:
    storages = [optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study'}") for _ in range(4)]
    two_objectives(PRGASampler(), study_name="shared", storage=storages[0])

    def work(storage: optuna.storages.RDBStorage) -> None:
        study = optuna.load_study(study_name="shared", storage=storage, sampler=PRGASampler(seed=0))
        study.optimize(tiny, n_trials=8)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(work, storages))
    study = optuna.load_study(study_name="shared", storage=storages[0])
    assert len(study.trials) == 32
    assert repeats(study) == 0
    for storage in storages:
        storage.engine.dispose()


# --- Objectives ------------------------------------------------------------------------------------------------------
@each_fast_sampler
def test_maximizing_is_minimizing_the_negative(make: Make) -> None:
    down, up = two_objectives(make(seed=0)), two_objectives(make(seed=0), directions=("minimize", "maximize"))
    down.optimize(grid, n_trials=14)
    up.optimize(lambda trial: (grid(trial)[0], -grid(trial)[1]), n_trials=14)
    assert history(down) == history(up)


@each_sampler
@pytest.mark.parametrize("objectives", [1, 3])
def test_any_number_of_objectives(make: Make, objectives: int) -> None:
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=make(seed=0))
    study.optimize(lambda trial: (*grid(trial), trial.params["x5"])[-objectives:], n_trials=8)
    assert repeats(study) == 0


@each_good_sampler
def test_constraints_lead_to_feasible_trials(make: Make) -> None:
    def constrained(trial: Trial) -> tuple[float, float]:
        values = grid(trial)
        trial.set_constraint("x1", trial.params["x1"] - 2)
        trial.set_constraint("x2", 8 - trial.params["x2"])
        return values

    study = two_objectives(make(seed=0))
    study.optimize(constrained, n_trials=24)
    feasible = [max(trial.constraints.values()) <= 0 for trial in study.trials]
    assert sum(feasible[:5]) <= 1
    assert sum(feasible[-8:]) >= 4


def test_an_infeasible_trial_is_no_parent_while_there_are_enough_feasible_ones() -> None:
    sampler = PRGASampler(population_size=2, seed=0)
    study = two_objectives(sampler)
    for number, (violation, values) in enumerate([(0.0, (3, 3)), (5.0, (0, 0)), (-1.0, (4, 4)), (1.0, (0, 0))]):
        parameters, distributions = {"x": number}, {"x": IntDistribution(0, 9)}
        study.add_trial(
            optuna.create_trial(
                values=values, params=parameters, distributions=distributions, constraints={"c": violation}
            )
        )
    space = Space({"x": IntDistribution(0, 9)})
    assert [trial.number for trial in sampler._parents(study, space, study.trials)] == [0, 2]
    sampler = PRGASampler(population_size=4, seed=0)
    assert [trial.number for trial in sampler._parents(study, space, study.trials)] == [0, 2, 3, 1]


@each_fast_sampler
def test_failed_trials_and_nan_never_win(make: Make) -> None:
    def failing(trial: Trial) -> tuple[float, float]:
        first, second = grid(trial)
        if trial.number % 3 == 1:
            return math.nan, second
        if trial.number % 3 == 2:
            raise ValueError("out of memory")
        return first, second

    study = two_objectives(make(seed=0))
    study.optimize(failing, n_trials=30, catch=(ValueError,))
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.FAIL}
    assert repeats(study) == 0


def test_a_finished_trial_with_nan_is_left_out() -> None:
    distributions = {"x": IntDistribution(0, 9)}
    trials = [
        optuna.create_trial(values=[number, 2 - number], params={"x": number}, distributions=distributions)
        for number in range(3)
    ]
    trials[1].values = [math.nan, -9.0]
    space = Space(distributions)
    assert proposal.finished(trials, space) == [trials[0], trials[2]]
    assert PRGASampler(seed=0)._taken(space, trials) == {(0.0,), (1.0,), (2.0,)}


@each_fast_sampler
def test_infinite_values_are_survived(make: Make) -> None:
    study = two_objectives(make(seed=0))
    study.optimize(lambda trial: (math.inf if trial.number % 4 == 0 else grid(trial)[0], grid(trial)[1]), n_trials=16)
    assert repeats(study) == 0


@each_fast_sampler
def test_pruned_trials_of_one_objective_are_no_parents(make: Make) -> None:
    def objective(trial: Trial) -> float:
        value = grid(trial)[1]
        trial.report(-1e9 if trial.number % 2 else value, 0)
        if trial.number % 2:
            raise optuna.TrialPruned
        return value

    study = optuna.create_study(sampler=make(seed=0))
    study.optimize(objective, n_trials=24)
    assert study.best_value < 60
    assert repeats(study) == 0


# --- Start -----------------------------------------------------------------------------------------------------------
START = [{"a": 4, "b": np.int64(3), "c": "w"}, {"a": 1, "b": 1, "c": "v"}, {"a": 2, "b": 2}]


@each_fast_sampler
def test_the_starts_are_proposed_first_in_their_order(make: Make) -> None:
    study = two_objectives(make(seed=0, start=START))
    study.optimize(tiny, n_trials=5)
    assert [{**trial.params, **start} for trial, start in zip(study.trials, START, strict=False)] == history(study)[:3]
    assert repeats(study) == 0


@each_fast_sampler
def test_each_start_is_proposed_once_by_four_workers(make: Make) -> None:
    study = two_objectives(make(seed=0, start=START))
    workers = [study.ask() for _ in range(4)]
    for trial in reversed(workers):
        trial.suggest_int("a", 1, 4)
    values = [tiny(trial) for trial in workers]
    found = [trial.params for trial in workers]
    assert all(sum(start.items() <= parameters.items() for parameters in found) == 1 for start in START)
    for trial, value in zip(workers, values, strict=True):
        study.tell(trial, value)
    study.optimize(tiny, n_trials=6)
    assert repeats(study) == 0


def test_a_trial_that_the_user_enqueued_uses_no_start() -> None:
    study = two_objectives(PRGASampler(seed=0, start=START))
    study.enqueue_trial({"a": 3, "b": 3, "c": "u"})
    study.optimize(tiny, n_trials=3)
    assert history(study)[:3] == [{"a": 3, "b": 3, "c": "u"}, *START[:2]]


def test_a_start_outside_of_the_space_is_refused() -> None:
    study = two_objectives(PRGASampler(seed=0, start=[{"a": 9}]))
    with pytest.raises(SearchError, match=r"start\[0\]\n  found: a=9"):
        study.optimize(tiny, n_trials=1)


def test_a_start_with_an_unknown_parameter_is_refused() -> None:
    study = two_objectives(PRGASampler(seed=0, start=[START[0], {"a": 1, "bits": 4}]))
    with pytest.raises(SearchError, match=r"start\[1\]\n  found: no trial parameter is named bits"):
        study.optimize(tiny, n_trials=2)


@pytest.mark.parametrize(
    ("make", "given", "name"),
    [
        (PRGASampler, {"population_size": 1}, "population_size"),
        (PRGASampler, {"crossover_prob": 1.5}, "crossover_prob"),
        (PRGASampler, {"mutation_prob": math.nan}, "mutation_prob"),
        (PRGASampler, {"crossover_eta": -1}, "crossover_eta"),
        (PRGASampler, {"mutation_eta": 0}, "mutation_eta"),
        (PRGASampler, {"variant": "nsga3"}, "variant"),
        (PRGASampler, {"seed": -1}, "seed"),
        (PRGASampler, {"start": [[4, 8]]}, r"start\[0\]"),
        (RefineSampler, {"alpha": -0.1}, "alpha"),
        (RefineSampler, {"kernel": "linear"}, "kernel"),
        (RefineSampler, {"start_after": 1}, "start_after"),
        (ThreeStageSampler, {"explore": -1}, "explore"),
        (ThreeStageSampler, {"alpha": math.nan}, "alpha"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Make, given: dict[str, Any], name: str) -> None:
    with pytest.raises(SearchError, match=name):
        make(**given)
