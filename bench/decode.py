"""Generation on packed models, token by token, against the stock model in float32 and bfloat16: ratios of medians.

    python bench/decode.py [--layers 4] [--vocabulary 512] [--tokens 16] [--rounds 5] [--json]

One thread; a Llama 2048 wide with random weights, as the one of 1.1 B parameters (`--layers 22 --vocabulary 32000`). A
prompt of 8 tokens is read before, and is not timed; then single tokens follow with a cache. "ours" is the packed model,
which multiplies straight from codes; the peer is the faster one of the two stock models with the same weights. All
models are held at once. Rounds are interleaved; times are processor time of one token.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dovetail
from dovetail.checkpoint.merge import to_stock
from timing import Row, medians, show

QUANTIZERS = {
    "int(bits=4, group=64)": 1 / 1.5,
    "int(bits=8, group=64)": None,
    "int(bits=2, group=64)": None,
    "nf4": None,
}
"""Quantizer -> the ratio that is wanted."""


def decode_of(model: PreTrainedModel, tokens: int) -> Callable[[], None]:
    prompt = torch.arange(8)[None]

    @torch.inference_mode()
    def decode() -> None:
        cache = copy.deepcopy(filled)
        for number in range(tokens):
            model(torch.tensor([[number]]), past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        filled = DynamicCache(config=model.config)
        model(prompt, past_key_values=filled, use_cache=True)
    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=asked.layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=asked.vocabulary,
    )  # fmt: skip
    rows = []
    for text, target in QUANTIZERS.items():
        torch.manual_seed(0)
        packed = LlamaForCausalLM(copy.deepcopy(config)).requires_grad_(False).eval()
        dovetail.apply(packed, text)
        dovetail.merge(packed, packed=True)
        stock = copy.deepcopy(packed)
        to_stock(stock)
        models = {"packed": packed, "float32": stock, "bfloat16": copy.deepcopy(stock).bfloat16()}
        found = medians({name: decode_of(model, asked.tokens) for name, model in models.items()}, asked.rounds, 1)
        ms = {name: each / asked.tokens for name, each in found.items()}
        peer = min(("float32", "bfloat16"), key=lambda name: ms[name])
        rows.append(Row(f"{text} / {peer}", ms["packed"], ms[peer], target))
    show(f"one token, {asked.layers} layers, vocabulary of {asked.vocabulary}", rows, asked.json)


if __name__ == "__main__":
    main()
