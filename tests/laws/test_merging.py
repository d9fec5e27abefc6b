"""Laws of merging: on masks, every method computes its dense definition; orders and factors act as they must."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dovetail import experts

law = settings(derandomize=True, deadline=None, max_examples=40)
SHAPES = {"a": (9, 15), "b": (130,), "c": ()}


@st.composite
def expert(draw: st.DrawFn) -> experts.Expert:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))  # few seeds: some experts are alike
    vector = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    density, alpha = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), draw(st.sampled_from([0.25, 1.0, 3.0]))
    return experts.compress(vector, density, alpha, draw(st.sampled_from(["vector", "tensor"])))


@st.composite
def weighted(draw: st.DrawFn) -> tuple[list[experts.Expert], list[float]]:
    them = draw(st.lists(expert(), min_size=1, max_size=6))
    weights = st.sampled_from([1.0, 0.5, -0.7, 0.0, 2.0])
    return them, draw(st.lists(weights, min_size=len(them), max_size=len(them)))


def in_order(terms: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def dense(them: Sequence[experts.Expert], name: str) -> list[Tensor]:
    return [each.dense(torch.float32)[name] for each in them]


def ties(parts: Sequence[Tensor], weights: Sequence[float], election: str) -> Tensor:
    """Mean of the weighted values whose sign is the elected one; plus where the sum is 0."""
    total = in_order([part.sign() if election == "frequency" else part for part in parts])
    elected = torch.where(total < 0, -1.0, 1.0)
    agrees = [part.sign() == elected for part in parts]
    chosen = in_order([weight * part * agree for part, agree, weight in zip(parts, agrees, weights, strict=True)])
    return chosen / in_order([agree.float() for agree in agrees]).clamp(min=1)


@law
@given(weighted())
def test_sums_are_those_of_the_dense_vectors(some: tuple[list[experts.Expert], list[float]]) -> None:
    them, weights = some
    total = experts.merge(them, "task_arithmetic", weights=weights)
    mean = experts.merge(them)
    for name in SHAPES:
        parts = dense(them, name)
        expected = in_order([weight * part for weight, part in zip(weights, parts, strict=True)])
        assert torch.equal(total[name], expected)
        assert torch.equal(mean[name], in_order(parts) / len(parts))
    if abs(sum(weights)) > 0.1:
        scaled = experts.merge(them, "average", weights=weights)
        for name in SHAPES:
            torch.testing.assert_close(scaled[name], total[name] / sum(weights))


@law
@given(weighted(), st.sampled_from(["total", "frequency"]))
def test_ties_is_its_dense_definition(some: tuple[list[experts.Expert], list[float]], election: str) -> None:
    them, weights = some
    merged = experts.merge(them, "ties", weights=weights, election=election)  # type: ignore[arg-type]
    for name in SHAPES:
        assert torch.equal(merged[name], ties(dense(them, name), weights, election))


@law
@given(weighted(), st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 1.0]))
def test_dare_is_its_dense_definition(
    some: tuple[list[experts.Expert], list[float]], seed: int, density: float
) -> None:
    them, weights = some
    total = experts.merge(them, "dare", weights=weights, density=density, seed=seed)
    elected = experts.merge(them, "dare_ties", weights=weights, density=density, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items():
        drawn = [
            torch.bernoulli(torch.full(shape, density), generator=generator) if density < 1 else torch.ones(shape)
            for _ in them
        ]
        parts = [part * keep / density for part, keep in zip(dense(them, name), drawn, strict=True)]
        expected = in_order([weight * part for weight, part in zip(weights, parts, strict=True)])
        torch.testing.assert_close(total[name], expected)
        torch.testing.assert_close(elected[name], ties(parts, weights, "total"))


@law
@given(st.lists(expert(), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(them: list[experts.Expert], random) -> None:
    other = list(them)
    random.shuffle(other)
    one, two = experts.merge(them, "ties", election="frequency"), experts.merge(other, "ties", election="frequency")
    for name in SHAPES:
        torch.testing.assert_close(one[name], two[name])


@law
@given(expert(), st.sampled_from(["average", "task_arithmetic", "ties"]))
def test_one_expert_merges_to_itself(one: experts.Expert, method: str) -> None:
    merged = experts.merge([one], method)
    for name, tensor in one.dense(torch.float32).items():
        assert torch.equal(merged[name], tensor)


@law
@given(expert(), expert())
def test_similarity_is_symmetric_and_that_of_the_dense_vectors(a: experts.Expert, b: experts.Expert) -> None:
    found, back = experts.similarity(a, b), experts.similarity(b, a)
    assert (found["dot"], found["hamming"], found["kept_both"]) == (back["dot"], back["hamming"], back["kept_both"])
    x, y = (torch.cat([each.dense(torch.float64)[name].reshape(-1) for name in SHAPES]) for each in (a, b))
    torch.testing.assert_close(torch.tensor(found["dot"], dtype=torch.float64), x @ y)
    x, y = (torch.cat([signs(each, name) for name in SHAPES]) for each in (a, b))
    assert found["hamming"] == int((x != y).sum())
    assert found["kept_both"] == int((x * y != 0).sum())
    assert experts.similarity(a, a)["hamming"] == 0


def signs(one: experts.Expert, name: str) -> Tensor:
    """Also where the scale of a tensor is 0: its signs count."""
    at, sign = one.indices(name)
    return torch.zeros(torch.Size(one.shapes[name]).numel(), dtype=torch.int8).index_copy_(0, at, sign)
