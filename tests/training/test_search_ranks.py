"""Hill climbing on toy objectives that can be brute-forced, and the search over ranks, alone and in a run."""

from __future__ import annotations

import itertools
import json
import math
from random import Random

import pytest
import torch

import dovetail
import dovetail.runs.steps as steps
from dovetail.chains.layer.elastic import draw_ranks, groups, ranks
from dovetail.checkpoint.adapter import load_adapter
from dovetail.checkpoint.load import load
from dovetail.errors import DataError, RecipeError, SearchError
from dovetail.runs.flow import run
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from dovetail.searches import hill_climb, proxy_task, search_ranks
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.training.rank_search import sample_neighbours
from small_models import SUMS, llama, make_tokenizer, quiet
from small_runs import small_recipe

CHOICES = [(8, 6, 4, 2), (3, 2, 1), (5,), (9, 7, 5, 3, 1)]
SPACE = set(itertools.product(*CHOICES))
START = (4, 2, 5, 5)


def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Groups that differ, or infinity where one is further than the next entry of its list."""
    steps = [abs(c.index(x) - c.index(y)) for x, y, c in zip(a, b, CHOICES, strict=True)]
    return sum(steps) if max(steps) <= 1 else 99


def neighbourhood(anchor: tuple[int, ...], step: int) -> set[tuple[int, ...]]:
    return {other for other in SPACE if 1 <= distance(anchor, other) <= step}


class Toy:
    """An objective with one peak, whose calls are counted."""

    def __init__(self, peak: tuple[int, ...]) -> None:
        self.peak, self.calls = peak, []

    def __call__(self, configuration: tuple[int, ...]) -> float:
        self.calls.append(configuration)
        return -float(sum(abs(a - b) for a, b in zip(configuration, self.peak, strict=True)))


def climb(objective, *, turns: int, count: int, step: int, seed: int = 0):
    random = Random(seed)
    return hill_climb(
        START,
        lambda anchor, visited: sample_neighbours(anchor, CHOICES, count, step, visited, random),
        objective,
        turns,
    )


# ---- neighbours


@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_neighbours_are_all_there_are_and_never_visited_ones(step):
    wanted = neighbourhood(START, step)
    random = Random(1)
    assert set(sample_neighbours(START, CHOICES, 1000, step, set(), random)) == wanted
    visited: set[tuple[int, ...]] = set()
    while more := sample_neighbours(START, CHOICES, 3, step, visited, random):
        assert len(set(more)) == len(more) <= 3
        assert len(more) == min(3, len(wanted - visited))
        assert visited.isdisjoint(more)
        assert wanted.issuperset(more)
        visited.update(more)
    assert visited == wanted


def test_a_group_of_one_rank_never_moves():
    assert sample_neighbours((5,), [(5,)], 4, 2, set(), Random(0)) == []


# ---- hill climbing


def test_it_is_algorithm_1():
    """Against the algorithm written down again: the same anchors, the same evaluations in the same order."""
    for seed in range(20):
        objective = Toy((8, 1, 5, 9))
        found = climb(objective, turns=6, count=3, step=2, seed=seed)
        random, anchor, visited, turns = Random(seed), START, {START}, [[START]]
        again = Toy((8, 1, 5, 9))
        for _ in range(6):
            candidates = sample_neighbours(anchor, CHOICES, 3, 2, visited, random)
            if not candidates:
                break  # the anchor would stay where it is
            visited |= set(candidates)
            best = max(candidates, key=again)
            if again(best) > again(anchor):
                anchor = best
            turns.append(candidates)
        assert objective.calls == [c for turn in turns for c in turn]
        assert found.best.configuration == anchor
        assert [e.turn for e in found.history] == [t for t, turn in enumerate(turns) for _ in turn]


def test_nothing_is_evaluated_twice_and_no_more_than_is_allowed():
    objective = Toy((2, 3, 5, 1))
    found = climb(objective, turns=10, count=4, step=2)
    assert len(set(objective.calls)) == len(objective.calls) <= 1 + 10 * 4
    assert [e.configuration for e in found.history] == objective.calls
    assert found.history[0].configuration == START
    assert found.best.score == max(e.score for e in found.history)


@pytest.mark.parametrize("peak", [(8, 3, 5, 9), (2, 1, 5, 1), (4, 2, 5, 5), (6, 1, 5, 3)])
def test_with_enough_turns_it_finds_the_brute_forced_best(peak):
    objective = Toy(peak)
    found = climb(objective, turns=100, count=8, step=2)
    assert found.best.configuration == max(SPACE, key=Toy(peak))
    assert found.best.score == 0


def test_it_ends_where_no_neighbour_is_left():
    flat = Toy(START)
    found = climb(flat, turns=1000, count=5, step=1)
    assert set(flat.calls) == neighbourhood(START, 1) | {START}
    assert found.best.configuration == START


def test_the_answer_is_never_worse_than_the_start_and_moves_for_better_scores_only():
    for seed in range(50):
        random = Random(seed)
        scores = {configuration: random.choice([0.0, 0.5, 1.0, math.nan]) for configuration in sorted(SPACE)}
        found = climb(scores.__getitem__, turns=5, count=4, step=2, seed=seed)
        start = scores[START]
        assert math.isnan(start) or found.best.score >= start
        if found.best.configuration != START:
            assert math.isnan(start) or found.best.score > start
        best = [e for e in found.history if e.score == found.best.score]
        assert found.best in best
    found = climb(lambda _: 1.0, turns=5, count=4, step=2)
    assert found.best.configuration == START


# ---- ranks


TEXT = "lora(r=6, elastic=[6, 4, 2])"


@pytest.fixture(scope="module")
def trained():
    model = dovetail.apply(llama(), TEXT)
    quiet(model, SUMS, max_steps=30, lr_scale=20)
    return model


def test_the_model_is_left_at_the_best_ranks(trained):
    model, tokenizer = trained, make_tokenizer()
    task = Task("sums", "text", "perplexity", {"validation": [
        {"text": record["prompt"] + record["answer"]} for record in SUMS.split("validation")
    ]})  # fmt: skip
    draw_ranks(groups(model), "whatever it runs at")
    found = search_ranks(model, tokenizer, task, turns=3, neighbours=4, step=3, samples=12, progress=False)
    assert found.best < found.start  # a perplexity: smaller is better, and some other ranks fit better than these
    assert ranks(model) == found.ranks
    assert set(found.ranks.values()) <= {6, 4, 2}
    proxy = proxy_task(task, "validation", 12, 0)
    assert len(proxy.split("validation")) == found.samples == 12
    assert evaluate(model, tokenizer, proxy, split="validation", progress=False)["sums"]["perplexity"] == found.best
    assert found.evaluations == len(found.history) == 1 + 3 * 4
    assert found.history[0] == (0, dict.fromkeys(found.ranks, 4), found.start)
    assert found.best == min(score for _, _, score in found.history)
    again = search_ranks(model, tokenizer, task, turns=3, neighbours=4, step=3, samples=12, progress=False)
    assert again == found
    other = search_ranks(model, tokenizer, task, turns=3, neighbours=4, step=3, samples=12, seed=1, progress=False)
    assert other.history != found.history


@pytest.mark.parametrize("seed", range(2))
def test_best_is_at_least_the_start(trained, seed):
    found = search_ranks(trained, make_tokenizer(), SUMS, turns=3, neighbours=4, samples=10, seed=seed, progress=False)
    assert found.best >= found.start
    assert (found.metric, found.split) == ("exact_match", "validation")


def test_refusals_leave_the_ranks_as_they_were(trained, monkeypatch):
    before = ranks(trained)
    for name in ("turns", "neighbours", "step", "samples"):
        with pytest.raises(SearchError, match=f"{name}=0"):
            search_ranks(trained, make_tokenizer(), SUMS, progress=False, **{name: 0})
    with pytest.raises(SearchError, match="no elastic adapter"):
        search_ranks(dovetail.apply(llama(), "lora(r=4)"), make_tokenizer(), SUMS, progress=False)
    without = Task("sums", "generation", "exact_match", {"train": SUMS.split("train")})
    with pytest.raises(DataError, match="validation"):
        search_ranks(trained, make_tokenizer(), without, progress=False)
    count = itertools.count()

    def stops(*args, **kwargs):
        if next(count) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("dovetail.training.rank_search.evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        search_ranks(trained, make_tokenizer(), SUMS, samples=5, progress=False)
    assert ranks(trained) == before


# ---- in a run

CHAIN = "wanda(0.5) >> int(bits=4, group=32) >> lora(r=6, elastic=[6, 4, 2]) >> remask >> regrid"
SEARCH = {"turns": 2, "neighbours": 2, "samples": 8, "split": "train"}


def recipe_of(tmp_path, **changes):
    return small_recipe(tmp_path, **{"chain": CHAIN, "search": SEARCH, **changes})


def test_a_run_searches_before_it_merges(tmp_path):
    recipe = recipe_of(tmp_path)
    report = run(recipe, output=tmp_path / "run", progress=False)
    assert [row.name for row in report.stages] == ["base", "pruned", "quantized", "tuned", "searched", "merged"]
    search = report.search
    assert search is not None
    assert search.start is not None
    assert search.best is not None
    assert search.best >= search.start
    assert (search.metric, search.split, search.samples) == ("exact_match", "train", 8)
    assert report.merge is not None
    assert report.merge.exact
    assert report.row("merged").metrics == report.row("searched").metrics
    assert Report.load(tmp_path / "run") == report
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    history = [line for line in lines if line["event"] == "search"]
    assert len(history) == search.evaluations
    assert history[0]["turn"] == 0
    assert max(line["exact_match"] for line in history) == search.best
    assert search.ranks in [line["ranks"] for line in history]
    assert "search over ranks" in (tmp_path / "run" / "report.html").read_text()
    model, _ = load(tmp_path / "base")
    assert ranks(load_adapter(model, tmp_path / "run" / "adapter")) == search.ranks
    assert not (tmp_path / "run" / "training").exists()
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").search == Recipe.parse(recipe).search


def test_a_killed_run_remembers_its_ranks(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    expected = run(recipe, output=tmp_path / "whole", progress=False)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    for where in ("dovetail.runs.steps.search_ranks", "dovetail.runs.flow.merge"):
        with monkeypatch.context() as patch:
            patch.setattr(where, killed)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, output=tmp_path / "run", progress=False)
    assert (tmp_path / "run.partial" / "training" / "ranks.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(steps, "search_ranks", None)  # not to be searched again
        report = run(recipe, output=tmp_path / "run", progress=False)
    assert report.search == expected.search
    assert report.merge == expected.merge
    assert [(row.name, row.metrics) for row in report.stages] == [(row.name, row.metrics) for row in expected.stages]


@pytest.mark.parametrize("text", ["lora(r=4)", "lora(r=4, elastic=[4, 2]) >> magnitude(0.5)"])
def test_a_search_without_elastic_ranks_in_the_last_stage_is_refused(tmp_path, text):
    recipe = {"model": "there/is/none", "chain": text, "data": "word_problems", "search": {}}
    with pytest.raises(RecipeError, match=r"search\n.*found: chain"):
        run(recipe, output=tmp_path / "run", progress=False)  # before anything is loaded
    assert not (tmp_path / "run.partial").exists()


def test_search_in_recipes(tmp_path):
    base = {"model": "playground", "chain": TEXT, "data": "word_problems"}
    assert Recipe.parse(base).search is None
    search = Recipe.parse(base | {"search": {}}).search
    assert search is not None
    assert search.model_dump() == {"kind": "ranks", "turns": 10, "neighbours": 8, "step": 2, "samples": 100,
                                   "split": "validation"}  # fmt: skip
    for bad, message in [({"turns": 0}, "turns"), ({"turn": 3}, "did you mean turns"), (True, "search"), (5, "search"),
                         ({"split": "test"}, "split"), ({"kind": "rank"}, "layers, chains or ranks"),
                         ({"kind": "layers", "trial": 3}, "did you mean trials"),
                         ({"kind": 3}, "layers, chains or ranks"),
                         ({"kind": "layers", "rungs": [60, 60]}, "must rise"), ({"kind": "chains"}, "search.prefix"),
                         ({"kind": "layers", "budget": {"bits": 4}}, "bits_per_weight")]:  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            Recipe.parse(base | {"search": bad})
    assert Recipe.parse({"model": "playground", "data": "word_problems", "search": {"kind": "chains"}}).chain == ""
    with pytest.raises(RecipeError, match="chain must not be empty"):
        Recipe.parse(base | {"chain": ""})
    with pytest.raises(RecipeError, match="dovetail search"):
        run(base | {"search": {"kind": "layers"}}, output=tmp_path / "run", progress=False)
    with pytest.raises(DataError, match="validation"):  # before anything is loaded or written
        run(recipe_of(tmp_path, search={}) | {"model": "there/is/none"}, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run.partial").exists()


def test_public_names():
    assert dovetail.search_ranks is search_ranks
    assert torch.is_tensor(dovetail.extract(dovetail.apply(llama(), TEXT)).lm_head.weight)
