"""Words of GPTQ and AWQ checkpoints as gptqmodel packs them (7.7.0 made the file; tests do not need it)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).parent / "gptq_words.json"


def layer(bits: int) -> tuple[Tensor, Tensor]:
    """Return codes (32, 64) and zero points (2, 32), uint8, for groups of 32 inputs."""
    generator = torch.Generator().manual_seed(bits)
    code_oi = torch.randint(0, 2**bits, (32, 64), generator=generator)
    zero_go = torch.randint(0, 2**bits, (2, 32), generator=generator)
    return code_oi.to(torch.uint8), zero_go.to(torch.uint8)


def main() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # pyright: ignore[reportMissingImports]
    from gptqmodel.quantization.awq.utils.packing_utils import pack_awq  # pyright: ignore[reportMissingImports]

    found: dict[str, dict[str, list[list[int]]]] = {}
    for bits in (2, 3, 4, 8):
        code_oi, zero_go = layer(bits)
        linear = nn.Linear(64, 32, bias=False)
        group_i = torch.arange(64) // 32
        linear.weight.data = (code_oi.int() - zero_go.t().int()[:, group_i]).float()
        packed = TorchLinear(bits, 32, False, False, 64, 32)
        packed.pack_original(linear, torch.ones(32, 2), zero_go.t().float(), group_i.int())
        found[str(bits)] = {"qweight": packed.qweight.tolist(), "qzeros": packed.qzeros.tolist()}
    code_oi, zero_go = layer(4)
    qweight, qzeros = pack_awq(code_oi.t().int(), zero_go.int(), 4)
    found["awq"] = {"qweight": qweight.tolist(), "qzeros": qzeros.tolist()}
    FILE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
