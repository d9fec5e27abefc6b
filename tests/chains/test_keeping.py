"""Weights that are kept between passes: the same bits, made once for an optimizer step, in the predicted memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from dovetail.chains.layer import execute
from dovetail.chains.layer.elastic import groups
from dovetail.chains.layer.keeping import forget, keeping, kept_nbytes
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.config import empty_model
from dovetail.checkpoint.merge import merge
from dovetail.compression.apply import apply, apply_on_meta
from dovetail.tasks.tokens import encode
from dovetail.training import predict
from dovetail.training.optimizer import TrainSettings
from dovetail.training.predict import predict_peak_memory, simulate, worth_keeping
from families import batch, make, move
from small_models import SUMS, llama, make_tokenizer, parameters, quiet, same

REGRID = "int(bits=4, group=32) >> lora(r=2) >> regrid"
CHAINS = [
    REGRID, "int(bits=2, group=32) >> lora(r=2) >> regrid", "nf4 >> lora(r=2) >> regrid(start=codes)",
    "wanda(0.5) >> gptq(bits=4, group=32) >> lora(r=2) >> remask >> regrid", "wanda(0.5) >> dora(r=2) >> remask",
    "int(bits=4, group=32) >> ia3 >> vera(r=2) >> regrid", "fp8 >> lora(r=2) >> regrid",
]  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List the bases whose weights are made."""
    seen: list[Any] = []
    original = execute._materialise

    def counted(base: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(base)
        return original(base, *args, **kwargs)

    monkeypatch.setattr(execute, "_materialise", counted)
    return seen


def chained(text: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.set_num_threads(1)
    model: Any = make("llama")
    model.to(dtype)
    apply(model, text, calibration=[batch(model)])
    move(model)
    return model.train()


def gradients(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    inputs = batch(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", CHAINS)
def test_gradients_are_the_same_bits(text: str, dtype: torch.dtype, made: list[Any]) -> None:
    model = chained(text, dtype)
    layers, wanted = len(chain_layers(model)), gradients(model)
    with keeping(model):
        made.clear()
        found = gradients(model)
        assert len(made) == layers
        assert all(map(torch.equal, found, wanted))
        assert all(map(torch.equal, gradients(model), wanted))  # another batch of the step
        assert len(made) == layers
        move(model)
        moved = gradients(model)
        assert len(made) == 2 * layers
    assert all(map(torch.equal, gradients(model), moved))
    assert all(layer.base.kept is None for layer in chain_layers(model).values())


def test_the_backward_pass_uses_no_weight_of_another_forward_pass(made: list[Any]) -> None:
    model = chained("int(bits=4, group=32) >> lora(r=4, elastic=[4, 2]) >> regrid")
    inputs, wanted = batch(model), gradients(model)
    with keeping(model):
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        for rank in (4, 2):
            for group in groups(model):
                group.use_rank(rank)
            if rank == 4:
                model(**inputs)
        made.clear()
        loss.backward()
    assert len(made) == len(chain_layers(model))
    assert all(map(torch.equal, [p.grad for p in model.parameters() if p.grad is not None], wanted))


def test_ranks_replaced_tensors_and_hidden_changes(made: list[Any]) -> None:
    model = chained("int(bits=4, group=32) >> lora(r=4, elastic=[4, 2]) >> regrid")
    with keeping(model):
        of_two = gradients(model)
        for group in groups(model):
            group.use_rank(4)
        of_four = gradients(model)
        assert any(not torch.equal(a, b) for a, b in zip(of_two, of_four, strict=True))
        made.clear()
        for layer in chain_layers(model).values():
            for parameter in layer.links.parameters():
                parameter.data.mul_(1.5)  # torch does not count this
        forget(model)
        changed = gradients(model)
        assert len(made) == len(chain_layers(model))
        first: Any = next(iter(chain_layers(model).values()))
        before = model(**batch(model)).logits
        first.base.set_quantized(first.base.quantized.encode(torch.zeros(first.base.shape)))
        first.base.start = torch.zeros(first.base.shape)
        assert not torch.equal(model(**batch(model)).logits, before)
    assert not all(map(torch.equal, changed, gradients(model)))


@pytest.mark.parametrize("text", [REGRID, "magnitude(0.5) >> lora(r=2, elastic=[2, 1]) >> remask"])
def test_training_gives_the_same_bits_and_makes_a_weight_once_a_step(text: str, made: list[Any]) -> None:
    results = []
    for keep in (False, True, "auto"):
        model: Any = apply(llama(), text)
        made.clear()
        settings = {"max_steps": 4, "batch_size": 4, "gradient_accumulation": 3, "keep_weights": keep}
        report = quiet(model, SUMS, evaluate_every=2, evaluate_limit=4, **settings)
        results.append((parameters(model), report.stages[0].losses, report.stages[0].evaluations))
        if keep:
            assert len(made) <= (2 + 4 + 2) * len(chain_layers(model))  # the longest rows, the steps, the evaluations
    for other in results[1:]:
        assert same(other[0], results[0][0])
        assert other[1:] == results[0][1:]


@pytest.mark.parametrize(
    ("text", "checkpointed"),
    [(REGRID, False), ("wanda(0.5) >> int(bits=4, group=32) >> lora(r=2) >> remask >> regrid", True)],
)
def test_memory_is_predicted(text: str, checkpointed: bool) -> None:
    for keep in ("auto", False):
        settings = {"batch_size": 16, "keep_weights": keep, "gradient_checkpointing": checkpointed}
        calibration = [{"input_ids": torch.arange(4, 16).view(2, 6)}]
        model: Any = apply(llama(), text, calibration=calibration)
        measured = quiet(model, SUMS, max_steps=3, **settings).peak_memory_nbytes
        rows = encode("generation", SUMS.split("train"), make_tokenizer(), encoder_decoder=False, max_length=512)
        ids = torch.ones(16, max(len(row["input_ids"]) for row in rows), dtype=torch.int64)
        widest = {"input_ids": ids, "attention_mask": ids, "labels": ids}
        empty: Any = apply_on_meta(empty_model(llama().config), text)
        predicted = predict_peak_memory(empty, widest, TrainSettings(**settings))
        assert predicted == pytest.approx(measured, rel=0.02)
        if keep:
            without = predict_peak_memory(empty, widest, TrainSettings(**settings | {"keep_weights": False}))
            assert predicted > without + kept_nbytes(model) // 2


def test_repeated_blocks() -> None:
    config = llama().config
    config.num_hidden_layers = 7
    model: Any = apply_on_meta(empty_model(config), REGRID)
    ids = torch.ones(2, 8, dtype=torch.int64)
    settings, inputs = TrainSettings(keep_weights=True), {"input_ids": ids, "attention_mask": ids, "labels": ids}
    assert simulate(model, inputs, settings, whole=False) == simulate(model, inputs, settings)


def test_auto_keeps_where_the_prediction_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = apply(llama(), REGRID)
    ids = torch.ones(4, 8, dtype=torch.int64)
    inputs, settings = {"input_ids": ids, "attention_mask": ids, "labels": ids}, TrainSettings()
    without: Any = apply(llama(), "lora(r=2)")
    own = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with_them = predict_peak_memory(model, inputs, TrainSettings(keep_weights=True))
    for free, kept in [(10**9, True), (with_them - own, True), (with_them - own - 1, False), (1, False)]:
        monkeypatch.setattr(predict, "free_memory", lambda device, free=free: free)
        assert worth_keeping(model, inputs, settings) == kept
    monkeypatch.setattr(predict, "free_memory", lambda device: with_them - 1)
    assert predict_peak_memory(model, inputs, settings) < with_them
    assert worth_keeping(model, inputs, TrainSettings(keep_weights=True))
    assert not worth_keeping(without, inputs, settings)
    assert all(layer.base.kept is None for layer in chain_layers(model).values())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def test_tensors_in_the_place_of_parameters_are_seen() -> None:
    """The id of a tensor that is gone may be that of the next one; `.data =` leaves the version."""
    model = chained(REGRID)
    own = {name: p for name, p in model.named_parameters() if ".links." in name}
    layers, factors = chain_layers(model).values(), [1.5, 2.0, -1.0, 3.0]

    def in_calls() -> list[torch.Tensor]:
        found = []
        for factor in factors:
            with torch.no_grad():
                others = {name: p.detach() * factor for name, p in own.items()}
                found.append(torch.func.functional_call(model, others, (), batch(model)).logits)
                del others
        return found

    def in_data() -> list[torch.Tensor]:
        found, before = [], {name: p.data for name, p in own.items()}
        for factor in factors:
            for name, p in own.items():
                p.data = before[name] * factor
            found.append(logits(model))
        for name, p in own.items():
            p.data = before[name]
        return found

    def in_dtypes() -> list[torch.Tensor]:
        found = [logits(model)]
        for layer in layers:
            layer.links.half().float()
        return [*found, logits(model)]

    for change in (in_calls, in_data, in_dtypes):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        wanted = change()
        model.load_state_dict(state)
        with keeping(model):
            assert all(map(torch.equal, change(), wanted))
        model.load_state_dict(state)


def test_calls_that_torch_repeats_or_leaves(made: list[Any]) -> None:
    """A layer twice in one pass, checkpointing, two backward passes, an error, inference mode between the passes."""
    model = chained("wanda(0.5) >> int(bits=2, group=32) >> lora(r=2) >> remask >> regrid")
    first: Any = next(iter(chain_layers(model).values()))

    def twice() -> list[torch.Tensor]:
        model.zero_grad()
        x = torch.randn(3, first.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
        (first(x) * first(2 * x)).sum().backward()
        return [p.grad.clone() for p in [x, *first.links.parameters()]]

    def checkpointed() -> list[torch.Tensor]:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        found = gradients(model)
        model.activation_checkpointing_disable()
        return found

    def again() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**batch(model), labels=batch(model)["input_ids"]).loss
        loss.backward(retain_graph=True)
        forget(model)
        logits(model)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def looked() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.inference_mode():
            model(**batch(model))  # makes the weights
        loss = model(**batch(model), labels=batch(model)["input_ids"]).loss
        with torch.inference_mode():
            model.eval()(**batch(model))
        loss.backward()
        model.train()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    calls = twice, checkpointed, again, looked
    wanted = [call() for call in calls]
    for call, one in zip(calls, wanted, strict=True):
        with keeping(model):
            assert all(map(torch.equal, call(), one))
    with keeping(model):
        loss = model(**batch(model), labels=batch(model)["input_ids"]).loss
        move(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        moved = gradients(model)
    assert all(map(torch.equal, gradients(model), moved))


@pytest.mark.parametrize("begun", [0, 1])
def test_a_weight_that_was_not_finished_is_made_again(begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chained(REGRID)
    wanted, original = logits(model), execute._materialise

    def interrupted(base: Any, *args: Any, **kwargs: Any) -> Any:
        if begun:
            original(base, *args, **kwargs).zero_()
        raise KeyboardInterrupt

    with keeping(model):
        logits(model)
        move(model, by=0.0)  # another version
        with monkeypatch.context() as patched:
            patched.setattr(execute, "_materialise", interrupted)
            with pytest.raises(KeyboardInterrupt):
                logits(model)
        assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_keeps_nothing(way: str) -> None:
    model = chained(REGRID)
    with keeping(model):
        wanted = logits(model)
        other: Any = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert all(layer.base.kept is not None for layer in chain_layers(model).values())
        assert all(layer.base.kept is None for layer in chain_layers(other).values())
        assert torch.equal(logits(other), wanted)


def test_a_chain_is_merged_and_moved_while_weights_are_kept() -> None:
    model = chained(REGRID)
    with keeping(model):
        wanted = logits(model)
        model.double().float()
        assert torch.equal(logits(model), wanted)
        merge(model)
        assert torch.equal(logits(model), wanted)
