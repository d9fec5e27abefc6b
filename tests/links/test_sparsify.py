"""Pruners: exact counts, masks by the reference formulas, patterns, scores by registration, allocation over layers."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import math
import pickle
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Link, Site
from dovetail.chains.registry import _REGISTERED as REGISTRY
from dovetail.chains.registry import links
from dovetail.chains.statistics import InputStatistics
from dovetail.errors import ChainError, DovetailError
from dovetail.links.prune import Magnitude, Ria, ScoredPruner, Wanda
from dovetail.links.prune.allocation import allocate, outlier_ratio
from dovetail.links.prune.ria import ria_scores
from dovetail.links.prune.select import keep_pattern, keep_top
from dovetail.links.prune.wanda import wanda_scores
from families import batch, make
from places import ROOT
from tolerance import assert_near

SPARSITIES = [0.0, 0.3, 0.5, 0.55, 0.999]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(x: Tensor) -> InputStatistics:
    found = InputStatistics(x.shape[1], {"norm"}, dtype=x.dtype, device=x.device)
    found.add(x)
    found.finish()
    return found


def keep_of(text: str, weight: Tensor, x: Tensor | None = None) -> Tensor:
    (link,) = dovetail.chain(text)
    assert isinstance(link, ScoredPruner)
    keep, after = link.prune(weight, None if x is None else statistics(x))
    assert after is weight
    return keep


def chained(text: str) -> nn.Module:
    """A layer of 24 x 32 under a chain, calibrated on 50 inputs."""
    model = nn.Sequential(nn.Linear(32, 24))
    with torch.no_grad():
        model[0].weight.copy_(randn(24, 32))
    return dovetail.apply(model, text, targets="0", calibration=[{"input": randn(50, 32, seed=1)}])[0]


def by_sort(scores_gn: Tensor, zeros: int) -> Tensor:
    """The definition: in a stable sort of each row the first `zeros` go."""
    keep = torch.ones_like(scores_gn, dtype=torch.bool)
    keep.scatter_(1, torch.sort(scores_gn, dim=1, stable=True).indices[:, :zeros], False)
    return keep


def rows_of_scores() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    pick = random.Random(0)
    for _ in range(150):
        shape = (pick.choice([1, 2, 7]), pick.choice([1, 2, 3, 8, 50, 301]))
        scores = torch.randn(shape, generator=generator).to(pick.choice([torch.float64, torch.float32, torch.bfloat16]))
        match pick.randrange(5):
            case 0:  # many ties
                scores = scores.round()
            case 1:
                scores = torch.full_like(scores, pick.choice([0.0, 1.0, math.inf]))
            case 2:  # infinities, zeros of both signs
                scores[scores > 1] = math.inf
                scores[(scores > 0) & (scores < 0.3)] = 0.0
                scores[(scores > -0.3) & (scores < 0)] = -0.0
            case 3:  # half of it zero, as after another pruner
                scores = scores.abs() * (scores > 0)
        yield scores


def test_keep_top_is_the_stable_sort() -> None:
    for scores in rows_of_scores():
        n = scores.shape[1]
        for sparsity in (*SPARSITIES, 0.01, 0.75, 1 - 1 / n, 1 - 1e-9):
            keep = keep_top(scores, sparsity)
            assert keep.dtype == torch.bool
            assert torch.equal(keep, by_sort(scores, round(sparsity * n)))


def test_keep_top_takes_no_longer_on_sorted_rows() -> None:
    falling = torch.arange(3_000_000, 0, -1, dtype=torch.float32)[None]  # torch.kthvalue alone: minutes
    start = time.process_time()
    assert int(keep_top(falling, 0.6).sum()) == 1_200_000
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 16), (31, 64), (63, 64)])
def test_keep_pattern_is_the_stable_sort_of_each_window(n: int, m: int) -> None:
    for scores in (randn(6, 4 * m), randn(6, 4 * m).round(), torch.zeros(3, m), randn(4, m).t().reshape(2, -1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            wanted = by_sort(scores.to(dtype).reshape(-1, m), m - n).view_as(scores)
            assert torch.equal(keep_pattern(scores.to(dtype), n, m), wanted)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_the_zeros_are_counted_exactly(method: str, sparsity: float) -> None:
    weight, x = randn(24, 40), randn(50, 40, seed=1)
    whole = keep_of(f"{method}({sparsity}, per=layer)", weight, x)
    assert int((~whole).sum()) == round(sparsity * weight.numel())
    rows = keep_of(f"{method}({sparsity}, per=row)", weight, x)
    assert (~rows).sum(1).tolist() == [round(sparsity * 40)] * 24


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 20)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_every_window_of_a_pattern_has_n_weights_that_are_not_zero(method: str, n: int, m: int) -> None:
    weight, x = randn(24, 40), randn(50, 40, seed=1)
    text = f'{method}(pattern="{n}:{m}")'
    kept = weight * keep_of(text, weight, x)
    assert bool(((kept != 0).view(24, -1, m).sum(2) == n).all())
    (link,) = dovetail.chain(text)
    assert isinstance(link, ScoredPruner)
    assert link.sparsity == 1 - n / m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_is_its_reference_formula(dtype: torch.dtype) -> None:
    weight, x = randn(64, 96).to(dtype), randn(200, 96, seed=1) * randn(96, seed=2).exp()
    norm = statistics(x).norm_i
    assert_near(norm, x.double().norm(dim=0), terms=len(x))
    score = weight.abs().float() * norm.reshape(1, -1)
    assert torch.equal(wanda_scores(weight, norm), score)
    gone = torch.zeros(64, 96, dtype=torch.bool)
    gone.scatter_(1, torch.sort(score, dim=-1, stable=True)[1][:, :48], True)
    assert torch.equal(keep_of("wanda(0.5)", weight, x), ~gone)
    for start in range(0, 96, 4):  # 2:4, window by window
        window = score[:, start : start + 4]
        gone.scatter_(1, torch.arange(96).expand(64, 96)[:, start : start + 4], False)
        gone.scatter_(1, start + torch.topk(window, 2, dim=1, largest=False)[1], True)
    if dtype == torch.float32:  # topk leaves ties open
        assert torch.equal(keep_of('wanda(pattern="2:4")', weight, x), ~gone)


def test_magnitude_is_its_reference_formula() -> None:
    weight = randn(20, 30)
    threshold = weight.abs().flatten().sort().values[round(0.3 * 600)]
    assert torch.equal(keep_of("magnitude(0.3)", weight), weight.abs() >= threshold)
    assert torch.equal(Magnitude(0.5).prune(weight.double(), None)[0], keep_of("magnitude(0.5)", weight))


def test_ria_is_its_reference_formula() -> None:
    weight, norm = randn(12, 16), randn(16, seed=1).abs()
    score = torch.empty(12, 16, dtype=torch.float64)
    wide = weight.double()
    for o in range(12):
        for i in range(16):
            size = wide[o, i].abs()
            relative = size / wide[:, i].abs().sum() + size / wide[o].abs().sum()
            score[o, i] = relative * norm[i].double() ** 0.5
    assert_near(ria_scores(weight, norm), score, terms=16)
    weight[3], weight[:, 5] = 0, 0
    scores = ria_scores(weight, norm)
    assert bool(torch.isfinite(scores).all())
    assert torch.equal(scores == 0, weight == 0)


def test_links_are_copied_pickled_and_changed() -> None:
    for link in (Wanda(0.4, allocation="outlier"), Magnitude(0.3, per="row"), Ria(pattern="1:4"), Wanda()):
        assert pickle.loads(pickle.dumps(link)) == copy.deepcopy(link) == copy.copy(link) == link
        assert dovetail.chain(str(link)).links == (link,)
        assert dataclasses.replace(link) == link
    assert dataclasses.replace(Wanda(0.4, allocation="outlier"), sparsity=0.31) == Wanda(0.31, allocation="outlier")
    assert str(Wanda(pattern="2:4")) == 'wanda(0.5, pattern="2:4")'
    assert str(Magnitude(pattern="1:4")) == 'magnitude(0.75, pattern="1:4")'
    assert Wanda(0.667, pattern="1:3").sparsity == 1 - 1 / 3
    assert Magnitude().per == "layer"
    assert Wanda().per == "row"


BAD = [
    ("wanda(1.0)", ["sparsity=1.0", "[0, 1)"]),
    ("ria(-0.1)", ["sparsity=-0.1", "[0, 1)"]),
    ("wanda(pattern=4)", ["pattern=4", "valid string"]),
    ("wanda(pattern='4')", ["pattern='4'", "N:M with 1 <= N < M <= 64", 'pattern="2:4"']),
    ("wanda(pattern='0:4')", ["pattern='0:4'", "1 <= N < M"]),
    ("wanda(pattern='4:4')", ["pattern='4:4'", "1 <= N < M"]),
    ("wanda(pattern='2:128')", ["pattern='2:128'", "M <= 64"]),
    ("wanda(pattern='2:4 ')", ["pattern='2:4 '"]),
    ("wanda(pattern='-2:4')", ["pattern='-2:4'"]),
    ("wanda(0.3, pattern='2:4')", ['sparsity=0.3, pattern="2:4"', "1 - 2/4 = 0.5", "leave sparsity out"]),
    ("wanda(0.75, pattern='2:4')", ['sparsity=0.75, pattern="2:4"', 'leave sparsity out, or pattern="1:4"']),
    ("wanda(pattern='2:4', allocation=outlier)", ["allocation=outlier", "same sparsity", "remove one of the two"]),
    ("wanda(per=column)", ["per=column", "'layer' or 'row'"]),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=[text for text, _ in BAD])
def test_bad_arguments_are_refused(text: str, words: list[str]) -> None:
    with pytest.raises(ChainError) as caught:
        dovetail.chain(text)
    for word in words:
        assert word in str(caught.value)


def test_bad_words_are_refused_in_python_too() -> None:
    with pytest.raises(ChainError, match="allocation must be uniform or outlier"):
        Magnitude(0.3, "row")  # type: ignore[arg-type]  # the second argument is not per
    with pytest.raises(ChainError, match="per must be layer or row"):
        Magnitude(0.3, per="column")  # type: ignore[arg-type]


def test_a_pattern_that_does_not_divide_the_inputs_is_refused_by_layer() -> None:
    with pytest.raises(ChainError) as caught:
        Wanda(pattern="8:16").check(Site("model.up", 24, 1000))
    assert str(caught.value) == (
        "wanda at model.up\n"
        '  found: in_features=1000, pattern="8:16"\n'
        "  rule:  the pattern's M must divide in_features\n"
        '  fix:   pattern="10:20", or leave this layer out of the targets'
    )
    with pytest.raises(ChainError, match=r"fix:   leave this layer out of the targets"):
        Wanda(pattern="2:4").check(Site("model.up", 24, 7))
    with pytest.raises(ChainError, match="in_features=30"):
        keep_of('magnitude(pattern="2:4")', randn(4, 30))
    Wanda(pattern="2:4").check(Site("model.up", 24, 1000))
    Wanda(0.5).check(Site("model.up", 24, 7))


def test_a_pattern_is_checked_before_anything_runs() -> None:
    with pytest.raises(ChainError, match='wanda at 0\n  found: in_features=32, pattern="2:5"'):
        chained('wanda(pattern="2:5")')


def test_scores_that_are_not_finite_are_refused_with_their_cause() -> None:
    weight, x = randn(4, 8), randn(5, 8)
    bad_weight, bad_x = weight.clone(), x.clone()
    bad_weight[1, 2], bad_x[0, 3] = math.nan, math.inf
    with pytest.raises(DovetailError, match=r"1 of 32 scores are NaN or infinite, as are weights(.|\n)*checkpoint"):
        keep_of("magnitude(0.5)", bad_weight)
    with pytest.raises(DovetailError, match=r"4 of 32 scores .*, as are the layer's inputs(.|\n)*calibration"):
        keep_of("wanda(0.5)", weight, bad_x)


@pytest.fixture
def unregistered() -> Iterator[None]:
    """Links that a test registers go when it ends."""
    before = dict(links())
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.mark.usefixtures("unregistered")
def test_a_function_becomes_a_link() -> None:
    @dovetail.scoring("largest_go", per="row", calibrated=False, summary="the largest go", source="this test")
    def largest_go(weight_oi: Tensor) -> Tensor:
        """Doc."""
        return -weight_oi.abs()

    assert REGISTRY["largest_go"] is largest_go
    assert issubclass(largest_go, ScoredPruner)
    assert (largest_go.__name__, largest_go.__doc__, largest_go.summary) == ("LargestGo", "Doc.", "the largest go")
    weight = randn(4, 10)
    keep, _ = largest_go(0.3).prune(weight, None)
    assert torch.equal(keep, weight.abs() <= weight.abs().sort(1).values[:, 6:7])
    assert pickle.loads(pickle.dumps(largest_go(0.3))) == largest_go(0.3)
    layer = chained("largest_go(0.25) >> lora(r=3) >> remask")
    assert (layer.effective_weight()[0] == 0).sum(1).tolist() == [8] * 24
    assert str(largest_go(pattern="2:4") >> REGISTRY["remask"]()) == 'largest_go(0.5, pattern="2:4") >> remask'
    with pytest.raises(ValueError, match="two links are called 'largest_go': LargestGo and LargestGo"):
        dovetail.scoring("largest_go", per="row", calibrated=False, summary="", source="")(largest_go.score)


@pytest.mark.usefixtures("unregistered")
def test_a_score_of_the_wrong_form_is_refused_by_name() -> None:
    def flat(weight_oi: Tensor) -> Tensor:
        return weight_oi.abs().flatten()

    def counted(weight_oi: Tensor) -> Tensor:
        return weight_oi.abs().to(torch.int64)

    def divided(weight_oi: Tensor) -> Tensor:
        return 1 / (weight_oi * 0)

    def nothing(weight_oi: Tensor) -> Any:
        weight_oi.abs()

    for score, words in (
        (nothing, "None"),
        (flat, r"scores of shape \(32,\) and type torch.float32(.|\n)*\(4, 8\)"),
        (counted, r"scores of shape \(4, 8\) and type torch.int64"),
        (divided, r"32 of 32 scores are NaN or infinite\n(.|\n)*check the function that scores divided"),
    ):
        cls = dovetail.scoring(score.__name__, per="row", calibrated=False, summary="-", source="-")(score)
        with pytest.raises(DovetailError, match=rf"{score.__name__}\n  found: {words}"):
            cls(0.5).prune(randn(4, 8), None)
    column: Any = "column"
    with pytest.raises(ChainError, match="per must be layer or row"):
        dovetail.scoring("of_columns", per=column, calibrated=False, summary="-", source="-")


@pytest.mark.usefixtures("unregistered")
def test_the_sample_score_stands_in_the_document_and_works() -> None:
    text = (ROOT / "tests/sample_scoring.py").read_text(encoding="utf-8")
    assert text.strip() in (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
    import sample_scoring

    try:
        weight, x = randn(8, 12), randn(30, 12, seed=1)
        wanted = by_sort(weight.abs() * statistics(x).norm_i.sqrt(), 6)
        assert torch.equal(keep_of("damped_wanda(0.5)", weight, x), wanted)
        layer = chained("damped_wanda(0.5) >> lora(r=8) >> remask")
        assert (layer.effective_weight()[0] == 0).sum(1).tolist() == [16] * 24
        link: Link = sample_scoring.damped_wanda(pattern="2:4")
        assert pickle.loads(pickle.dumps(link)) == link
    finally:
        del sys.modules["sample_scoring"]


def test_outlier_ratio_counts_scores_over_a_multiple_of_the_mean() -> None:
    scores = torch.ones(10, 10)
    scores[0, :4] = 100.0  # the mean is 4.96
    assert outlier_ratio(scores) == 0.04
    assert outlier_ratio(scores.bfloat16(), threshold=25) == 0.0
    assert outlier_ratio(torch.zeros(3, 3)) == 0.0


def test_allocation_keeps_the_mean_the_order_and_the_spread() -> None:
    pick = random.Random(0)
    for _ in range(300):
        layers = [f"l{number}" for number in range(pick.randint(1, 30))]
        ratios = {name: pick.choice([0.0, pick.random() ** 4, 1e-9 * pick.random()]) for name in layers}
        weights = {name: pick.randint(1, 10**7) for name in layers}
        groups = {name: f"block{pick.randrange(5)}" for name in layers if pick.random() < 0.8}
        sparsity = pick.choice([0.0, 1e-6, 0.03, 0.3, 0.5, 0.7, 0.95, 0.999, 1 - 1e-9])
        spread = pick.choice([0.0, 0.05, 0.08, 0.5])
        found = allocate(ratios, weights, groups, sparsity, spread)
        assert list(found) == layers
        mean = math.fsum(weights[name] * found[name] for name in layers) / sum(weights.values())
        assert abs(mean - sparsity) < 1e-9
        assert all(0 <= value < 1 for value in found.values())
        assert all(abs(value - sparsity) <= spread + 1e-12 for value in found.values())
        of_group: dict[str, list[str]] = {}
        for name in layers:
            of_group.setdefault(groups.get(name, name), []).append(name)
        ratio = {}
        for group, members in of_group.items():
            assert len({found[name] for name in members}) == 1
            size = sum(weights[name] for name in members)
            ratio[group] = sum(weights[name] * ratios[name] for name in members) / size
        ordered = sorted(of_group, key=lambda group: ratio[group])
        values = [found[of_group[group][0]] for group in ordered]
        assert values == sorted(values, reverse=True)


def test_allocation_reaches_the_spread_where_it_can() -> None:
    equal = dict.fromkeys("abc", 100)
    found = allocate({"a": 0.0, "b": 0.01, "c": 0.02}, equal, {}, 0.5)
    assert found == pytest.approx({"a": 0.58, "b": 0.5, "c": 0.42})
    found = allocate({"a": 0.0, "b": 0.0, "c": 0.03}, equal, {}, 0.5)  # one stands out
    assert found == pytest.approx({"a": 0.54, "b": 0.54, "c": 0.42})
    assert allocate({"a": 0.1, "b": 0.1, "c": 0.1}, equal, {"a": "x", "b": "x"}, 0.3) == dict.fromkeys("abc", 0.3)
    near_one = allocate({"a": 0.0, "b": 0.01, "c": 0.02}, equal, {}, 0.99)
    assert max(near_one.values()) == pytest.approx(0.999)
    near_zero = allocate({"a": 0.0, "b": 0.01, "c": 0.02}, equal, {}, 0.02)
    assert min(near_zero.values()) == 0.0


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_a_chain_allocates_by_block_and_keeps_the_mean(method: str) -> None:
    model = make("llama").eval()
    dovetail.apply(model, f"{method}(0.5, allocation=outlier)", calibration=[batch(model)])
    zeros, sizes = {}, {}
    for name, layer in chain_layers(model).items():
        block = name.split(".")[2]
        zeros.setdefault(block, []).append(int((layer.base.matrix() == 0).sum()))
        sizes.setdefault(block, []).append(layer.base.matrix().numel())
    total = sum(map(sum, sizes.values()))
    assert sum(map(sum, zeros.values())) == pytest.approx(0.5 * total, abs=0.002 * total)
    found = [sum(zeros[block]) / sum(sizes[block]) for block in zeros]
    assert min(found) == pytest.approx(0.42, abs=0.005)
    assert max(found) == pytest.approx(0.58, abs=0.005)


@pytest.mark.parametrize("module", ["select", "pattern", "allocation"])
def test_the_docstrings_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"dovetail.links.prune.{module}"))
    assert found.attempted
    assert not found.failed


def test_outliers_are_scores_above_five_times_their_mean() -> None:
    """OWL's threshold M = 5 (Yin et al. 2024, §4): neither 3 nor 10."""
    scores = torch.ones(1, 100)
    scores[0, :2] = torch.tensor([4.5, 6.0])  # 4.2 and 5.5 times the mean
    assert outlier_ratio(scores) == 0.01
    scores[0, :2] = torch.tensor([6.0, 12.0])  # 5.2 and 10.3 times the mean
    assert outlier_ratio(scores) == 0.02
