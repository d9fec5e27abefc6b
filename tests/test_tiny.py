"""The whole flow on a two-layer random Llama, in a few seconds: prune, quantize, train, merge, save, load, run on.

Training is a plain torch loop here: what is tested is that chain, merge and stock transformers fit together.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import dovetail
from families import batch, logits, make


def learn(model: nn.Module, inputs: dict[str, Tensor], steps: int = 12) -> tuple[float, float]:
    """Next-token loss of one batch, learnt by heart: before and after."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        scores = logits(model, inputs)[:, :-1]
        loss = functional.cross_entropy(scores.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses[0], losses[-1]


CHAINS = [
    "wanda(0.5) >> int(bits=4, group=32) >> lora(r=8) >> remask >> regrid",
    "nf4 >> lora(r=8) >> regrid(start=codes)",
    "lora(r=4) >> wanda(0.5) >> nf4 >> dora(r=4) >> ia3 >> remask >> regrid",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("text", CHAINS)
def test_the_whole_flow(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "proj" not in name}
    inputs, calibration = batch(model), [batch(model, seed=seed) for seed in (1, 2)]

    dovetail.apply(model, text, calibration=calibration)
    first, last = learn(model, inputs)
    assert last < first
    if text.startswith("lora"):
        dovetail.advance(model, calibration=calibration)
        first, last = learn(model, inputs)
        assert last < first
    carrying = dovetail.footprint(model)
    assert carrying.bits_per_weight < 6
    assert 0 < carrying.trainable_parameters < 100_000

    with torch.no_grad():
        tuned = logits(model, inputs)
        report = dovetail.merge(model)
        assert torch.equal(logits(model, inputs), tuned)
    assert report.exact
    assert report.max_abs_logit_diff == 0
    assert report.off_grid == 0
    if "wanda" in text:
        assert report.sparsity_after >= 0.5
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())

    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(logits(loaded, inputs), tuned)
    answer = loaded.generate(inputs["input_ids"][:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape[0] == 1


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    found = []
    for seed in (0, 0, 1):
        model = make("llama")
        dovetail.apply(model, CHAINS[0], calibration=[batch(model)], seed=seed)
        found.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])
    # Layers start apart from each other, and the global generator is left alone.
    firsts = [p for name, p in found[0].items() if name.endswith("q_proj.links.0.A")]
    assert not torch.equal(*firsts)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    dovetail.apply(make("llama"), "loha(r=4) >> vera >> bottleneck")
    assert torch.equal(torch.get_rng_state(), state)
