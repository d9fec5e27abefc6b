"""bitsandbytes: nf4 and fp4, with scales in float32 or nested in 8 bits. Codes and scales are the same bytes there.

Beside a layer's name: `weight` (codes, uint8 (o i / 2, 1)), `weight.absmax`, `weight.quant_map` (the levels), with
nested scales `weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (JSON as
bytes), as `bitsandbytes.functional.QuantState.as_dict` gives them and transformers loads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer
from dovetail.checkpoint.formats.contract import Format
from dovetail.errors import LoadError
from dovetail.links.quantize import dynamic8
from dovetail.links.quantize.codebook import CodeBookWeight
from dovetail.links.quantize.nf import Float4, NormalFloat4


class BitsAndBytes(Format):
    """nf4 and fp4, the base of QLoRA."""

    name = "bitsandbytes"
    package = "bitsandbytes"
    decoder = "bitsandbytes.functional.dequantize_4bit"

    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        if not isinstance(quantized, CodeBookWeight) or quantized.book.name not in ("nf4", "fp4"):
            rule = "bitsandbytes holds nf4 and fp4 in 4 bits"
            raise self.refused(where, quantized, rule, "use nf4(double=true)")
        if quantized.shape[0] * quantized.shape[1] % 2:
            raise self.refused(where, quantized, "the number of weights must be even", "exclude the layer")
        return f"{quantized.book.name}, blocks of {quantized.block}" + (", nested" if _nested(quantized) else "")

    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(quantized, CodeBookWeight)
        parts = {f"weight.{name}": tensor for name, tensor in _state(quantized, dtype).as_dict(packed=True).items()}
        count = quantized.shape[0] * quantized.shape[1]
        return {"weight": quantized.codes[: count // 2].reshape(-1, 1), **parts}

    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {name.removeprefix("weight."): t.clone() for name, t in tensors.items() if name != "weight"}
        state: Any = QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = dtype
        return dequantize_4bit(tensors["weight"], state)

    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        some = next(iter(layers.values()))
        assert isinstance(some, CodeBookWeight)
        fields = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": some.book.name,
            "bnb_4bit_use_double_quant": _nested(some),
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(outside),
        }
        return {"quantization_config": fields}

    def grid(
        self, parts: Mapping[str, Tensor], get: Callable[[str], Tensor], shape: tuple[int, int]
    ) -> Quantizer | None:
        said = _read_state(parts, get)
        if said["shape"] != list(shape) or said["quant_type"] not in ("nf4", "fp4"):
            rule, fix = f"the layer must be nf4 or fp4 of shape {list(shape)}", "load it without grid"
            found = f"{said['quant_type']} of shape {said['shape']}"
            raise LoadError("weight.quant_state", found=found[:200], rule=rule, fix=fix)
        kind = {"nf4": NormalFloat4, "fp4": Float4}[said["quant_type"]]
        return kind(block=said["blocksize"], double="weight.nested_absmax" in parts)

    def read(self, tensors: Mapping[str, Tensor], empty: QuantizedWeight) -> QuantizedWeight:
        said = _read_state(tensors, tensors.__getitem__)
        stored = {"codes": tensors["weight"].view(-1)}
        if "weight.nested_absmax" in tensors:
            stored |= {
                "scale_codes": tensors["weight.absmax"],
                "scale_absmax": tensors["weight.nested_absmax"],
                "scale_offset": torch.tensor(said["nested_offset"], dtype=torch.float32),
            }
            if said["nested_blocksize"] != dynamic8.BLOCK:
                rule, fix = f"scales must be nested in blocks of {dynamic8.BLOCK}", "load it without grid"
                raise LoadError("weight.quant_state", found=str(said["nested_blocksize"]), rule=rule, fix=fix)
        else:
            stored["scale"] = tensors["weight.absmax"]
        if any(not bool(torch.isfinite(tensor).all()) for tensor in stored.values()):
            rule, fix = "scales must be finite", "download the files again"
            raise LoadError("weight.absmax", found="NaN or infinity", rule=rule, fix=fix)
        empty.load_state_dict(stored)
        return empty

    def stock_arguments(self, layers: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
        return {}

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        return ["vLLM no longer reads bitsandbytes: compressed-tensors is its format"]


def _read_state(parts: Mapping[str, Tensor], get: Callable[[str], Tensor]) -> dict[str, Any]:
    """Return the JSON of the one quant_state among the tensors of a layer, with the entries that are read."""
    keys = [part for part in parts if part.startswith("weight.quant_state.bitsandbytes__")]
    if len(keys) != 1:
        rule, fix = "a layer must have one weight.quant_state", "load it without grid"
        raise LoadError("weight.quant_state", found=f"{len(keys)} of them", rule=rule, fix=fix)
    said = json.loads(bytes(get(keys[0]).tolist()))
    wanted = ["shape", "quant_type", "blocksize"]
    wanted += ["nested_offset", "nested_blocksize"] if "weight.nested_absmax" in parts else []
    return {key: said[key] for key in wanted}


def _nested(quantized: CodeBookWeight) -> bool:
    return "scale_codes" in dict(quantized.named_buffers())


def _state(quantized: CodeBookWeight, dtype: torch.dtype) -> Any:
    """Return bitsandbytes' description of the weight: its scales, levels, shape and dtype."""
    from bitsandbytes.functional import QuantState

    levels = torch.tensor(quantized.book.levels)
    said: dict[str, Any] = {
        "shape": torch.Size(quantized.shape), "code": levels, "blocksize": quantized.block,
        "quant_type": quantized.book.name, "dtype": dtype,
    }  # fmt: skip
    if not _nested(quantized):
        return QuantState(absmax=quantized.get_buffer("scale"), **said)
    nested = QuantState(
        absmax=quantized.get_buffer("scale_absmax"),
        blocksize=dynamic8.BLOCK,
        code=torch.tensor(dynamic8.DYNAMIC_MAP),
        dtype=torch.float32,
    )
    offset = quantized.get_buffer("scale_offset")
    return QuantState(absmax=quantized.get_buffer("scale_codes"), offset=offset, state2=nested, **said)
