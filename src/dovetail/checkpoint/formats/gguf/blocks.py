"""The grids that GGUF's blocks hold: a kept one as it is, and integers as steps (code - zero point) of a scale.

| grid                                                     | format | steps         |
|----------------------------------------------------------|--------|---------------|
| kept (`dovetail.links.quantize.keep`)                    | its own|               |
| int, gptq of 2, 3, 4 bits, symmetric or signed           | Q4_0   | -8 to 7       |
| int, gptq, hqq(zero=exact) of 1, 2, 3 bits, asymmetric   | Q4_0   | -7 to 7       |
| the same of 4 bits, scale_bits=4 or 7                    | Q4_1   | code * scale - zero * scale |
| the same of 4 bits                                       | Q5_0   | -15 to 15     |
| int, gptq of 8 bits, symmetric or signed                 | Q8_0   | -128 to 127   |
| mxfp4                                                    | MXFP4  |               |

A group of several blocks repeats its scale. The values are those of the grid, bit for bit: steps times a float16 scale
are exact in float32. Q4_1 needs offsets that float16 holds exactly, which scales of 7 significant bits give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer, arguments
from dovetail.chains.notation import chain
from dovetail.chains.packing import unpack
from dovetail.checkpoint.formats.contract import Format
from dovetail.errors import ExportError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.block_float4 import E2M1
from dovetail.links.quantize.codebook import CodeBookWeight
from dovetail.links.quantize.ggml import BLOCK_FORMATS, BlockFormat, BlockWeight
from dovetail.models.layouts import Conv1DLayout, LinearLayout

_FIX = "use int(bits=4, group=32, symmetric=signed, scale_bits=4)"
_BLOCK = 32


class GGUFBlocks(Format):
    """Blocks of 32 weights for integers and mxfp4, and the formats of kept layers."""

    name = "gguf"
    package = "gguf"
    decoder = "gguf.dequantize"
    dtypes = ("float32",)
    dense = True
    layouts = (LinearLayout, Conv1DLayout)

    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        return self.form(where, quantized).name

    def form(self, where: str, quantized: QuantizedWeight) -> BlockFormat:
        """Return the format, from the form of the grid alone. Raises ExportError for a grid that no format holds."""
        if isinstance(quantized, BlockWeight):
            return quantized.form
        if quantized.shape[1] % _BLOCK or quantized.block % _BLOCK:
            rule = f"groups, and the inputs of the layer, must be multiples of {_BLOCK}"
            raise self.refused(where, quantized, rule, _FIX)
        if isinstance(quantized, CodeBookWeight) and quantized.book is E2M1 and quantized.block == _BLOCK:
            return BLOCK_FORMATS["MXFP4"]
        weight = self.affine(where, quantized)
        if quantized.shape[1] % quantized.block:
            raise self.refused(where, quantized, "a group must lie in one row", _FIX)
        if weight.zero_og is None:
            return BLOCK_FORMATS["Q8_0" if weight.bits == 8 else "Q4_0"]
        if weight.bits == 8:
            rule = "the steps of 8 bits with zero points reach ±255, and those of Q8_0 ±128"
            raise self.refused(where, quantized, rule, "set symmetric=signed")
        if weight.bits < 4:
            return BLOCK_FORMATS["Q4_0"]
        (link,) = chain(weight.identity)
        narrow = isinstance(link, Quantizer) and arguments(link).get("scale_bits") is not None
        return BLOCK_FORMATS["Q4_1" if narrow else "Q5_0"]

    def check_experts(self, where: str, grids: Sequence[QuantizedWeight]) -> None:
        """Return: a file stacks the experts of a module; `placed` checks that those in a tensor have one format."""

    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        if not isinstance(quantized, BlockWeight):
            quantized = self.blocks(quantized)
        return {"weight": quantized.block_bytes()}

    def blocks(self, quantized: QuantizedWeight) -> BlockWeight:
        """Return the same values in blocks. Raises ExportError for scales that float16 does not hold."""
        form, (o, i) = self.form("", quantized), quantized.shape
        made = BlockWeight.empty((o, i), form, quantized.identity)
        codes, _ = quantized.codes_of(0, o)
        if isinstance(quantized, CodeBookWeight):
            made.scales = quantized.get_buffer("scale").view(torch.uint8).view(-1, 1)
            return made.with_codes(codes)
        assert isinstance(quantized, AffineWeight)
        repeats, groups = quantized.block // _BLOCK, i // quantized.block
        scale = quantized.block_scales().view(o, groups)
        zero = torch.full((o, groups), 2.0 ** (quantized.bits - 1))
        if quantized.zero_og is not None:
            zero = unpack(quantized.zero_og, quantized.bits, 0, o * groups).view(o, groups).float()
        numbers = [scale]
        if form.name == "Q4_1":
            numbers.append(-zero * scale)
        else:
            steps = codes.view(o, groups, -1).to(torch.int16) - zero[..., None].to(torch.int16)
            codes = (steps - form.lowest).to(torch.uint8)
        stored = torch.stack([number.to(torch.float16) for number in numbers], dim=-1)
        if not torch.equal(stored.float(), torch.stack(numbers, dim=-1)):
            rule = "scales, and for Q4_1 scales times zero points, must be exact in float16"
            raise self.refused(form.name, quantized, rule, "set symmetric=signed, or leave scale_bits out")
        made.scales = stored.repeat_interleave(repeats, dim=1).view(-1, len(numbers)).view(torch.uint8)
        return made.with_codes(codes.view(o, i))

    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        from gguf import GGMLQuantizationType, dequantize

        kind = GGMLQuantizationType[self.form("", quantized).name]
        values: np.ndarray = dequantize(tensors["weight"].numpy(), kind)
        return torch.from_numpy(values).to(dtype)

    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Return nothing: a GGUF file has its own metadata."""
        return {}

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        made = {q.identity: self.kind(name, q) for name, q in layers.items() if not isinstance(q, BlockWeight)}
        if "Q5_0" not in made.values():
            return []
        return ["Q5_0 holds 4 bits with zero points; OpenVINO does not read it. Use symmetric=signed for Q4_0"]

    def no_tensor(self, where: str, found: str, rule: str, fix: str) -> ExportError:
        """Return the error for a layer that cannot be put into a file."""
        return ExportError(f"export to {self.name}: {where}", found=found, rule=rule, fix=fix)
