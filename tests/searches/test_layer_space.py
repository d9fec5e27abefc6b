"""The search over the arguments of units of layers: sizes, budgets, rungs, references."""

from __future__ import annotations

import json
import random

import optuna
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail
from dovetail.chains.link import arguments
from dovetail.cli.search_tables import trial_line
from dovetail.errors import ChainError, DovetailError, RecipeError, SearchError
from dovetail.models.targets import find_targets
from dovetail.runs.flow import run
from dovetail.runs.plan import plan
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from dovetail.searches.layers import LayerSpace
from dovetail.searches.report import Trial
from dovetail.searches.space import Candidate, Scored
from dovetail.searches.study import open_study, work
from dovetail.searches.units import units
from small_runs import small_recipe

torch.set_num_threads(1)
CHAIN = "wanda(0.5) >> int(bits=4, group=16) >> lora(r=4) >> remask >> regrid"
SPACE = {"bits": [2, 4, 8], "ranks": [2, 4]}


def recipe_of(folder, **search) -> Recipe:
    given = {"kind": "layers", "start": "uniform", "trials": 3, "samples": 4, "space": SPACE, **search}
    changed = {"chain": CHAIN, "train": {"max_steps": 4, "batch_size": 8}, "calibration": {"samples": 8}}
    return Recipe.parse(small_recipe(folder, search=given, **changed))


def drawn(space: LayerSpace, seed: int):
    generator = random.Random(seed)
    return [generator.choice(space.choices) for _ in space.units]


@pytest.mark.parametrize("changes", [
    {}, {"unit": "block"}, {"unit": "layer"}, {"fixed": {"down": CHAIN.replace("bits=4", "bits=8")}},
    {"space": {"int.group": [8, 16], "wanda.sparsity": [0.25, 0.5], "ranks": [2, 8]}},
])  # fmt: skip
def test_sizes_are_those_of_plan(tmp_path, changes):
    space = LayerSpace(recipe_of(tmp_path, **changes))
    for seed in range(2):
        choices = drawn(space, seed)
        params = space.params(choices)
        assert space.choices_of(params) == choices
        recipe = space.candidate_recipe(Candidate(params))
        found = plan(recipe.chain, recipe.model, layers=recipe.layers, memory=False)
        assert found.legal, found.problem
        size = space.size(choices)
        assert size == {name: getattr(found, name) for name in size}
        assert recipe.search is None
        assert recipe.calibration.inputs == "original"


@pytest.mark.parametrize(("budget", "samplers"), [
    ({"bits_per_weight": 5.5}, ("three_stage", "tpe")),
    ({"nbytes": 42_000}, ("prga",)),
    ({"trainable_parameters": 2600}, ("refine",)),
])  # fmt: skip
def test_no_proposal_exceeds_the_budget(tmp_path, budget, samplers):
    for sampler in samplers:
        space = LayerSpace(recipe_of(tmp_path, budget=budget, sampler=sampler, trials=5, start="none"))
        (name, limit), = budget.items()  # fmt: skip
        seen = []

        def score(candidate, report, space=space, seen=seen):
            seen.append(space.size(space.choices_of(candidate.params)))
            quality = float(sum(map(sum, space.choices_of(candidate.params))))
            return Scored({"quality": quality, "nbytes": seen[-1]["nbytes"]})

        space.score = score
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with open_study(f"sqlite:///{tmp_path}/{sampler}.db", "s", space, {"recipe": "r"}) as study:
            work(study, space)
            keys = [repr(sorted(trial.params.items())) for trial in study.trials]
        assert len(keys) == 5
        assert len(seen) == len(set(keys))  # a repeated candidate is not scored again
        assert max(size[name] for size in seen) <= limit
        if sampler in ("three_stage", "prga", "refine"):
            assert len(set(keys)) == 5


def test_a_whole_search(tmp_path):
    recipe = recipe_of(
        tmp_path, start="gradient", rungs=[1, 2, 4], trials=5, budget={"bits_per_weight": 7.5}, finish="front"
    )
    report = dovetail.search(recipe, output=tmp_path / "found", progress=False)
    assert [sum(trial.rung == rung for trial in report.trials) for rung in range(3)] == [5, 2, 1]
    assert [trial.details["steps"] for trial in report.trials] == [1] * 5 + [2] * 2 + [4]
    assert all(trial.details["bits_per_weight"] <= 7.5 for trial in report.trials)
    assert report.trial(report.best).rung == 2
    assert report.finish["references"]
    assert "uniform" in report.headline
    best = Recipe.load(tmp_path / "found" / "best.yaml")
    assert best.layers == report.recipe(report.best).layers
    for number in report.front:
        run = Report.load(tmp_path / "found" / "trained" / str(number))
        assert run.merge.exact
        assert run.footprint.bits_per_weight <= 7.5
    page = (tmp_path / "found" / "report.html").read_text()
    assert "Chosen for each unit" in page
    assert "Scores of the units" in page
    assert "self_attn.q_proj+k_proj+v_proj" in page
    assert not (tmp_path / "found" / "trials").exists()


@pytest.mark.parametrize("start", ["gradient", "entropy"])
def test_the_start_is_the_front_of_the_scores(tmp_path, start):
    space = LayerSpace(recipe_of(tmp_path, start=start, trials=9, budget={"bits_per_weight": 6.0}))
    prepared = space.prepare()
    assert prepared == space.prepare()
    json.dumps(prepared)
    space.begin(prepared)
    scores = prepared["scores"]
    assert sum(max(row) for row in scores.values()) <= 1.0001
    bits = [space.settings.space["bits"][choice[0]] for choice in space.choices]
    for row in scores.values():  # larger ranks are never worse at the same bits
        pairs = list(zip(bits, [choice[1] for choice in space.choices], row, strict=True))
        assert all(a >= b - 1e-9 for (n, r, a) in pairs for (m, q, b) in pairs if n == m and r <= q)
    assert sum(row[0] for row in scores.values()) > sum(row[-1] for row in scores.values())
    first = [space.choices_of(fixed.candidate.params) for fixed in space.fixed([])]
    assert len(first) <= 9
    assert all(space.fits(choices) for choices in first)
    sizes = [space.size(choices)["bits_per_weight"] for choices in first]
    assert max(sizes) > 5  # the budget is used
    uniform = [choices for choices in first if len(set(choices)) == 1]
    assert 1 <= len(uniform) < len(first)


def test_bits_alone_are_scored_without_training(tmp_path):
    given = recipe_of(tmp_path, start="gradient", space={"bits": [2, 4, 8]}, budget={"bits_per_weight": 6.0})
    recipe = Recipe.parse({**given.model_dump(mode="json"), "chain": "int(bits=4, group=16)"})
    report = dovetail.search(recipe, output=tmp_path / "found", progress=False)
    assert [trial.details["steps"] for trial in report.trials] == [0] * 3
    assert dovetail.footprint(dovetail.load(tmp_path / "found" / "best" / "packed")[0]).bits_per_weight <= 6.0


@pytest.mark.parametrize("space", [
    {"bits": [4, 8, 2], "ranks": [8, 2]}, {"int.group": [8, 16], "ranks": [4, 2]}, {"bits": [8, 4]},
])  # fmt: skip
def test_values_in_any_order_are_moved_into_the_budget(tmp_path, space):
    free = LayerSpace(recipe_of(tmp_path, space=space))
    ends = [[choose(free.choices, key=lambda c: free.cost(free.units[0], c, "nbytes"))] * len(free.units)
            for choose in (min, max)]  # fmt: skip
    least, most = (free.size(each)["bits_per_weight"] for each in ends)
    fewest = free.size(ends[0])["trainable_parameters"]
    for limit in (least, (least + most) / 2, most):
        budget = {"bits_per_weight": limit, "trainable_parameters": fewest}
        bounded = LayerSpace(recipe_of(tmp_path, space=space, budget=budget))
        for seed in range(3):
            params = bounded.params(drawn(bounded, seed))
            assert bounded.fits(bounded.choices_of(bounded.repaired(params)))


def test_the_sizes_after_a_round_with_mixed_grids(tmp_path):
    given = recipe_of(tmp_path).model_dump(mode="json") | {"search": None}
    mixed = {"down": CHAIN.replace("bits=4", "bits=8"), "layers.0.*": CHAIN.replace("bits=4", "bits=2")}
    run(Recipe.parse(given | {"layers": mixed}), output=tmp_path / "round", progress=False)
    search = {"kind": "layers", "space": {"ranks": [2, 4]}, "start": "none"}
    again = {"model": str(tmp_path / "round" / "model"), "chain": "lora(r=4) >> remask >> regrid", "search": search}
    space = LayerSpace(Recipe.parse(given | again))
    recipe = space.candidate_recipe(Candidate(space.params(drawn(space, 0))))
    found = plan(recipe.chain, recipe.model, layers=recipe.layers, memory=False)
    size = space.size(drawn(space, 0))
    assert size == {name: getattr(found, name) for name in size}


@pytest.mark.parametrize("objectives", [["quality"], ["peak_memory", "trainable_parameters"]])
def test_any_objectives_give_a_report(tmp_path, objectives):
    recipe = recipe_of(tmp_path, objectives=objectives, trials=2, finish="none")
    report = dovetail.search(recipe, output=tmp_path / "found", progress=False)
    assert len(report.trials) == 2
    assert report.headline
    assert all({"nbytes", "trainable_parameters"} <= trial.details.keys() for trial in report.trials)
    line = trial_line(report.trials[0])
    assert "bits per weight, 4 steps" in line
    assert report.trials[0].summary == "bits 2 x 8; ranks 4 x 8"
    assert report.trials[0].summary in line
    assert report.trials[0].summary in (tmp_path / "found" / "report.html").read_text()


def test_values_have_the_type_of_their_argument(tmp_path):
    space = LayerSpace(recipe_of(tmp_path, space={"bits": [4.0], "int.symmetric": [True, False]}))
    assert [str(space.chain_of(choice).links[1]) for choice in space.choices] == [
        "int(bits=4, group=16, symmetric=true)", "int(bits=4, group=16)",
    ]  # fmt: skip
    assert isinstance(arguments(space.chain_of(space.choices[0]).links[1])["bits"], int)


def test_the_next_rung_holds_a_third(tmp_path):
    space = LayerSpace(recipe_of(tmp_path, trials=4, rungs=[1, 2, 4], start="none"))
    assert space.fixed([]) == []

    def trial(number: int, quality: float, nbytes: float, rung: int = 0, state: str = "complete") -> Trial:
        values = {"quality": quality, "nbytes": nbytes} if state == "complete" else {}
        return Trial(
            number=number, state=state, rung=rung, params={"n": number}, values=values, seconds=1, ended=1, recipe={}
        )

    first = [trial(0, 0.5, 10), trial(1, 0.6, 12), trial(2, 0.4, 11), trial(3, 0, 0, state="failed")]
    assert space.fixed(first[:3]) == []
    second = space.fixed(first)
    assert [each.key for each in second] == ["rung 1 of trial 0", "rung 1 of trial 1"]
    assert [each.candidate.rung for each in second] == [1, 1]
    third = space.fixed([*first, trial(4, 0.5, 10, 1), trial(5, 0.7, 9, 1)])
    assert [each.key for each in third][2:] == ["rung 2 of trial 5"]


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"budget": {"bits_per_weight": 1.0}}, SearchError, r"smallest assignment has .* and the largest"),
    ({"budget": {"nbytes": 10**9}}, SearchError, r"smallest assignment has .* and the largest"),
    ({"space": {"bits": [4], "width": [1]}}, SearchError, "a link width with the argument"),
    ({"space": {"lora.rank": [4]}}, SearchError, "argument rank"),
    ({"space": {"bits": []}}, RecipeError, "bits"),
    ({"space": {"bits": [4, 8, 4]}}, RecipeError, "each value must be named once"),
    ({"space": {"bits": [4.5]}}, ChainError, r"search.space with bits 4.5"),
    ({"space": {"int.symmetric": ["yes"]}}, ChainError, r"search.space with int.symmetric"),
    ({"space": {}}, RecipeError, "space"),
    ({"space": {"int.group": [7]}}, ChainError, "group"),
    ({"rungs": [2, 8]}, SearchError, "the training of the recipe has 4 steps"),
    ({"proxy": "super"}, SearchError, "proxy"),
    ({"fixed": {"nowhere": CHAIN}}, DovetailError, "nowhere"),
    ({"fixed": {"all-linear": CHAIN}}, SearchError, "every target"),
    ({"objectives": ["accuracy"]}, RecipeError, "objectives"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_loaded(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        dovetail.search(recipe_of(tmp_path, **changes), output=tmp_path / "out", progress=False)
    assert not list(tmp_path.glob("out*"))


def test_chains_that_cannot_be_searched(tmp_path):
    for chain, message in [("lora(r=4)", "a quantizer with the argument bits"), ("nf4 >> lora >> regrid", "bits"),
                           ("lora >> magnitude(0.5) >> lora >> remask", "2 stages")]:  # fmt: skip
        given = recipe_of(tmp_path).model_dump(mode="json") | {"chain": chain}
        with pytest.raises(SearchError, match=message):
            LayerSpace(Recipe.parse(given))


def test_units():
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)
    targets = find_targets(model)
    assert [unit.name for unit in units(model, targets, "block")] == ["model.layers.0", "model.layers.1"]
    fused = units(model, targets, "fused")
    assert [unit.name for unit in fused[:4]] == [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj", "model.layers.0.mlp.down_proj",
    ]  # fmt: skip
    assert [layer for unit in fused for layer in unit.layers] == [target.name for target in targets]
    assert len(units(model, targets, "layer")) == 14
    with pytest.raises(SearchError, match="without a role"):
        units(model, find_targets(model, "lm_head"), "fused")
