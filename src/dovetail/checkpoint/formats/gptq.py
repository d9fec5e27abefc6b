"""GPTQ checkpoints, the format of gptqmodel: integers of 2, 3, 4 and 8 bits, packed along the inputs.

| tensor    | shape and dtype                 | holds                                                        |
|-----------|---------------------------------|--------------------------------------------------------------|
| `qweight` | (in * bits / 32, out) int32     | the codes of a column of words, first code in the lowest bits |
| `qzeros`  | (groups, out * bits / 32) int32 | zero points; version 1 stores them minus 1                   |
| `scales`  | (groups, out) float16           | scales                                                       |
| `g_idx`   | (in,) int32                     | the group of each input                                      |

value = scales[g_idx] * (code - zero point), computed in the dtype of the scales (gptqmodel 7.7,
`nn_modules/qlinear`). Version 1 (`gptq`) is read by more engines; it cannot hold a zero point of 0, which version 2
(`gptq_v2`) can. Dovetail's `gptq` rounds the inputs in the order of their size (`act_order`), but its groups are those
of the layer's own order: `g_idx` is i // group and "desc_act" is false.

gptqmodel decodes what is written where it is installed (`dovetail.checkpoint.formats.gptqmodel`).
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.checkpoint.formats.gptqmodel import GPTQModelFormat, installed
from dovetail.checkpoint.formats.integers import integer_grid, integers
from dovetail.checkpoint.formats.words import WORD, from_words, to_words
from dovetail.errors import LoadError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.integer import Int

GROUPS = (1024, 512, 256, 128, 64, 32, 16)
"""The group sizes that gptqmodel reads, beside one group per row."""


class GPTQFormat(GPTQModelFormat):
    """int and gptq of 2, 3, 4 and 8 bits."""

    def __init__(self, version: Literal[1, 2]) -> None:
        """Version 1 stores zero points minus 1, version 2 zero points."""
        super().__init__("gptq" if version == 1 else "gptq_v2", "gptqmodel TorchLinear.dequantize_weight")
        self.version = version

    def kind(self, where: str, quantized: QuantizedWeight) -> str:
        affine = self.affine(where, quantized)
        fix = "use int(bits=4, group=32, symmetric=signed, scale_bits=7)"
        if affine.bits not in (2, 3, 4, 8):
            raise self.refused(where, quantized, "GPTQ holds 2, 3, 4 and 8 bits", fix)
        if affine.shape[0] % WORD or affine.shape[1] % WORD:
            raise self.refused(where, quantized, f"inputs and outputs must be multiples of {WORD}", "exclude the layer")
        if _group(affine) == 0:
            raise self.refused(where, quantized, "groups must be whole ones of 16, 32, 64 or 128", fix)
        sides = "symmetric" if affine.zero_og is None else "asymmetric"
        return f"int{affine.bits}, {sides}, " + ("rows" if _is_rows(affine) else f"groups of {_group(affine)}")

    def check_experts(self, where: str, grids: Sequence[QuantizedWeight]) -> None:
        self.one_grid(where, grids)

    def encode(self, quantized: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(quantized, AffineWeight)
        (o, i), bits = quantized.shape, quantized.bits
        group = _group(quantized)
        scale_og, zero_og = self.scales_and_zeros(quantized, group)
        if self.version == 1:
            if not bool(zero_og.all()):
                rule = "version 1 stores zero points minus 1, and some are 0"
                raise self.refused(self.name, quantized, rule, "use the format gptq_v2, or symmetric=signed")
            zero_og = zero_og - 1
        return {
            "qweight": to_words(quantized.codes_of(0, o)[0], bits).t().contiguous(),
            "qzeros": to_words(zero_og.t().contiguous(), bits),
            "scales": scale_og.t().contiguous(),
            "g_idx": torch.arange(i, dtype=torch.int32) // group,
        }

    def decode(self, tensors: Mapping[str, Tensor], quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        assert isinstance(quantized, AffineWeight)
        if installed():
            return _by_gptqmodel(tensors, quantized.bits, self.version, dtype)
        code_io = from_words(tensors["qweight"].t().contiguous(), quantized.bits).t().to(torch.int32)
        zero_go = from_words(tensors["qzeros"], quantized.bits).to(torch.int32) + (2 - self.version)
        group_i = tensors["g_idx"].long()
        return (tensors["scales"].to(dtype)[group_i] * (code_io - zero_go[group_i])).t()

    def config(
        self, layers: Mapping[str, QuantizedWeight], outside: Sequence[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        rows = all(_is_rows(quantized) for quantized in layers.values())
        said = {name: _settings(quantized, rows) for name, quantized in layers.items()}
        most = Counter(said.values()).most_common(1)[0][0]
        # gptqmodel and vLLM read these patterns: other settings for the layers that match, or none at all ("-:").
        dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in outside}
        dynamic |= {f"+:^{re.escape(name)}$": dict(each) for name, each in said.items() if each != most}
        fields = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            **dict(most),
            "desc_act": False,
            "lm_head": "lm_head" in layers,
            "pack_dtype": "int32",
            "dynamic": dynamic or None,
            "meta": {"quantizer": ["dovetail"]},
        }
        return {"quantization_config": fields}

    def grid(self, parts: Mapping[str, Tensor], get: Callable[[str], Tensor], shape: tuple[int, int]) -> Int | None:
        if "qweight" not in parts:
            return None
        o, i = shape
        link = integer_grid(parts["qweight"].shape[0] * WORD / i, i, len(parts["scales"]), False)
        if parts["qzeros"].shape != (len(parts["scales"]), o * link.bits // WORD):
            raise ValueError(f"qzeros of shape {tuple(parts['qzeros'].shape)}")
        symmetric = bool((self._zero_points(get("qzeros"), link.bits) == 2 ** (link.bits - 1)).all())
        return replace(link, symmetric=symmetric)

    def read(self, tensors: Mapping[str, Tensor], empty: QuantizedWeight) -> AffineWeight:
        assert isinstance(empty, AffineWeight)
        i, group_i = empty.shape[1], tensors["g_idx"]
        if not torch.equal(group_i.long(), torch.arange(i) // empty.block):
            rule = "the inputs of a group must lie beside each other (desc_act: false)"
            raise LoadError("g_idx", found="groups in the order of activations", rule=rule, fix="load it without grid")
        codes = from_words(tensors["qweight"].t().contiguous(), empty.bits)
        zero_go = self._zero_points(tensors["qzeros"], empty.bits)
        zero_og = None if empty.zero_og is None else zero_go.t().contiguous()
        return integers(empty, codes, tensors["scales"].t(), zero_og)

    def _zero_points(self, words: Tensor, bits: int) -> Tensor:
        """Return the zero points, uint8 (groups, out). Raises LoadError for one that the codes do not have."""
        zero_go = from_words(words, bits)
        if self.version == 1:
            if bool((zero_go == 2**bits - 1).any()):
                found, rule = f"a zero point of {2**bits}", "zero points must be codes"
                raise LoadError("qzeros", found=found, rule=rule, fix="load it without grid")
            zero_go += 1
        return zero_go

    def stock_arguments(self, layers: Mapping[str, QuantizedWeight]) -> dict[str, Any] | None:
        if not installed() or importlib.util.find_spec("optimum") is None:
            return None
        from transformers import GPTQConfig

        # Other kernels than the plain one are compiled when they are chosen, and round in an order of their own.
        said = self.config(layers, [], torch.float16)["quantization_config"]
        if any(name.startswith("+:") for name in said["dynamic"] or ()):
            return None  # optimum reads one setting
        fields = {key: said[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")}
        return {"quantization_config": GPTQConfig(**fields, backend="gptq_torch")}

    def notes(self, layers: Mapping[str, QuantizedWeight], dtype: torch.dtype) -> list[str]:
        found = super().notes(layers, dtype)
        if self.version == 2:
            found.append("version 2 is read by gptqmodel and vLLM; optimum and older engines read version 1")
        return found


def _is_rows(quantized: QuantizedWeight) -> bool:
    return quantized.block == quantized.shape[1]


def _group(quantized: AffineWeight) -> int:
    """Return the group size to write, 0 where groups are not whole ones that the format has."""
    if _is_rows(quantized):
        return quantized.block
    return next((group for group in GROUPS if quantized.block % group == 0), 0)


def _settings(quantized: QuantizedWeight, rows: bool) -> tuple[tuple[str, Any], ...]:
    """Return the fields of config.json of a layer; a group of -1 is a row, of whatever length."""
    assert isinstance(quantized, AffineWeight)
    group = -1 if rows or _group(quantized) not in GROUPS else _group(quantized)
    return (("bits", quantized.bits), ("group_size", group), ("sym", quantized.zero_og is None))


def _by_gptqmodel(tensors: Mapping[str, Tensor], bits: int, version: int, dtype: torch.dtype) -> Tensor:
    """Return the values (o, i) that gptqmodel's plain torch kernel makes of the tensors of a layer."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # pyright: ignore[reportMissingImports]
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module  # pyright: ignore[reportMissingImports]

    i, o = len(tensors["g_idx"]), tensors["scales"].shape[1]
    group = i // len(tensors["scales"])
    layer = TorchLinear(bits, group if group in GROUPS else -1, False, False, i, o).eval()
    for name, tensor in tensors.items():
        layer.register_buffer(name, tensor.to(dtype) if name == "scales" else tensor.clone())
    if version == 1:
        convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    return layer.dequantize_weight().t()
