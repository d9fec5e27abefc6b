"""What holds on the CPU holds on an accelerator: the whole flow of one model.

The laws are those of `tests/contract`: the fast path equals the definition, a merge keeps what it promises, a saved
adapter and an expert come back, a packed model generates, and the playground scores what it scores on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dovetail
from accelerators import DEVICE
from dovetail.chains.layer.applied import applied
from dovetail.links.quantize import accelerate
from dovetail.tasks.find import load_task
from dovetail.tasks.spec import Data
from families import batch, logits, make
from small_models import SUMS, llama, make_tokenizer, quiet
from test_tiny import CHAINS, learn
from tolerance import difference, rounding


@pytest.fixture(autouse=True)
def _kernels_take_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "SMALLEST", 0)


MORE_CHAINS = [
    *CHAINS,
    "lora(r=4) >> ia3 >> dora(r=4)",
    "loha(r=4) >> vera",
    "magnitude(pattern=2:4) >> lora(r=4) >> remask",
    "sparsegpt(0.5) >> gptq(bits=4, group=32) >> lora(r=4) >> remask >> regrid",
]


def covered(text: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny Llama under a chain, and a batch, on the device."""
    model = make("llama").to(dtype).to(device)
    inputs = {name: tensor.to(device) for name, tensor in batch(model).items()}
    dovetail.apply(model, text, calibration=[inputs])
    return model, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", MORE_CHAINS)
def test_flow_on_the_accelerator(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = covered(text, dtype, DEVICE)
    first, last = learn(model, inputs)
    assert last < first
    if text.startswith("lora(r=4) >> wanda"):
        dovetail.advance(model, calibration=[inputs])
        learn(model, inputs)
    dovetail.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        tuned = logits(model, inputs)
        report = dovetail.merge(model, lossy=not text.endswith(("remask", "regrid", "regrid(start=codes)")))
        merged = logits(model, inputs)
    assert all(p.device.type == DEVICE.type for p in model.parameters())
    if "regrid" in text:
        assert report.exact
        assert torch.equal(merged, tuned)
    else:  # the products of an open chain are summed in another order
        torch.testing.assert_close(
            merged, tuned, rtol=0, atol=float(tuned.abs().max()) * (1e-5 if dtype == torch.float32 else 5e-2)
        )
    if "0.5" in text or "2:4" in text:
        assert report.sparsity_after >= 0.5
    assert report.off_grid in (0, None)
    again = make("llama").to(dtype).to(DEVICE)
    dovetail.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(logits(again, inputs), tuned)


@pytest.mark.parametrize("text", MORE_CHAINS)
def test_fast_path_equals_the_definition(text: str) -> None:
    model, _ = covered(text, torch.float64, DEVICE)
    for layer in applied(model).layers.values():
        x = torch.randn(3, layer.base.shape[1], dtype=torch.float64, device=DEVICE)
        weight, bias = layer.effective_weight()
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_an_expert_is_put_in_and_taken_out(tmp_path: Path) -> None:
    model, inputs = covered("lora(r=4)", torch.float32, DEVICE)
    learn(model, inputs)
    dovetail.save_adapter(model, tmp_path / "adapter")
    expert = dovetail.experts.compress(
        dovetail.experts.task_vector(tmp_path / "adapter", base=make("llama")), density=0.2
    )
    fresh, _ = covered("lora(r=4)", torch.float32, DEVICE)
    with torch.no_grad():
        before = logits(fresh, inputs)
        dovetail.experts.activate(fresh, expert)
        assert not torch.equal(logits(fresh, inputs), before)
        dovetail.experts.deactivate(fresh)
        assert torch.equal(logits(fresh, inputs), before)


def test_the_playground_scores_what_it_scores_on_the_cpu() -> None:
    model, tokenizer = dovetail.load("playground")
    task = load_task(Data(task="multiple_choice"))
    on_cpu = dovetail.evaluate(model, tokenizer, [task], limit=64)[task.name]
    torch.nn.Module.to(model, DEVICE)
    on_device = dovetail.evaluate(model, tokenizer, [task], limit=64)[task.name]
    assert on_device["accuracy"] == pytest.approx(on_cpu["accuracy"], abs=0.05)


@pytest.mark.parametrize(
    "quantizer", ["int(bits=4, group=32)", "int(bits=3, group=32)", "nf4", "magnitude(0.5) >> nf4"]
)
def test_a_packed_model_generates_and_comes_back(quantizer: str, tmp_path: Path) -> None:
    model, inputs = covered(
        f"{quantizer} >> lora(r=4) >> {'remask >> ' * ('0.5' in quantizer)}regrid", torch.float32, DEVICE
    )
    learn(model, inputs, steps=3)
    with torch.no_grad():
        tuned = logits(model, inputs)
        assert dovetail.merge(model, packed=True).exact
        assert torch.equal(logits(model, inputs), tuned)
        prompt = inputs["input_ids"][:1, :4]
        written = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert written.shape[1] > 4
        # One token after the other, from codes, against all at once, from the weight.
        steps = model(prompt, use_cache=True)
        one = model(prompt[:, :1], past_key_values=steps.past_key_values).logits
        whole = model(torch.cat([prompt, prompt[:, :1]], 1)).logits[:, -1:]
    assert difference(one.cpu(), whole.cpu()) <= 1e2 * rounding(torch.float32, 128, steps=8)
    dovetail.save_packed(model, tmp_path / "packed")
    make_tokenizer().save_pretrained(tmp_path / "packed")
    again, _ = dovetail.load(tmp_path / "packed")
    assert torch.equal(logits(torch.nn.Module.to(again, DEVICE), inputs), tuned)


def test_a_training_on_the_device_learns_what_it_learns_on_the_cpu() -> None:
    losses = {}
    for device in ("cpu", DEVICE):
        model = torch.nn.Module.to(llama(), device)
        dovetail.apply(model, "int(bits=8, group=32) >> lora(r=4)")
        losses[device] = [loss for _, loss in quiet(model, SUMS, max_steps=8, seed=0).stages[0].losses]
        assert next(model.parameters()).device.type == torch.device(device).type
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-3)


def test_a_compressed_folder_is_that_of_the_device(tmp_path: Path) -> None:
    """A checkpoint streamed by blocks, loaded and put on the device, is the model compressed there."""
    make("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    dovetail.compress(tmp_path / "base", "int(bits=4, group=32)", output=tmp_path / "small")
    loaded, _ = dovetail.load(tmp_path / "small")
    model, inputs = covered("int(bits=4, group=32)", torch.float32, DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(
            logits(torch.nn.Module.to(loaded, DEVICE), inputs), logits(model, inputs), rtol=0,
            atol=rounding(torch.float32, 128, steps=8),
        )  # fmt: skip
