"""Sizes and parameters of "A Study on PEFT Methods Applied to Quantized LLMs", from configurations alone.

The rows of `docs/papers.md` are those that this file computes. The paper's numbers are its Tables 4.1, 4.3 and 4.4.
"""

from __future__ import annotations

from functools import cache

import pytest
from transformers import LlamaConfig

from dovetail.runs.plan import Plan, plan
from places import ROOT

SHAPES = {  # vocabulary, width, feed-forward width, layers, heads, key-value heads
    "LLaMa 2 7B": (32_000, 4096, 11_008, 32, 32, 32),
    "LLaMa 2 70B": (32_000, 8192, 28_672, 80, 64, 8),
    "LLaMa 3 8B": (128_256, 4096, 14_336, 32, 32, 8),
}
# chain, model, trainable parameters (Table 4.3) and MB that they add (Table 4.4)
ADAPTERS = [
    ("lora(r=8)", "LLaMa 2 7B", 19_988_480, 38.648),
    ("lora(r=16)", "LLaMa 2 7B", 39_976_960, 76.773),
    ("lora(r=64)", "LLaMa 2 7B", 159_907_840, 305.523),
    ("lora(r=256)", "LLaMa 2 7B", 639_631_360, 1220.523),
    ("lora(r=64)", "LLaMa 2 70B", 828_375_040, 1582.552),
    ("ia3", "LLaMa 2 7B", 1_581_056, 6.554),
    ("ia3", "LLaMa 2 70B", 8_355_840, 34.42),
    ("ia3", "LLaMa 3 8B", 1_703_936, 7.02),
    ("dora(r=8)", "LLaMa 2 7B", 21_348_352, 41.242),
    ("dora(r=16)", "LLaMa 2 7B", 41_336_832, 79.367),
    ("dora(r=64)", "LLaMa 2 7B", 161_267_712, 308.117),
    ("dora(r=256)", "LLaMa 2 7B", 640_991_232, 1223.117),
]
# model, the paper's "model size" in GB, and sizes after quantization: chain, bits of a code, the paper's number
SIZES = [
    ("LLaMa 2 7B", 13.48, [("nf4(double=true)", 4, 3.51), ("hqq(bits=4)", 4, 3.51), ("hqq(bits=2)", 2, 1.99)]),
    ("LLaMa 2 70B", 137.98, [("nf4(double=true)", 4, 32.85)]),
    ("LLaMa 3 8B", 16.07, [("nf4(double=true)", 4, 5.21)]),
]
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


@cache
def planned(model: str, chain: str) -> Plan:
    vocabulary, width, wide, layers, heads, kv_heads = SHAPES[model]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False, dtype="float16",
    )  # fmt: skip
    found = plan(chain, config, memory=False)
    assert found.legal, found.problem
    return found


def parameters(model: str) -> int:
    found = planned(model, "ia3")
    assert found.target_fraction is not None
    return round(found.weights / found.target_fraction)


@pytest.mark.parametrize(("chain", "model", "count", "megabytes"), ADAPTERS)
def test_trainable_parameters_and_their_memory(chain, model, count, megabytes):
    """Table 4.4 is the adapter in MiB, and the norms, which the training raises from 16 to 32 bits.

    LoRA and DoRA take 16 bits, IA3 32. Without the norms, LoRA and DoRA at 16 bits are within 2 %.
    """
    trained = planned(model, chain).trainable_parameters
    assert trained == count
    _, width, _, layers, _, _ = SHAPES[model]
    half, norms = 2 * trained / 2**20, 2 * width * (2 * layers + 1) / 2**20
    share = trained / (parameters(model) + trained)
    if chain != "ia3":
        assert half == pytest.approx(megabytes, rel=0.02)
    assert (2 * half if chain == "ia3" else half) + norms == pytest.approx(megabytes, rel=0.0025)
    assert f"| `{chain}` | {model} | {count:,} | {trained:,} | {share:.4%} | {megabytes} | {half:.3f} |" in PAGE


@pytest.mark.parametrize(("model", "whole", "quantized"), SIZES)
def test_model_sizes(model, whole, quantized):
    """Table 4.1: its first column is in decimal GB; the others are GiB of codes and of all else at 16 bits."""
    count = parameters(model)
    assert 2 * count / 1e9 == pytest.approx(whole, rel=0.005)
    assert f"| {model} | 16 bits | {whole} | {2 * count / 1e9:.2f} | {2 * count:,} |" in PAGE
    for chain, bits, told in quantized:
        found = planned(model, chain)
        codes = (bits / 8 * found.weights + 2 * (count - found.weights)) / 2**30
        assert codes == pytest.approx(told, rel=0.005)
        assert found.nbytes > codes * 2**30  # with scales
        assert f"| {model} | `{chain}` | {told} | {codes:.2f} | {found.nbytes:,} |" in PAGE
