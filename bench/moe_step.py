"""The cost of a training step on a mixture of experts beside a dense model with as many active parameters.

Both models have the same attention; each token of the mixture goes through 2 of 8 experts, and the dense feed-forward
network is as wide as these two. CPU time of forward and backward, one thread, medians of steps that take turns.

    python bench/moe_step.py [--hidden 512] [--tokens 2048] [--rounds 5] [--json]

With as many tokens that all experts get some, a closed chain computes W' of all experts, four times the active ones.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import dovetail
from dovetail.chains.layer.keeping import forget, keeping
from timing import Row, medians, show

CHAINS = ("lora(r=8)", "nf4 >> lora(r=8)", "int(bits=4, group=64) >> lora(r=8)",
          "magnitude(0.5) >> int(bits=4, group=64) >> lora(r=8) >> remask >> regrid")  # fmt: skip


def models(hidden: int) -> dict[str, Any]:
    """Return both models, random, float32."""
    sizes: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128, "max_position_embeddings": 1024,
    }  # fmt: skip
    torch.manual_seed(0)
    configs = {
        "dense": LlamaConfig(**sizes, intermediate_size=4 * hidden),
        "mixture": MixtralConfig(**sizes, intermediate_size=2 * hidden, num_local_experts=8, num_experts_per_tok=2),
    }
    return {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}


def step(model: Any, ids: torch.Tensor) -> None:
    """Run a forward and a backward pass, with weights that are made anew, as after a step of the optimizer."""
    forget(model)
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(1024, (4, asked.tokens // 4), generator=torch.Generator().manual_seed(0))
    rows = []
    for chain in (None, *CHAINS):
        pair = models(asked.hidden)
        for model in pair.values():
            model.requires_grad_(False).get_input_embeddings().requires_grad_(chain is None)
            if chain is not None:
                dovetail.apply(model, chain)
            model.train()
        with keeping(pair["dense"]), keeping(pair["mixture"]):
            functions = {name: partial(step, model, ids) for name, model in pair.items()}
            took = medians(functions, asked.rounds, warmup=1)
        rows.append(Row(chain or "without a chain", took["mixture"], took["dense"], 1.3))
    show(f"mixture beside dense, {asked.hidden} wide, {asked.tokens} tokens", rows, asked.json)


if __name__ == "__main__":
    main()
