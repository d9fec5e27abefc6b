"""Makes quantize.json: codes, scales and values of small weights by reference code, none of it dovetail's.

nf4, fp4: bitsandbytes.functional on CPU (0.50.2). int: compressed-tensors 0.20 (symmetric) and the formula written out
element by element (asymmetric); fp8: torch's cast. Run: python tests/golden/quantize_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize


def floats(tensor: torch.Tensor) -> list[float]:
    return tensor.float().view(-1).tolist()


def four_bit(weight: torch.Tensor, kind: str, double: bool) -> dict:
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    stored = {"codes": floats(packed)}
    if double:
        stored |= {"scale_codes": floats(state.absmax), "scale_absmax": floats(state.state2.absmax)}
        stored |= {"scale_offset": floats(state.offset)}
    else:
        stored |= {"scale": floats(state.absmax)}
    return {
        "identity": f"{kind}(block=64, double={double})",
        "stored": stored,
        "values": dequantize_4bit(packed, state).tolist(),
    }


def symmetric(weight: torch.Tensor, bits: int, group: int) -> dict:
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group)
    scale = (weight.view(len(weight), -1, group).abs().amax(2) / ((2**bits - 1) / 2)).half()
    zero = torch.zeros_like(scale, dtype=torch.int8)
    codes = quantize(weight, scale.float(), zero, arguments, dtype=torch.int8)
    return {
        "identity": f"int(bits={bits}, group={group}, symmetric=True)",
        "stored": {"scale_og": floats(scale)},
        "values": dequantize(codes, scale.float(), zero, arguments, dtype=torch.float32).tolist(),
    }


def asymmetric(weight: torch.Tensor, bits: int, group: int) -> dict:
    scales, rows = [], []
    for row in weight:
        values = []
        for block in row.view(-1, group or len(row)):
            low, high = min(block.min(), torch.tensor(0.0)), max(block.max(), torch.tensor(0.0))
            scale = ((high - low) / (2**bits - 1)).half().float()
            zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
            scales.append(float(scale))
            values += [float(((w / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale)) for w in block]
        rows.append(values)
    identity = f"int(bits={bits}, group={group}, symmetric=False)"
    return {"identity": identity, "stored": {"scale_og": scales}, "values": rows}


def float8(weight: torch.Tensor) -> dict:
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scale[:, None]).tolist()
    return {
        "identity": 'fp8(scale="row")',
        "stored": {"codes": floats(codes), "scale": floats(scale)},
        "values": values,
    }


def main() -> None:
    weight = (torch.randn(4, 64, generator=torch.Generator().manual_seed(11)) * 0.05).bfloat16().float()
    weight[2, ::2] = 0
    cases = [four_bit(weight, kind, double) for kind in ("nf4", "fp4") for double in (False, True)]
    cases += [symmetric(weight, 4, 32), symmetric(weight, 8, 32)]
    cases += [asymmetric(weight, 4, 64), asymmetric(weight, 3, 32), asymmetric(weight, 8, 0), float8(weight)]
    for case in cases:
        case["weight"] = weight.tolist()
    Path(__file__).with_name("quantize.json").write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
    main()
