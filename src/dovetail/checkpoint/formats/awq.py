"""AWQ checkpoints (AutoAWQ's "gemm" layout): integers of 4 bits with zero points, packed along the outputs.

| tensor    | shape and dtype           | holds                                                     |
|-----------|---------------------------|-----------------------------------------------------------|
| `qweight` | (in, out / 8) int32       | codes; the nibbles of a word are outputs 0 2 4 6 1 3 5 7  |
| `qzeros`  | (groups, out / 8) int32   | zero points, in the same order                            |
| `scales`  | (groups, out) float16     | scales                                                    |

value = (code - zero point) * scale in the dtype of the scales (gptqmodel 7.7, `quantization/awq`). A zero point of 0
fits, and vLLM reads groups with zero points.

gptqmodel decodes what is written where it is installed (`dovetail.checkpoint.formats.gptqmodel`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.checkpoint.formats.gptqmodel import GPTQModelFormat, installed
from dovetail.checkpoint.formats.integers import integer_grid, integers
from dovetail.checkpoint.formats.words import WORD, from_words, to_words
from dovetail.errors import ExportError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.integer import Int

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble of a word -> output among the eight of the word."""
BITS = 4
GROUPS = (128, 64, 32)


class AWQ(GPTQModelFormat):
    """int and gptq of 4 bits."""

    def __init__(self) -> None:
        super().__init__("awq", "gptqmodel dequantize_gemm")

    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        affine = self.affine(where, quantized)
        fix = "use int(bits=4, group=64, scale_bits=7)"
        if affine.bits != BITS:
            raise self.refused(where, quantized, "AWQ holds 4 bits", fix)
        if affine.shape[0] % WORD or affine.shape[1] % WORD:
            raise self.refused(where, quantized, f"inputs and outputs must be multiples of {WORD}", "exclude the layer")
        if affine.block % GROUPS[-1]:
            raise self.refused(where, quantized, "groups must be whole ones of 32, 64 or 128", fix)
        return f"int4, groups of {_group(affine)}"

    def check_experts(self, where: str, grids: Sequence[QuantizedWeight]) -> None:
        self.one_grid(where, grids)

    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(quantized, AffineWeight)
        scale_og, zero_og = self.scales_and_zeros(quantized, _group(quantized))
        return {
            "qweight": _packed(quantized.codes_of(0, quantized.shape[0])[0]),
            "qzeros": _packed(zero_og),
            "scales": scale_og.t().contiguous(),
        }

    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        scale_go = tensors["scales"].to(dtype)
        group = quantized.shape[1] // len(scale_go)
        if installed():
            from gptqmodel.quantization.awq.utils.packing_utils import (  # pyright: ignore[reportMissingImports]
                dequantize_gemm,
            )

            return dequantize_gemm(tensors["qweight"], tensors["qzeros"], scale_go, BITS, group).t()
        step_og = _unpacked(tensors["qweight"]).to(torch.int16)
        step_og -= _unpacked(tensors["qzeros"]).to(torch.int16).repeat_interleave(group, dim=1)
        return step_og * scale_go.t().repeat_interleave(group, dim=1)

    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        groups = {_group(quantized) for quantized in layers.values() if isinstance(quantized, AffineWeight)}
        if len(groups) > 1:
            found, rule = f"groups of {' and '.join(map(str, sorted(groups)))}", "AWQ has one group size for all layers"
            raise ExportError("export to awq", found=found, rule=rule, fix=f"set group={min(groups)}")
        fields = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": groups.pop(),
            "zero_point": True,
            "modules_to_not_convert": list(outside) or None,
        }
        return {"quantization_config": fields}

    def grid(self, parts: Mapping[str, Tensor], get: Callable[[str], Tensor], shape: tuple[int, int]) -> Int | None:
        if "qweight" not in parts:
            return None
        link = integer_grid(parts["qweight"].shape[1] * WORD / shape[0], shape[1], len(parts["scales"]), False)
        if link.bits != BITS or parts["qweight"].shape[0] != shape[1]:
            raise ValueError(f"qweight of shape {tuple(parts['qweight'].shape)}")
        return link

    def read(self, tensors: Mapping[str, Tensor], empty: QuantizedWeight) -> AffineWeight:
        assert isinstance(empty, AffineWeight)
        codes, zero_og = _unpacked(tensors["qweight"]), _unpacked(tensors["qzeros"])
        return integers(empty, codes, tensors["scales"].t(), zero_og)


def _group(quantized: AffineWeight) -> int:
    return next(group for group in GROUPS if quantized.block % group == 0)


def _packed(code_oi: Tensor) -> Tensor:
    """Return codes (o, i) uint8 as words (i, o / 8) int32."""
    by_word = code_oi.t().reshape(code_oi.shape[1], -1, len(ORDER))
    return to_words(by_word[..., list(ORDER)].reshape(code_oi.shape[1], -1), BITS)


def _unpacked(word_io: Tensor) -> Tensor:
    """Return words (i, o / 8) int32 as codes (o, i) uint8."""
    by_word = from_words(word_io, BITS).view(len(word_io), -1, len(ORDER))
    code = torch.empty_like(by_word)
    code[..., list(ORDER)] = by_word
    return code.view(len(word_io), -1).t().contiguous()
