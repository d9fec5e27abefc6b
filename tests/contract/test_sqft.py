"""SparsePEFT and QA-SparsePEFT (SQFT, §2.3-2.4) merge bit for bit: every family, adapter, group, order of rounding."""

from __future__ import annotations

import pytest
import torch

import dovetail
from dovetail.chains.layer.linear import chain_layers
from families import batch, logits, make
from samples import move

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "t5", "bert"]
ADAPTERS = [
    "lora(r=4)",
    "lora(r=4) >> ia3",
    "vera(r=16) >> lora(r=4)",
    "loha(r=2)",
    "lora(r=6, elastic=[6, 4, 2])",
    "loha(r=4, elastic=[4, 2])",
]
GRIDS = [(group, order) for group in (32, 64, 128, 0) for order in ("true", "false")]


@torch.no_grad()  # with gradients wanted, torch's attention takes another kernel before merging than after, on T5
def merged_bit_for_bit(family: str, text: str, targets: str = "all-linear") -> None:
    model = make(family)
    dovetail.apply(model, text, targets=targets, calibration=[batch(model, seed=s, rows=4) for s in (5, 6)])
    zeros = {name: layer.base.mask_rows(slice(None)) for name, layer in chain_layers(model).items()}
    start = logits(model, batch(model))
    move(model, 0.03)
    inputs = batch(model)
    before = logits(model, inputs)
    assert not torch.equal(start, before)
    report = dovetail.merge(model, probe=inputs)
    assert torch.equal(logits(model, inputs), before)
    assert (report.exact, report.max_abs_logit_diff, report.max_abs_weight_diff) == (True, 0, 0)
    assert report.off_grid == 0
    assert report.sparsity_after == report.sparsity_before >= 0.5
    for name, keep in zeros.items():
        module = model.get_submodule(name)
        weight = module.weight.t() if type(module).__name__ == "Conv1D" else module.weight
        assert not bool(weight[~keep].any())


def in_turn(combinations: list[tuple]) -> list[tuple]:
    """Pair every family with combinations in turn: each family meets a third, and each combination two families."""
    return [
        (family, *combination)
        for turn, family in enumerate(FAMILIES)
        for place, combination in enumerate(combinations)
        if (turn + place) % 3 == 0
    ]


@pytest.mark.parametrize(("family", "adapter"), in_turn([(adapter,) for adapter in ADAPTERS]))
def test_sparse_peft_merges_bit_for_bit(family: str, adapter: str) -> None:
    merged_bit_for_bit(family, f"wanda(0.5) >> {adapter} >> remask")


@pytest.mark.parametrize(
    ("family", "adapter", "group", "order"),
    in_turn([(adapter, *GRIDS[(place * 3 + shift) % 8]) for place, adapter in enumerate(ADAPTERS) for shift in (0, 4)]),
)
def test_qa_sparse_peft_merges_bit_for_bit(family: str, adapter: str, group: int, order: str) -> None:
    targets = "down" if group == 128 else "all-linear"  # the only layers that wide
    text = f"wanda(0.5) >> gptq(bits=4, group={group}, act_order={order}) >> {adapter} >> remask >> regrid"
    merged_bit_for_bit(family, text, targets)


PRUNERS = ['sparsegpt(pattern="2:4")', "magnitude(0.6, allocation=outlier)", "ria(0.5)"]


@pytest.mark.parametrize(
    ("pruner", "bits", "start"),
    [(p, b, ("weights", "codes")[(i + j) % 2]) for i, p in enumerate(PRUNERS) for j, b in enumerate((2, 3, 8))],
)
def test_qa_sparse_peft_merges_bit_for_bit_with_other_bits_and_pruners(pruner: str, bits: int, start: str) -> None:
    grid = f"gptq(bits={bits}, group=32, symmetric=true)"
    merged_bit_for_bit("llama", f"{pruner} >> {grid} >> lora(r=4) >> remask >> regrid(start={start})")
