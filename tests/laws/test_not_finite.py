"""A score that is not finite never wins, is never the best, and is named; so are weights that are not finite.

In a search, a sweep or a study the best is the best of the finite ones, and where there is none, that is an error. A
footprint of weights that are not finite names their layer.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch

import dovetail
from dovetail import experts
from dovetail.errors import DataError, DovetailError, SearchError
from dovetail.experts.sweeping import sweep
from dovetail.models.targets import find_targets
from dovetail.runs.report.record import finite
from dovetail.studies.report import Spread
from dovetail.studies.verify import _lossless
from dovetail.training.hill_climb import hill_climb
from dovetail.training.rank_search import search_ranks
from families import batch, make
from small_models import llama, make_tokenizer, sum_records

ODD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("seed", range(12))
def test_a_climb_ends_on_the_best_finite_score(seed: int) -> None:
    random = Random(seed)
    scores = [random.choice([*ODD, random.random()]) for _ in range(30)]
    found = hill_climb(15, lambda _, visited: [n for n in range(30) if n not in visited], scores.__getitem__, 5)
    sound = [score for score in scores if math.isfinite(score)]
    assert found.best.score == max(sound)
    assert not any(math.isnan(each.score) or each.score == math.inf for each in found.history)


@pytest.mark.parametrize("seed", range(8))
def test_a_sweep_ends_on_the_best_finite_score(seed: int) -> None:
    random, told = Random(seed), {}
    vector = {"a": torch.randn(64, 8, generator=torch.Generator().manual_seed(0))}

    def score(expert: experts.Expert) -> float:
        value = random.choice([*ODD, random.random()])
        told[value] = value
        return value

    found = sweep(vector, score, densities=(0.1, 0.3), alphas=(1, 2, 4, 8, 16), certainty=1)  # type: ignore[arg-type]
    assert found.best.score == max(value for value in told if math.isfinite(value))
    with pytest.raises(DataError, match="no finite score at 2 points"):
        sweep(vector, lambda _: ODD[seed % 3], densities=(0.1,), alphas=(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("metric", ["exact_match", "perplexity"])
def test_a_search_over_ranks_needs_a_finite_score(metric: str, odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dovetail.apply(llama(), "lora(r=4, elastic=[4, 2, 1])")
    kind = "generation" if metric == "exact_match" else "text"
    records = sum_records(8) if kind == "generation" else [{"text": "one plus two"}] * 8
    task = dovetail.Task("task", kind, metric, {"validation": records})
    values: list[float] = []
    monkeypatch.setattr("dovetail.training.rank_search.evaluate", lambda *_, **__: {"task": {metric: values.pop(0)}})

    def search(scores: list[float]) -> Any:
        values[:] = scores
        return search_ranks(model, make_tokenizer(), task, turns=1, neighbours=3, progress=False)

    before = dovetail.chains.layer.elastic.ranks(model)
    with pytest.raises(SearchError, match=f"no finite {metric} at 4 configurations"):
        search([odd] * 4)
    assert dovetail.chains.layer.elastic.ranks(model) == before
    assert search([odd, odd, 0.5, odd]).best == 0.5
    assert search([0.5, odd, odd, odd]).best == 0.5


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("text", ["", "lora(r=4)", "magnitude(0.5) >> lora(r=4) >> remask"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_footprint_names_the_layer(family: str, text: str, odd: float) -> None:
    model = make(family)
    targets = find_targets(model)
    name = targets[len(targets) // 2].name
    if text:
        dovetail.apply(model, text, calibration=[batch(model)])
    assert math.isfinite(dovetail.footprint(model).nonzero_fraction)
    with torch.no_grad():
        weight: Any = model.get_submodule(name).weight
        weight[0, 0] = odd
    with pytest.raises(DovetailError, match=name.replace(".", r"\.")):
        dovetail.footprint(model)


@pytest.mark.parametrize("odd", ODD)
def test_a_study_has_no_mean_and_no_lossless_merge_of_what_is_not_finite(odd: float) -> None:
    assert finite(odd) is None
    for values in ([odd], [0.5, odd], [odd, 0.5, 0.25]):
        assert (Spread.of(values).mean, Spread.of(values).sd) == (None, None)
    merged: Any = dovetail.MergeReport(True, 0.0, odd, 0.5, 0.5, 0, 0.0, dovetail.footprint(make("llama")))
    assert _lossless(merged).mergeable is False
