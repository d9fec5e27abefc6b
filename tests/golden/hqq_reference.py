"""Makes hqq.json: scales, zero points and errors of small weights by the hqq package (0.2.8), on CPU in float32.

Run where hqq is installed (`pip install --no-deps hqq termcolor`): python tests/golden/hqq_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer

GROUP = 64
STEP = 2**-16
"""Weights are stored as multiples of it, exactly."""


def case(weight: torch.Tensor, bits: int) -> dict:
    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=GROUP, axis=1, device="cpu", bitpack=False)
    meta["compute_dtype"] = torch.float32
    error = (Quantizer.dequantize(codes, meta) - weight).norm() / weight.norm()
    return {
        "bits": bits,
        "scale": meta["scale"].view(-1).tolist(),
        "zero": meta["zero"].view(-1).tolist(),
        "error": float(error),
    }


def main() -> None:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(32, 256, generator=generator) * 0.04
    heavy = torch.randn(16, 256, generator=generator) * 0.03 / torch.rand(16, 256, generator=generator).sqrt()
    found = []
    for draw in (normal, heavy):
        steps = (draw / STEP).round()
        cases = [case(steps * STEP, bits) for bits in (8, 4, 3, 2, 1)]
        found.append({"step": STEP, "weight": steps.int().tolist(), "cases": cases})
    Path(__file__).with_name("hqq.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
