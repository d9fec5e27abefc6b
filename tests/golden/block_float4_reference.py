"""Makes block_float4.json: codes, scales and values of small weights by compressed-tensors (0.20), on CPU in float32.

Run where it is installed (`pip install --no-deps compressed-tensors loguru`):
python tests/golden/block_float4_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import quant_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp, generate_gparam


def case(weight: torch.Tensor, name: str) -> dict:
    arguments = {"mxfp4": quant_scheme.MXFP4A16, "nvfp4": quant_scheme.NVFP4A16}[name]["weights"]
    divisor = generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
    scale, _ = compute_dynamic_scales_and_zp(weight, arguments, torch.nn.Module(), global_scale=divisor)
    found = quantize(weight, scale, None, arguments, global_scale=divisor)
    packed = pack_fp4_to_uint8(found).view(-1)
    codes = torch.stack([packed & 15, packed >> 4], dim=1).view(weight.shape)
    stored = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    if name == "mxfp4":
        stored = compress_mx_scale(scale, torch.uint8)
    return {
        "name": name,
        "codes": codes.tolist(),
        "scale": stored.view(-1).tolist(),
        "divisor": None if divisor is None else float(divisor),
        "values": dequantize(found, scale, None, arguments, global_scale=divisor).tolist(),
    }


def main() -> None:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(8, 128, generator=generator) * 0.05
    normal[2, ::2] = 0
    normal[5, :64] = 0
    normal[6] *= 1e-4  # scales of nvfp4 that underflow
    ties = torch.randint(-28, 29, (8, 64), generator=generator) / 4  # halves between levels, under powers of two
    found = []
    for weight in (normal, ties, normal.bfloat16().float()):
        found.append({"weight": weight.tolist(), "cases": [case(weight, name) for name in ("mxfp4", "nvfp4")]})
    Path(__file__).with_name("block_float4.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
