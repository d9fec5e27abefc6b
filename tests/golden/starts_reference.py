"""Makes starts.json: LoftQ's errors ‖W - Q - B A‖ by peft (0.21) and bitsandbytes, nf4 in blocks of 64, on CPU.

peft computes LoftQ on a GPU only: its own source runs here with "cpu" for "cuda".
Run where both are installed: python tests/golden/starts_reference.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import peft.utils.loftq_utils as reference
import torch

STEP = 2**-16
"""Weights are stored as multiples of it, exactly."""
SETTINGS = [(rank, iterations) for rank in (4, 16) for iterations in (1, 2, 5, 10)]


def loftq_on_cpu() -> dict:
    names = vars(reference) | {"clear_device_cache": lambda: None}
    source = inspect.getsource(reference.loftq_init)
    assert '"cuda"' in source
    exec(source.replace('"cuda"', '"cpu"'), names)
    return names


def main() -> None:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(32, 128, generator=generator) * 0.04
    heavy = torch.randn(48, 64, generator=generator) * 0.03 / torch.rand(48, 64, generator=generator).sqrt()
    low = torch.randn(64, 6, generator=generator) @ torch.randn(6, 64, generator=generator) * 0.02
    loftq = loftq_on_cpu()["loftq_init"]
    found = []
    for draw in (normal, heavy, low + 0.01 * torch.randn(64, 64, generator=generator)):
        steps = (draw / STEP).round()
        weight = steps * STEP
        cases = []
        for rank, iterations in SETTINGS:
            base, a, b = loftq(weight, num_bits=4, reduced_rank=rank, num_iter=iterations)
            cases.append({"rank": rank, "iterations": iterations, "error": float((weight - base - b @ a).norm())})
        found.append({"step": STEP, "weight": steps.int().tolist(), "cases": cases})
    Path(__file__).with_name("starts.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
