"""compressed-tensors, the format of vLLM: int4 and int8 as packed integers, fp8 as numbers.

| grid                    | tensors beside the layer's name                                              |
|-------------------------|------------------------------------------------------------------------------|
| int, gptq, 4 and 8 bits | `weight_packed` int32, `weight_scale` (o, groups), `weight_shape`            |
| the same, asymmetric    | and `weight_zero_point` int32, packed along the outputs                      |
| fp8                     | `weight` float8_e4m3fn, `weight_scale` (o, 1) or (1,)                        |

value = (code - zero point) * scale, both converted to the scale's dtype first (compressed-tensors 0.20,
`quantization/lifecycle/forward.py`). Engines make the scale in the dtype that they serve: in bfloat16 the values are
ours where a scale has at most 8 significant bits (`scale_bits`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.formats.integers import integer_grid, integers
from dovetail.errors import LoadError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.fp8 import Float8, Float8Weight

_ASYMMETRIC = (
    "asymmetric layers: the default loader of transformers 5.23 refuses the shape of their zero points; load with "
    "CompressedTensorsConfig(dequantize=True), or use symmetric=signed"
)


class CompressedTensors(Format):
    """int of 4 and 8 bits in groups or rows, and fp8."""

    name = "compressed-tensors"
    package = "compressed-tensors"
    decoder = "compressed_tensors BaseCompressor.decompress"
    dense = True

    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        if isinstance(quantized, Float8Weight):
            return "fp8, one scale " + ("per matrix" if quantized.scale.numel() == 1 else "per row")
        fix = "use int(bits=4, group=32, symmetric=signed, scale_bits=4)"
        if not isinstance(quantized, AffineWeight):
            rule = "compressed-tensors holds integers with a scale per group, and fp8"
            raise self.refused(where, quantized, rule, fix)
        quantized = self.affine(where, quantized)
        if quantized.bits not in (4, 8):
            raise self.refused(where, quantized, "engines read integers of 4 and 8 bits", fix)
        sides = "symmetric" if quantized.zero_og is None else "asymmetric"
        groups = "rows" if quantized.block == quantized.shape[1] else f"groups of {quantized.block}"
        return f"int{quantized.bits}, {sides}, {groups}"

    def check_experts(self, where: str, grids: Sequence[QuantizedWeight]) -> None:
        self.one_grid(where, grids)
        if _is_asymmetric(grids[0]):
            rule = "transformers and vLLM read MoE experts without zero points"
            raise self.refused(where, grids[0], rule, "set symmetric=signed")

    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        (o, i) = quantized.shape
        if isinstance(quantized, Float8Weight):
            scale = quantized.scale if quantized.scale.numel() == 1 else quantized.scale[:, None]
            return {"weight": quantized.codes, "weight_scale": _served(scale, dtype)}
        assert isinstance(quantized, AffineWeight)
        half, groups = 2 ** (quantized.bits - 1), i // quantized.block
        codes, _ = quantized.codes_of(0, o)
        tensors = {
            "weight_packed": pack_to_int32((codes.to(torch.int16) - half).to(torch.int8), quantized.bits),
            "weight_scale": _served(quantized.block_scales().view(o, groups), dtype),
            "weight_shape": torch.tensor([o, i]),
        }
        if quantized.zero_og is not None:
            zero = quantized.zero_points()
            packed = pack_to_int32((zero.to(torch.int16) - half).to(torch.int8), quantized.bits, packed_dim=0)
            tensors["weight_zero_point"] = packed.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        group = _group(quantized, ["Linear"])
        scheme = QuantizationScheme.model_validate(group)
        served: dict[str, Tensor | None] = {**tensors, "weight_scale": tensors["weight_scale"].to(dtype)}
        weight = BaseCompressor.get_value_from_registry(group["format"]).decompress(served, scheme)["weight"]
        assert weight is not None
        return weight

    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        names: dict[str, dict[str, None]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for name, quantized in layers.items():
            kind = self.kind(name, quantized)
            names.setdefault(kind, {})[_target(name)] = None
            groups[kind] = _group(quantized, ["Linear"])
        if len(groups) > 1:
            groups = {kind: group | {"targets": list(names[kind])} for kind, group in groups.items()}
        fields = {
            "quant_method": "compressed-tensors",
            "format": next(iter(groups.values()))["format"] if len(groups) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups.values())},
            "ignore": list(outside),
        }
        return {"quantization_config": fields}

    def grid(
        self, parts: Mapping[str, Tensor], get: Callable[[str], Tensor], shape: tuple[int, int]
    ) -> Quantizer | None:
        if unknown := set(parts) - {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}:
            rule, fix = "layers must be pack-quantized integers or float-quantized", "load it without grid"
            raise LoadError("a quantized layer", found=", ".join(sorted(unknown))[:200], rule=rule, fix=fix)
        if "weight_packed" in parts:
            bits = parts["weight_packed"].shape[1] * 32 / shape[1]
            return integer_grid(bits, shape[1], parts["weight_scale"].shape[1], "weight_zero_point" not in parts)
        if parts["weight"].dtype != torch.float8_e4m3fn:
            rule, fix = "layers must be pack-quantized integers or float-quantized", "load it without grid"
            raise LoadError("a quantized layer", found=f"weight of {parts['weight'].dtype}", rule=rule, fix=fix)
        return Float8(scale="tensor" if parts["weight_scale"].numel() == 1 else "row")

    def read(self, tensors: Mapping[str, Tensor], empty: QuantizedWeight) -> QuantizedWeight:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        scale, (o, i) = tensors["weight_scale"], empty.shape
        if isinstance(empty, Float8Weight):
            empty.load_state_dict({"codes": tensors["weight"], "scale": scale.float().view(-1)})
            not_numbers = empty.codes.view(torch.uint8) & 0x7F == 0x7F
            if bool(not_numbers.any()) or not bool(torch.isfinite(empty.scale).all()):
                rule, fix = "weights must be finite", "download the files again"
                raise LoadError("weight", found="NaN or infinity", rule=rule, fix=fix)
            return empty
        assert isinstance(empty, AffineWeight)
        half = 2 ** (empty.bits - 1)
        codes = unpack_from_int32(tensors["weight_packed"], empty.bits, torch.Size((o, i))).to(torch.int16) + half
        zero_og = None
        if (packed := tensors.get("weight_zero_point")) is not None:
            zeros = torch.Size((o, i // empty.block))
            zero_og = (unpack_from_int32(packed, empty.bits, zeros, packed_dim=0).to(torch.int16) + half).to(
                torch.uint8
            )
        return integers(empty, codes.to(torch.uint8), scale, zero_og)

    def stock_arguments(self, layers: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
        from transformers import CompressedTensorsConfig

        if any(map(_is_asymmetric, layers.values())):
            return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        return {}

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        return [_ASYMMETRIC] if any(map(_is_asymmetric, layers.values())) else []


_EXPERT = re.compile(r"(.*\bexperts)\.\d+\..+")
"""The path of a layer of an MoE expert in a checkpoint."""


def _target(name: str) -> str:
    """Return how "config_groups" names a layer; transformers finds the group of MoE experts by such a pattern."""
    expert = _EXPERT.fullmatch(name)
    return name if expert is None else f"re:{re.escape(expert[1])}[.].*"


def _is_asymmetric(quantized: QuantizedWeight) -> bool:
    return isinstance(quantized, AffineWeight) and quantized.zero_og is not None


def _served(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales in the dtype that is served where it holds them, else as they are, in float32 or float16."""
    for narrow in (dtype, torch.float16):
        if torch.equal(scale.to(narrow).float(), scale.float()):
            return scale.to(narrow).contiguous()
    return scale.float().contiguous()


def _group(quantized: QuantizedWeight, targets: list[str]) -> dict[str, Any]:
    """Return the entry of "config_groups" for a grid."""
    if isinstance(quantized, Float8Weight):
        strategy = "tensor" if quantized.scale.numel() == 1 else "channel"
        weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
        return {"targets": targets, "weights": weights, "format": "float-quantized"}
    assert isinstance(quantized, AffineWeight)
    weights = {"num_bits": quantized.bits, "type": "int", "symmetric": quantized.zero_og is None}
    if quantized.block == quantized.shape[1]:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": quantized.block}
    return {"targets": targets, "weights": weights, "format": "pack-quantized"}
