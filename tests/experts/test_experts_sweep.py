"""Sweeps: every point is scored, the best one wins, and those that fall out of the race deserve it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail import experts
from dovetail.checkpoint.adapter import parameters_of
from dovetail.compression.apply import apply
from dovetail.errors import DataError
from dovetail.experts.live.activate import activate, deactivate
from dovetail.experts.sources import task_vector
from dovetail.experts.sweeping import ALPHAS, DENSITIES, Score, Sweep, behind, default_alpha, scorer, sweep
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from small_models import llama, make_tokenizer


def vector() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(500, generator=generator)}


def test_every_point_is_scored_and_the_best_wins():
    seen = []

    def score(expert: experts.Expert) -> float:
        seen.append((expert.density, expert.alpha))
        return -abs(expert.alpha - 4) - abs(expert.density - 0.2)

    found = sweep(vector(), score)
    assert seen == [(density, alpha) for density in DENSITIES for alpha in ALPHAS]
    assert [(p.density, p.alpha) for p in found.points] == seen
    assert (found.best.density, found.best.alpha) == (0.2, 4)
    assert not any(point.stopped for point in found.points)
    expected = experts.compress(vector(), 0.2, 4.0)
    assert found.expert.header == expected.header
    assert found.best.nbytes == expected.nbytes
    assert torch.equal(found.expert.dense()["a"], expected.dense()["a"])


def test_of_equals_the_lowest_density_and_then_the_middle_alpha():
    found = sweep(vector(), lambda expert: min(expert.alpha, 3), densities=(0.5, 0.1, 0.3), alphas=(8, 1, 4, 3))
    assert (found.best.density, found.best.alpha) == (0.1, 4)
    found = sweep(vector(), lambda expert: math.nan if expert.alpha < 5 else -1.0, scale="tensor")
    assert (found.best.density, found.best.alpha) == (0.05, 6)
    assert found.expert.header.scale == "tensor"


def accuracy(expert: experts.Expert) -> float:
    return 0.8 * math.exp(-((expert.alpha - 3) ** 2) / 8) * math.exp(-((expert.density - 0.2) ** 2))


def race(seed: int, certainty: float = 0.99) -> tuple[Sweep, int]:
    """Records that are right by chance; the same luck for all points, as on the same records."""
    luck = np.random.default_rng(seed).random(256)
    used = 0

    def of(expert: experts.Expert, first: int, last: int) -> list[float]:
        nonlocal used
        used += 16 * (last - first)
        own = np.random.default_rng([seed, int(10 * expert.alpha), int(100 * expert.density)]).random(256)
        right = 0.5 * luck + 0.5 * own < accuracy(expert)
        return [float(right[16 * part : 16 * part + 16].mean()) for part in range(first, last)]

    return sweep(vector(), Score(of, (16,) * 16, "accuracy"), certainty=certainty), used


def test_the_hopeless_fall_out_and_the_best_does_not():
    for seed in range(5):
        found, used = race(seed)
        whole, everything = race(seed, 1.0)
        assert everything == 45 * 256
        assert used < 0.7 * everything
        assert found.best == whole.best
        kept = {(p.density, p.alpha): p for p in whole.points}
        for point in found.points:
            assert point.stopped == (point.records < 256)
            if point.stopped:  # behind by more than 16 records' worth in the end, too
                assert kept[point.density, point.alpha].score < whole.best.score - 0.03
        assert sum(point.records for point in found.points) == used


def test_behind_is_more_than_chance():
    alike = [0.5, 0.4, 0.6, 0.5]
    assert not behind(alike, alike, 0.99)
    assert not behind([0.0] * 3, [1.0] * 3, 0.99)  # three parts prove nothing
    assert behind([0.1] * 8, [0.5] * 8, 0.99)
    assert not behind([0.1] * 8, [0.5] * 8, 1.0)
    assert not behind([0.5, 0.3] * 4, [0.3, 0.6] * 4, 0.99)
    assert behind([-math.inf] * 4, alike, 0.99)
    assert not behind([math.nan] * 4, [math.nan] * 4, 0.99)
    random, wrong = np.random.default_rng(0), 0
    for _ in range(1000):  # equals are taken for worse in at most 1 of 100
        one, two = random.random((2, 8, 16)) < 0.7
        wrong += behind(one.mean(1).tolist(), two.mean(1).tolist(), 0.99)
    assert wrong <= 10


def test_grids_and_certainty_are_checked():
    for keywords in ({"densities": ()}, {"alphas": []}, {"certainty": 0.2}, {"densities": (2.0,)}, {"alphas": (-1,)}):
        with pytest.raises(DataError):
            sweep(vector(), lambda expert: 0.0, **keywords)  # type: ignore[arg-type]


def test_plot(tmp_path):
    from PIL import Image

    path = race(0)[0].plot(tmp_path / "sweep.png", original=0.7)
    with Image.open(path) as picture:
        assert picture.size == (1260, 690)
    odd = sweep(vector(), lambda expert: math.nan if expert.alpha != 4 else 0.5)
    assert odd.plot(tmp_path / "odd.png").stat().st_size > 1000


def test_without_a_finite_score_nothing_is_best():
    with pytest.raises(DataError, match="no finite score at"):
        sweep(vector(), lambda expert: math.nan)


def records() -> list[dict[str, str]]:
    words = ["one", "two", "three", "four"]
    return [{"prompt": f"sum of {a} plus {b} is", "answer": f" {a}"} for a in words for b in words] * 5


def test_scores_of_a_task_are_those_of_its_evaluation():
    model, tokenizer = llama(), make_tokenizer()
    apply(model, "lora(r=2)")
    with torch.no_grad():
        for tensor in parameters_of(model).values():
            tensor.normal_(0, 0.3)
    tuned = task_vector(model)
    expert = experts.compress(tuned, 0.3, 1.0)
    activate(model, expert)
    deactivate(model)  # the links are at their initial values now
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = Task("copy", "generation", "exact_match", {"validation": records(), "test": records()[:20]})
    score = scorer(model, tokenizer, task, limit=70)
    assert score.sizes == (18, 18, 17, 17)
    assert score.metric == "exact_match"
    parts = score.of(expert, 0, 4)
    activate(model, expert)
    whole = evaluate(model, tokenizer, records()[:70], progress=False)["data"]["exact_match"]
    assert sum(a * b for a, b in zip(parts, score.sizes, strict=True)) / 70 == pytest.approx(whole)
    deactivate(model)

    texts = Task("texts", "text", "perplexity", {"validation": [{"text": record["prompt"]} for record in records()]})
    found = sweep(tuned, scorer(model, tokenizer, texts), densities=(0.1, 0.5), alphas=(0.5, 1, 8))
    assert len(found.points) == 6
    activate(model, found.expert)
    nats = evaluate(model, tokenizer, texts, split="validation", progress=False)["texts"]["nats_per_token"]
    assert found.best.score == pytest.approx(-nats, rel=1e-3)
    assert found.best.records == 80
    deactivate(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(DataError, match="limit"):
        scorer(model, tokenizer, task, limit=0)
    with pytest.raises(DataError, match="train"):
        scorer(model, tokenizer, task, split="train")


def test_the_default_rule():
    assert default_alpha(65_000_000_000, 0.05) == default_alpha(13_000_000_000, 0.2) == 1.0
    assert default_alpha(13_000_000_000, 0.3) is None
    assert default_alpha(7_000_000_000, 0.05) is None
