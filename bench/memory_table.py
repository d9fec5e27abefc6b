"""The table of docs/memory.md: the predicted peak of training by model size, chain and batch.

    python bench/memory_table.py

Sizes are Llama configurations in bfloat16; rows have 512 tokens. Numbers are decimal gigabytes.
"""

from __future__ import annotations

import sys

from transformers import LlamaConfig

import dovetail
from plan import SIZES

CHAINS = [
    "lora(r=16)",
    "nf4 >> lora(r=16)",
    "nf4 >> lora(r=16) >> regrid",
    "nf4 >> lora(r=16) >> regrid(start=codes)",
    "wanda(0.5) >> gptq(bits=4, group=64) >> lora(r=16) >> remask >> regrid",
]
COLUMNS = [(1, False), (8, False), (8, True)]
"""Rows of a batch, and whether gradients are checkpointed."""


def table() -> str:
    """Return the rows of the table in Markdown."""
    lines = []
    for name, sizes in SIZES.items():
        config = LlamaConfig(**sizes, dtype="bfloat16")
        for text in CHAINS:
            cells = []
            for batch_size, checkpointed in COLUMNS:
                planned = dovetail.plan(
                    text, config, batch_size=batch_size, length=512, gradient_checkpointing=checkpointed
                )
                cells.append(f"{(planned.predicted_peak_memory_nbytes or 0) / 1e9:.1f}")
            lines.append(f"| {name} | `{text}` | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
