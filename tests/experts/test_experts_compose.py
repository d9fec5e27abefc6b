"""Composed experts: the weights that make a few examples likely, found again with the same seed, in the model."""

from __future__ import annotations

import math
import sys
import threading

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail import experts
from dovetail.checkpoint.adapter import parameters_of
from dovetail.compression.apply import apply, initial_values
from dovetail.errors import DataError, DovetailError
from dovetail.experts.composition import compose, search
from dovetail.experts.live.activate import put
from dovetail.experts.sources import task_vector
from dovetail.tasks.playground import task
from dovetail.tasks.task import Task
from small_models import llama, make_tokenizer


def some(number: int) -> list[experts.Expert]:
    made = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(30, 20, generator=generator) for name in ("a", "b")}
        made.append(experts.compress(tensors, 0.3))
    return made


def distance(them: list[experts.Expert], wanted: list[float]):
    """How far a composition is from the one with these weights."""
    dense = [expert.dense() for expert in them]
    goal = {n: sum(w * each[n] for w, each in zip(wanted, dense, strict=True)) for n in dense[0]}

    def loss(vector: experts.TaskVector) -> float:
        return sum(float((vector[name] - goal[name]).square().mean()) for name in vector)

    return loss


@pytest.mark.parametrize(("wanted", "budget"), [([0.8], 40), ([0.8, -0.5], 40), ([0.8, -0.5], 100), ([1, 0, -1], 60)])
def test_the_search_finds_the_weights(wanted, budget):
    them = some(len(wanted))
    found = search(them, distance(them, wanted), budget=budget, l1=0.0)
    assert len(found.history) == budget
    assert found.weights == pytest.approx(wanted, abs=0.1 if len(wanted) == 1 else 0.05)
    assert found.loss == min(tried.loss for tried in found.history) < 0.01
    dense = [expert.dense() for expert in them]
    for name, tensor in found.task_vector.items():
        expected = sum(weight * each[name] for weight, each in zip(found.weights, dense, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


def test_bound_penalty_and_seed():
    them = some(20)
    loss = distance(them, [2.0] * 20)
    found = search(them, loss, bound=0.5, seed=3)
    assert all(abs(weight) <= 0.5 for tried in found.history for weight in tried.weights)
    for tried in found.history:
        assert tried.objective == pytest.approx(tried.loss + 0.05 * sum(map(abs, tried.weights)) / 20)
    assert found.objective == min(tried.objective for tried in found.history)
    again = search(them, loss, bound=0.5, seed=3)
    assert again.history == found.history
    assert search(them, loss, l1=100.0).weights == (0.0,) * 20
    one = search(them[:1], distance(them[:1], [0.8]), budget=40, seed=-1)
    assert one.loss < 0.01


def test_losses_that_are_no_numbers_are_worst():
    them = some(2)
    loss = distance(them, [0.5, 0.5])
    odd = iter([math.nan, math.inf, -math.inf, 1e30])
    found = search(them, lambda vector: next(odd, None) or loss(vector))
    assert math.isfinite(found.loss)
    with pytest.raises(DataError, match="no finite loss in 3"):
        search(them, lambda vector: math.nan, budget=3)


def test_a_loss_that_fails_leaves_no_thread():
    def fail(vector: experts.TaskVector) -> float:
        raise KeyError("loss")

    before = set(threading.enumerate())
    with pytest.raises(KeyError):
        search(some(3), fail)
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:  # that of another test may have begun in between
            thread.join(60)
            assert not thread.is_alive()


def records() -> list[dict[str, str]]:
    words = ["one", "two", "three", "four"]
    return [{"prompt": f"sum of {a} plus {b} is", "answer": f" {a}"} for a in words for b in words]


def chained() -> tuple[PreTrainedModel, list[experts.Expert]]:
    """A model under a chain, and three experts, of which the first knows the answers."""
    model, tokenizer = apply(llama(), "lora(r=4)"), make_tokenizer()
    made = []
    for seed in range(3):
        start = initial_values(model)
        tensors = parameters_of(model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(start[name.removeprefix("link/")])
                if seed:
                    tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        if not seed:
            learn(model, tokenizer, list(tensors.values()))
        made.append(experts.compress(task_vector(model), 0.5, 1.5, "tensor"))
    return model, made


def learn(model: PreTrainedModel, tokenizer, tensors: list[Tensor]) -> None:
    from dovetail.tasks.tokens import Collator, encode

    rows = encode("generation", records(), tokenizer, encoder_decoder=False, max_length=32)
    batch, optimizer = Collator(0)(rows), torch.optim.Adam(tensors, lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def test_a_model_carries_the_best_composition():
    model, made = chained()
    tokenizer = make_tokenizer()
    model.train()
    found = compose(made, model, tokenizer, records(), budget=25, progress=False)
    assert model.training
    assert found.history[0].weights == (0.0, 0.0, 0.0)
    assert found.loss < found.history[0].loss - 0.3
    assert abs(found.weights[0]) > max(map(abs, found.weights[1:]))
    start = initial_values(model)
    for name, tensor in parameters_of(model).items():
        torch.testing.assert_close(tensor, start[name.removeprefix("link/")] + found.task_vector[name])
    again = compose(made, model, tokenizer, records(), budget=25, progress=False)
    assert again.weights == found.weights

    from dovetail.tasks.scoring.runner import Runner
    from dovetail.tasks.tokens import encode

    rows = encode("generation", records(), tokenizer, encoder_decoder=False, max_length=64)
    with torch.no_grad():
        sums, counts = Runner(model.eval(), tokenizer, "", 64, 64, False).log_likelihoods(rows)
    assert found.loss == pytest.approx(-(sums.sum() / counts.sum()).item(), abs=1e-6)
    merged = experts.merge(made, "task_arithmetic", weights=list(found.weights))
    assert all(torch.equal(merged[name], found.task_vector[name]) for name in merged)
    put(model, merged)


def test_what_does_not_go_is_refused():
    model, made = chained()
    tokenizer = make_tokenizer()
    for keywords in ({"budget": 0}, {"bound": 0}, {"bound": math.inf}, {"l1": -1}, {"l1": math.nan}, {"limit": 0}):
        with pytest.raises(DataError, match="compose"):
            compose(made, model, tokenizer, records(), **keywords)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="classification"):
        compose(made, model, tokenizer, task("acceptability_labels"))
    with pytest.raises(DataError, match="train"):
        compose(made, model, tokenizer, Task("t", "generation", "exact_match", {"test": records()}))
    with pytest.raises(DataError, match="none"):
        compose([], model, tokenizer, records())
    with pytest.raises(DataError, match="expert 2 of 2"):
        compose([made[0], some(1)[0]], model, tokenizer, records())


def test_without_nevergrad(monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(DovetailError, match=r"pip install \"dovetail\[compose\]\""):
        search(some(1), lambda vector: 0.0)
