"""`torch.compile` of models with chains: one graph without a break, the same outputs and gradients."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dovetail.chains.layer.keeping import keeping
from dovetail.compression.apply import apply
from dovetail.errors import TrainError
from dovetail.training.optimizer import check_compiling
from families import batch, logits, make, move
from small_models import SUMS, llama, quiet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")

FAMILIES = {
    "llama": "int(bits=4, group=32) >> lora(r=4) >> regrid",
    "qwen3": "dora(r=4)",
    "gemma3": "nf4 >> ia3 >> lora(r=4)",
    "phi3": "wanda(0.5) >> int(bits=2, group=32) >> lora(r=4) >> remask >> regrid",
    "gpt2": "int(bits=4, group=32) >> ia3 >> dora(r=4) >> regrid",
    "bert": "wanda(0.5) >> lora(r=4) >> remask",
    "t5": "nf4 >> vera(r=4) >> regrid(start=codes)",
}
CHAINS = [
    "lora(r=4)", "nf4 >> ia3 >> lora(r=4)", "int(bits=4, group=32) >> dora(r=4)", "nf4 >> lora(r=4) >> regrid",
    "wanda(0.5) >> int(bits=2, group=32) >> ia3 >> lora(r=4) >> remask >> regrid", "nf4 >> loha(r=16)",
    "int(bits=4, group=32) >> lora(r=2) >> regrid >> lora(r=2)", "nf4 >> loha(r=16) >> regrid",
]  # fmt: skip


@pytest.fixture(autouse=True)
def without_graphs() -> Iterator[None]:
    """Forget the graphs of other tests, of which a function may have a limited number."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, **settings: Any) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, **{"backend": "aot_eager", **settings})


def results(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """Return the output and the gradient of every trained parameter."""
    model.zero_grad()
    output = run()
    output.float().square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted) > 1
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_one_graph(family: str) -> None:
    model = make(family)
    inputs = batch(model)
    apply(model, FAMILIES[family], calibration=[inputs])
    move(model)
    wanted = results(model, lambda: logits(model, inputs))
    whole = compiled(model)
    close(results(model, lambda: whole(**inputs).logits), wanted)


def layer(text: str, module: nn.Module | None = None, size: tuple[int, ...] = (5, 3, 384)) -> tuple[Any, Tensor]:
    """Return one layer under a chain, of a size at which loops are compiled by numba, and an input."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(module or nn.Linear(384, 352))
    x = torch.randn(size)
    apply(model, text, targets="0", calibration=[{"input": x}])
    move(model, by=0.02)
    return model, x


@pytest.mark.parametrize("text", CHAINS)
def test_each_way_of_running_a_chain(text: str) -> None:
    model, x = layer(text)
    x.requires_grad_()
    longer = torch.randn(5, 7, 384)
    wanted = [*results(model, lambda: model(x)), x.grad.clone()]
    more = results(model, lambda: model(longer))
    whole, x.grad = compiled(model), None
    close([*results(model, lambda: whole(x)), x.grad], wanted)
    close(results(model, lambda: whole(longer)), more)
    with torch.no_grad():
        assert torch.equal(whole(x), model(x))
        move(model, by=0.02, seed=4)
        assert torch.equal(whole(x), model(x))


def test_a_convolution() -> None:
    model, x = layer("int(bits=4, group=0) >> lora(r=2) >> regrid", nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6))
    whole = compiled(model)
    close(results(model, lambda: whole(x)), results(model, lambda: model(x)))


def test_autocast() -> None:
    model, x = layer("nf4 >> lora(r=4) >> regrid")
    whole = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = whole(x), model(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


def test_kept_weights_and_copies() -> None:
    model, x = layer("nf4 >> lora(r=4) >> regrid")
    copied = deepcopy(model)
    whole = compiled(model)
    with keeping(model):
        close(results(model, lambda: whole(x)), results(copied, lambda: copied(x)))
        for seed in (4, 5):
            move(model, by=0.02, seed=seed)
            move(copied, by=0.02, seed=seed)
            close(results(model, lambda: whole(x)), results(copied, lambda: copied(x)))
    close(results(copied, lambda: compiled(copied)(x)), results(model, lambda: model(x)))


compiler = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


@pytest.mark.skipif(compiler is None, reason="torch's own backend needs a C++ compiler")
def test_the_backend_of_torch() -> None:
    model, x = layer("int(bits=4, group=32) >> ia3 >> dora(r=4) >> regrid")
    whole = compiled(model, backend="inductor")
    close(results(model, lambda: whole(x)), results(model, lambda: model(x)))


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, compile_ = [], torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, fullgraph=True, backend=backend))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    losses = []
    for asked in (False, True):
        model = apply(llama(), "nf4 >> lora(r=4) >> regrid")
        report = quiet(model, SUMS, max_steps=6, torch_compile=asked, gradient_accumulation=2)
        losses.append([loss for _, loss in report.stages[0].losses])
    assert graphs
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "no-compiler" else name)
    with pytest.raises(TrainError, match="elastic ranks"):
        quiet(apply(llama(), "lora(r=4, elastic=[4, 2])"), SUMS, torch_compile=True)
    with monkeypatch.context() as patch:
        for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
            patch.setenv(name, value)
        with pytest.raises(TrainError, match="2 processes"):
            check_compiling(llama(), True)
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(TrainError, match="no C\\+\\+ compiler: no-compiler"):
        quiet(apply(llama(), "lora(r=4)"), SUMS, torch_compile=True)
