"""One training step of blocks of a 1.1 B Llama under chains, against peft's LoRA on the dense model: ratios of medians.

    python bench/scale.py [--tokens 64] [--rounds 5] [--json]

One thread, float32; 4 blocks, 2048 wide, with a vocabulary of 512, so that the blocks decide; LoRA of rank 16 on all
linear layers; forward, backward and an AdamW step. Rounds are interleaved; times are processor time. It holds all
models at once, about 6 GB. The targets are those for 64 tokens. Weights of closed chains are kept between the passes,
as `dovetail.train` keeps them where memory is left; with --recompute they are not.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack

os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import dovetail
from dovetail.chains.layer.keeping import keeping
from timing import Row, medians, show

CONFIG = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4,
    vocab_size=512,
)  # fmt: skip
CHAINS = {
    "int(bits=4, group=64) >> lora(r=16) >> regrid": 1.35,
    "nf4 >> lora(r=16) >> regrid": 1.45,
    "int(bits=4, group=64) >> lora(r=16)": None,
    "nf4 >> lora(r=16)": None,
}
"""Chain -> the ratio that is wanted at 64 tokens."""


def under(text: str) -> nn.Module:
    """Return the blocks under a chain, or under peft's LoRA for "peft"; the same weights each time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if text == "peft":
        return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear")).train()
    return dovetail.apply(model.requires_grad_(False), text).train()


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(CONFIG.vocab_size, (1, asked.tokens), generator=torch.Generator().manual_seed(0))
    models = {text: under(text) for text in ("peft", *CHAINS)}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(keeping(model, not asked.recompute))
        found = medians({text: step_of(model, ids) for text, model in models.items()}, asked.rounds, warmup=2)
    wanted = CHAINS if asked.tokens == 64 else dict.fromkeys(CHAINS, None)
    show(
        f"{asked.tokens} tokens, against peft's LoRA",
        [Row(text, found[text], found["peft"], wanted[text]) for text in CHAINS],
        asked.json,
    )


if __name__ == "__main__":
    main()
