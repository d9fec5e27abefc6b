"""The space of chains: its points, what is legal, and what the budget admits."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import dovetail
from dovetail.chains.notation import chain
from dovetail.errors import CannotMerge, ChainError, DataError, RecipeError, SearchError
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.searches.chains import RANKS, SCALES, ChainSpace
from dovetail.searches.space import Candidate
from dovetail.searches.task_space import split_task
from dovetail.tasks.task import Task
from small_runs import save_labels, save_model, save_sums

PLAYGROUND = {"model": "playground", "data": {"task": "word_problems"}}


def space_of(base=None, *, merge="exact", evaluate=None, **search):
    recipe = {**(base or PLAYGROUND), "merge": merge, "search": {"kind": "chains", **search}}
    return ChainSpace(Recipe.parse(recipe | ({"evaluate": evaluate} if evaluate else {})))


class Script:
    """A trial that takes the choices it is told, and remembers how many there were at each."""

    def __init__(self, choices):
        self.choices, self.counts, self.params = list(choices), [], {}

    def _take(self, name, values):
        at = len(self.counts)
        self.counts.append(len(values))
        choice = self.choices[at] if at < len(self.choices) else 0
        self.params[name] = values[choice]
        return values[choice]

    def suggest_categorical(self, name, values):
        return self._take(name, list(values))

    def suggest_int(self, name, low, high):
        return self._take(name, list(range(low, high + 1)))


def all_points(space):
    """Every set of parameters that `suggest` can propose."""
    waiting, found = [[]], []
    while waiting:
        choices = waiting.pop()
        script = Script(choices)
        space.suggest(script)
        found.append(script.params)
        for at in range(len(choices), len(script.counts)):
            path = choices + [0] * (at - len(choices))
            waiting += [[*path, choice] for choice in range(1, script.counts[at])]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {"model": str(save_model(folder / "base")), "data": save_sums(folder)}


@pytest.mark.parametrize(("slots", "count"), [(1, 64), (2, 1024)])
def test_clam_spaces(slots, count):
    space = space_of(slots=slots)
    points = all_points(space)
    assert len(points) == count
    assert len({tuple(sorted(point.items())) for point in points}) == count
    assert sum(1 for _ in space.chains()) * 4 == count
    options = {(option.link.name, option.rank) for option in space.options}
    assert options == {("ia3", None), *product(("lora", "loha", "vera"), RANKS)}
    scaled = [point for point in points if set(point.values()) <= {"ia3", *SCALES}]  # IA3 has no rank
    assert [set(point) for point in scaled] == [{"lr_scale", *(f"slot_{slot}" for slot in range(1, slots + 1))}] * 4


def test_the_chains_of_clams_largest_space():
    """Listed, as all its points would take seconds."""
    chains = [tuple(str(option.link) for option in options) for options in space_of(slots=3).chains()]
    assert len(chains) == len(set(chains)) == 16384 // 4


@pytest.mark.parametrize(
    ("search", "count"), [({"ranks": "fixed"}, 16), ({"learning_rate": "global"}, 2048), ({"links": ["lora"]}, 100)]
)
def test_ablations(search, count):
    space = space_of(**search)
    points = all_points(space)
    assert len(points) == count
    recipes = {space.candidate_recipe(Candidate(point)).model_dump_json() for point in points}
    assert len(recipes) == count


def test_the_recipe_of_a_candidate_trains_it():
    space = space_of({**PLAYGROUND, "train": {"lr_scale": 10.0}}, prefix="nf4", suffix="regrid")
    params = {"slot_1": "ia3", "slot_2": "lora", "slot_2_log2_rank": 4, "lr_scale": 0.4}
    recipe = space.candidate_recipe(Candidate(params))
    assert recipe.chain == "nf4 >> ia3 >> lora(r=16) >> regrid"
    assert (recipe.train.lr_scale, recipe.search, recipe.data) == (4.0, None, space.recipe.data)
    space = space_of(learning_rate="global")
    recipe = space.candidate_recipe(Candidate({"slot_1": "ia3", "slot_2": "ia3", "learning_rate": 4e-3}))
    assert (recipe.train.lr_scale, recipe.train.link_learning_rate) == (1.0, 4e-3)


def test_one_learning_rate_for_all_links():
    model, _ = dovetail.load("playground")
    dovetail.apply(model, "ia3 >> lora(r=4)")
    from dovetail.training.optimizer import learning_rates
    from dovetail.training.settings import TrainSettings

    assert learning_rates(model, TrainSettings(lr_scale=2)) == {"ia3": 2e-2, "lora(r=4)": 8e-4}
    assert learning_rates(model, TrainSettings(lr_scale=2, link_learning_rate=1e-3)) == {"ia3": 2e-3, "lora(r=4)": 2e-3}


@pytest.mark.parametrize("prefix", ["", "nf4", "magnitude(0.5) >> nf4"])
def test_sizes_are_those_of_a_plan(small, prefix):
    space = space_of(small, merge="none", prefix=prefix)
    for place, options in enumerate(space.chains()):
        if place % 97 == 0:
            text = str(space._chain([option.link for option in options]))
            made = plan(text, small["model"], memory=False)
            assert made.legal
            assert space._size(options) == (made.trainable_parameters, made.nbytes)
            assert space._bits == made.bits_per_weight


def test_a_head_counts(tmp_path):
    base = {"model": str(save_model(tmp_path / "base", labels=2)), "data": save_labels(tmp_path)}
    space = space_of(base, slots=1)
    made = plan("lora(r=4)", base["model"], task_kind="classification", num_labels=2, memory=False)
    option = next(option for option in space.options if option.label == "lora" and option.rank == 4)
    assert space._size([option]) == (made.trainable_parameters, made.nbytes)


@pytest.mark.parametrize("limit", ["trainable_parameters", "nbytes"])
def test_no_proposal_exceeds_the_budget_and_all_others_are_there(small, limit):
    every = {str(space._chain([o.link for o in options])): space._size(options) for space in [space_of(small)]
             for options in space.chains()}  # fmt: skip
    place = 0 if limit == "trainable_parameters" else 1
    middle = sorted(size[place] for size in every.values())[len(every) // 3]
    space = space_of(small, budget={limit: middle})
    proposed = {space.candidate_recipe(Candidate(point)).chain for point in all_points(space)}
    assert proposed == {text for text, size in every.items() if size[place] <= middle}
    assert {str(space._chain([o.link for o in options])) for options in space.chains()} == proposed


def test_a_budget_outside_of_the_space_names_both_ends(small):
    sizes = [space._size(options) for space in [space_of(small)] for options in space.chains()]
    least, most = min(sizes), max(sizes)
    for limit, place in (("trainable_parameters", 0), ("nbytes", 1)):
        for wrong in (least[place] - 1, most[place] + 1):
            with pytest.raises(SearchError, match=f"search.budget.{limit}") as caught:
                space_of(small, budget={limit: wrong})
            assert f"{least[place]:,}" in str(caught.value)
            assert f"{most[place]:,}" in str(caught.value)
    with pytest.raises(SearchError, match="bits_per_weight"):
        space_of(small, merge="none", prefix="nf4", budget={"bits_per_weight": 3.0})
    space_of(small, merge="none", prefix="nf4", budget={"bits_per_weight": 5.0})


def test_illegal_chains_are_not_proposed(small):
    """A bottleneck is not mergeable, and no other kind of link may follow it."""
    space = space_of(small, merge="none", links=["bottleneck(r=4)", "lora"])
    chains = [chain(space.candidate_recipe(Candidate(point)).chain) for point in all_points(space)]
    assert {tuple(link.name for link in links) for links in chains} == {
        ("lora", "lora"), ("lora", "bottleneck"), ("bottleneck", "bottleneck")
    }  # fmt: skip
    merged = space_of(small, links=["bottleneck(r=4)", "lora"])
    assert all("bottleneck" not in merged.candidate_recipe(Candidate(point)).chain for point in all_points(merged))


def test_ranks_above_the_layers_are_not_proposed(small):
    space = space_of(small)
    assert max(option.rank for option in space.options if option.label == "lora") == 32
    assert max(option.rank for option in space.options if option.label == "vera") == 64


@pytest.mark.parametrize(
    ("search", "error", "problem"),
    [
        ({"prefix": "lora(r=4)"}, SearchError, "search.prefix"),
        ({"suffix": "nf4"}, SearchError, "search.suffix"),
        ({"prefix": "nf4 >> nf4"}, ChainError, "at most one quantizer"),
        ({"suffix": "regrid"}, ChainError, "regrid"),
        ({"prefix": "nf4"}, CannotMerge, "search.suffix"),
        ({"links": ["nf4"]}, SearchError, "search.links"),
        ({"links": ["lora", "lora"]}, SearchError, "differ"),
        ({"links": ["lora >> ia3"]}, SearchError, "search.links"),
        ({"links": []}, RecipeError, "search"),
        ({"slots": 0}, RecipeError, "slots"),
        ({"trials": 0}, RecipeError, "trials"),
        ({"objectives": []}, RecipeError, "objectives"),
        ({"objectives": ["speed"]}, RecipeError, "objectives"),
        ({"objectives": ["quality", "quality"]}, RecipeError, "once"),
        ({"pruning": "median", "objectives": ["quality", "nbytes"]}, RecipeError, "pruning"),
        ({"ranks": "fixed", "learning_rate": "global"}, RecipeError, "fixed"),
        ({"chains": 3}, RecipeError, "chains"),
    ],
)
def test_bad_settings(small, search, error, problem):
    with pytest.raises(error, match=problem):
        space_of(small, **search)


def test_the_split_of_the_training_records():
    records = [{"prompt": str(n), "answer": str(n)} for n in range(100)]
    other = [{"prompt": "x", "answer": "y"}] * 5
    task = Task("t", "generation", "exact_match", {"train": records, "test": other})
    parts = split_task(task, "test", 0)
    assert (len(parts.split("train")), len(parts.split("validation"))) == (80, 20)
    assert sorted([*parts.split("train"), *parts.split("validation")], key=lambda r: int(r["prompt"])) == records
    assert parts.split("test") == other
    assert split_task(task, "test", 0).splits == parts.splits
    assert split_task(task, "test", 1).splits != parts.splits
    whole = Task("t", "generation", "exact_match", {"train": records, "validation": other, "test": other})
    assert split_task(whole, "test", 0) is whole
    scored_on_validation = split_task(whole, "validation", 0)
    assert (len(scored_on_validation.split("train")), len(scored_on_validation.split("validation"))) == (80, 20)
    with pytest.raises(SearchError, match="at least 3"):
        split_task(Task("t", "generation", "exact_match", {"train": records[:1], "test": other}), "test", 0)


def test_data_without_the_test_split(small):
    data = {key: value for key, value in small["data"].items() if key != "test"}
    with pytest.raises(DataError, match="test"):
        space_of({**small, "data": data}, evaluate={"split": "test"})


def test_suggest_works_with_optuna():
    import optuna

    space = space_of(slots=3, budget={"trainable_parameters": 60_000})
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for number in range(30):
        trial = study.ask()
        space.suggest(trial)
        parameters, _ = space._size(space._chosen(trial.params))
        assert parameters <= 60_000
        study.tell(trial, float(torch.tensor(number)))
