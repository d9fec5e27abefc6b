"""MLX, the format of mlx-lm on Apple silicon: integers of 2, 3, 4 and 8 bits, and mxfp4.

| tensor   | shape and dtype               | holds                                           |
|----------|-------------------------------|-------------------------------------------------|
| `weight` | (out, in * bits / 32) uint32  | codes, the first one in the lowest bits         |
| `scales` | (out, groups) float, or uint8 | scales; of mxfp4 the bytes of an e8m0 number    |
| `biases` | (out, groups) float           | -scale * zero point; absent for mxfp4           |

value = scale * code + bias in the dtype of the scales (`mlx.core.dequantize`), which is the dtype that is served. In
float32 both terms are exact. In float16 they are where a scale has 7 significant bits (4 for 8-bit codes). In bfloat16
a bias loses bits of almost any scale: MLX models of Dovetail are served in float16 or float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.chains.packing import pack
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.formats.integers import integer_grid, integers
from dovetail.checkpoint.formats.words import from_words, to_words
from dovetail.errors import LoadError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.block_float4 import E2M1, MXFP4
from dovetail.links.quantize.codebook import CodeBookWeight

GROUPS = (128, 64, 32)
"""The group sizes of MLX."""


class MLX(Format):
    """int and gptq of 2, 3, 4 and 8 bits, and mxfp4."""

    name = "mlx"
    package = "mlx"
    decoder = "mlx.core.dequantize"
    dtypes = ("float16", "float32")

    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        if _is_mxfp4(quantized):
            return "mxfp4"
        affine = self.affine(where, quantized)
        fix = "use int(bits=4, group=32, symmetric=signed, scale_bits=7)"
        if affine.bits not in (2, 3, 4, 8):
            raise self.refused(where, quantized, "MLX holds 2, 3, 4 and 8 bits", fix)
        if affine.block % 32:
            raise self.refused(where, quantized, "groups must be whole ones of 32, 64 or 128", fix)
        return f"affine, {affine.bits} bits, groups of {_group(affine)}"

    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        o = quantized.shape[0]
        words = to_words(quantized.codes_of(0, o)[0], quantized.bits).view(torch.uint32)
        if not isinstance(quantized, AffineWeight):
            return {"weight": words, "scales": quantized.get_buffer("scale").view(torch.uint8).view(o, -1)}
        repeats = quantized.block // _group(quantized)
        scale_og = quantized.block_scales().view(o, -1).repeat_interleave(repeats, dim=1)
        bias_og = -scale_og * quantized.zero_points().repeat_interleave(repeats, dim=1)
        for exact in (scale_og, bias_og):
            if not torch.equal(exact.to(dtype).float(), exact):
                rule = "scale and scale * zero point must be exact in the served dtype"
                fix = "use scale_bits=7 (4 for 8-bit codes), or dtype=float32"
                raise self.refused(str(dtype).removeprefix("torch."), quantized, rule, fix)
        return {"weight": words, "scales": scale_og.to(dtype), "biases": bias_og.to(dtype)}

    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        import mlx.core as mx

        numbers = {name: tensor if tensor.dtype in (torch.uint8, torch.uint32) else tensor.to(dtype)
                   for name, tensor in tensors.items()}  # fmt: skip
        arrays = {name: mx.array(tensor.numpy()) for name, tensor in numbers.items()}
        said = _settings(quantized)
        wide = {"float32": mx.float32, "float16": mx.float16}[str(dtype).removeprefix("torch.")]
        values = mx.dequantize(arrays["weight"], arrays["scales"], arrays.get("biases"), dtype=wide, **said)
        return torch.from_numpy(np.array(values))

    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        said = {name: tuple(_settings(quantized).items()) for name, quantized in layers.items()}
        most = Counter(said.values()).most_common(1)[0][0]
        fields: dict[str, Any] = dict(most)
        fields |= {name: dict(each) for name, each in said.items() if each != most}
        return {"quantization": fields, "quantization_config": fields}

    def grid(
        self, parts: Mapping[str, Tensor], get: Callable[[str], Tensor], shape: tuple[int, int]
    ) -> Quantizer | None:
        if "scales" not in parts:
            return None
        bits, groups = parts["weight"].shape[1] * 32 / shape[1], parts["scales"].shape[1]
        if parts["scales"].dtype != torch.uint8:
            return integer_grid(bits, shape[1], groups, False)
        if bits != 4 or groups * 32 != shape[1]:
            rule = "of the formats with scales of 8 bits, mxfp4 is read"
            raise LoadError("scales", found=f"{bits:g} bits in {groups} groups", rule=rule, fix="load it without grid")
        return MXFP4()

    def read(self, tensors: Mapping[str, Tensor], empty: QuantizedWeight) -> QuantizedWeight:
        codes = from_words(tensors["weight"], empty.bits)
        if not isinstance(empty, AffineWeight):
            scale = tensors["scales"].view(torch.float8_e8m0fnu).view(-1)
            if bool((tensors["scales"] == 255).any()):
                rule, fix = "scales must be numbers", "download the files again"
                raise LoadError("scales", found="a scale that is NaN", rule=rule, fix=fix)
            buffers = {"codes": pack(codes, empty.bits), "scale": scale}
            empty.load_state_dict(buffers)
            return empty
        scale_og, bias_og = tensors["scales"].float(), tensors["biases"].float()
        zero_og = torch.where(scale_og == 0, torch.zeros_like(scale_og), -bias_og / scale_og).round()
        if not bool(((zero_og >= 0) & (zero_og < 2**empty.bits)).all()):
            rule = "biases must be -scale times a code"
            raise LoadError("biases", found="others", rule=rule, fix="load it without grid")
        return integers(empty, codes, scale_og, zero_og.to(torch.uint8))

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        return ["layers without scales are not quantized; mlx-lm finds them by their tensors"]


def _is_mxfp4(quantized: QuantizedWeight) -> bool:
    if not isinstance(quantized, CodeBookWeight) or quantized.book.name != E2M1.name:
        return False
    return dict(quantized.named_buffers())["scale"].dtype == torch.float8_e8m0fnu


def _group(quantized: AffineWeight) -> int:
    return next(group for group in GROUPS if quantized.block % group == 0)


def _settings(quantized: QuantizedWeight) -> dict[str, Any]:
    """Return the arguments of `mlx.core.dequantize`, which config.json has too."""
    if not isinstance(quantized, AffineWeight):
        return {"group_size": quantized.block, "bits": quantized.bits, "mode": "mxfp4"}
    return {"group_size": _group(quantized), "bits": quantized.bits, "mode": "affine"}
