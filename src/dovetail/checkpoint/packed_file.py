"""What `packed.safetensors` holds: its header, the names of its tensors, and weights as a mask and what isn't zero.

    NAME                       every parameter and persistent buffer under its name in the model, tied ones once
    LAYER.base.quantized.NAME  a quantized layer's codes, scales and zero points, as they are in memory
    LAYER.base.dense           the weight of a packed layer that isn't quantized
    KEY.mask, KEY.values       in place of the codes or the weight KEY, where these two are smaller: one bit a weight,
                               set where it isn't zero, and in order the codes (packed) or weights that aren't

Metadata "dovetail": `PackedHeader` as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dovetail.chains.layer.base import Base
from dovetail.chains.layer.bits import INTEGERS, join_zeros, split_zeros
from dovetail.chains.packing import pack, unpack
from dovetail.errors import LoadError

PACKED = "packed.safetensors"
HEADER = "dovetail"
FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CHUNK = 1 << 20
"""Weights whose zeros are looked for, or put back, at a time."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


class PackedLayer(pydantic.BaseModel, extra="forbid", frozen=True):
    """What the header says of a layer.

    shape      (out, in) of its weight as a matrix
    dtype      of the weight, or the one that codes are dequantized to
    quantizer  identity of its grid; None for a dense layer
    nonzero    number of stored values, where zeros are bits; None where all codes or weights are stored
    """

    shape: tuple[int, int]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    quantizer: Annotated[str, pydantic.Field(max_length=200)] | None
    nonzero: pydantic.NonNegativeInt | None


class PackedHeader(pydantic.BaseModel, extra="forbid", frozen=True):
    """What the header says: the model's class, and its packed layers by path."""

    format: Literal["dovetail-packed"] = "dovetail-packed"
    version: Literal[1] = 1
    architecture: str
    layers: dict[str, PackedLayer]


@dataclass(frozen=True)
class PackedSize:
    """What a packed model takes on disk, which for pruned layers is less than in memory (`dovetail.footprint`).

    nbytes           of packed.safetensors, its header included
    bits_per_weight  stored bits of the packed layers' weights (codes or values, masks, scales, zero points) over their
                     number of weights, zeros counted
    """

    nbytes: int
    bits_per_weight: float


def packed_size(directory: str | Path) -> PackedSize:
    """What a packed model takes on disk, from its header alone. Raises LoadError where the folder holds none."""
    path = Path(directory) / PACKED
    try:
        with safe_open(path, framework="pt") as file:
            header = read_header(str(path), file)
            weights = sum(layer.shape[0] * layer.shape[1] for layer in header.layers.values())
            bits = 0
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.rpartition(".base.")[0] in header.layers:
                    shape, dtype = shape_of(str(path), file, key)
                    bits += 8 * dtype.itemsize * shape.numel()
    except (OSError, SafetensorError) as error:
        rule = f"a packed model's folder holds a whole {PACKED}"
        raise LoadError(str(path), found=str(error), rule=rule, fix="copy the folder again") from None
    return PackedSize(nbytes=path.stat().st_size, bits_per_weight=bits / max(weights, 1))


def read_header(where: str, file: Any) -> PackedHeader:
    """The header of an open file. Raises LoadError."""
    text = (file.metadata() or {}).get(HEADER)
    if text is None:
        rule = f'the metadata of {PACKED} say under "{HEADER}" what it holds'
        raise LoadError(where, found="a file that save_packed did not write", rule=rule)
    try:
        return PackedHeader.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "header"
        raise LoadError(where, found=f"{place}: {first['msg']}", rule="the header as Dovetail writes it") from None


def shape_of(where: str, file: Any, key: str) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of a tensor of an open file, which isn't read. Raises LoadError for a dtype that no model has."""
    part = file.get_slice(key)
    if (dtype := _DTYPES.get(part.get_dtype())) is None:
        raise LoadError(where, found=f"{key[:200]} of dtype {part.get_dtype()}", rule=f"dtypes: {', '.join(_DTYPES)}")
    return torch.Size(part.get_shape()), dtype


def stored(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Parameters and persistent buffers, each once with all its names; it is stored under the first."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from found.values()


def whole(name: str, base: Base) -> str:
    """The name of the tensor that zeros can be taken out of."""
    return f"{name}.base." + ("dense" if base.quantized is None else "quantized.codes")


def _chunks(base: Base) -> Iterator[tuple[int, int]]:
    """Ranges of rows of the matrix, whole multiples of 8 of them."""
    o, i = base.shape
    step = max(8, _CHUNK // i // 8 * 8)
    for first in range(0, o, step):
        yield first, min(first + step, o)


def _numbers(base: Base) -> Iterator[tuple[Tensor, Tensor]]:
    """The base as integers, by chunks, and what stands for zero: codes by rows, or a dense weight's bits as it lies."""
    i = base.shape[1]
    for first, last in _chunks(base):
        if base.quantized is not None:
            codes, zero = base.quantized.codes_of(first, last)
            yield codes.view(-1), zero.reshape(-1)
        else:
            assert base.dense is not None
            flat = base.dense.detach().reshape(-1)[first * i : last * i].view(INTEGERS[base.dtype.itemsize])
            yield flat, flat.new_zeros(1)


def split(base: Base) -> tuple[Tensor, Tensor, int]:
    """Mask, stored values and their number."""
    mask, values = split_zeros(_numbers(base))
    stored = values.view(base.dtype) if base.quantized is None else pack(values, base.quantized.bits)
    return mask, stored, values.numel()


def join(base: Base, mask: Tensor, stored: Tensor, count: int) -> None:
    """The reverse, into the base, whose grid is there already."""
    if base.quantized is not None:
        i = base.shape[1]
        zeros = (
            base.quantized.zero_codes(first, last).expand(last - first, i).reshape(-1) for first, last in _chunks(base)
        )
        codes = join_zeros(mask, unpack(stored, base.quantized.bits, 0, count), zeros)
        base.set_quantized(base.quantized.with_codes(codes.view(base.shape)))
    else:
        assert base.dense is not None
        whole, i = INTEGERS[base.dtype.itemsize], base.shape[1]
        zeros = (torch.zeros((last - first) * i, dtype=whole) for first, last in _chunks(base))
        flat = join_zeros(mask, stored.view(whole), zeros).view(stored.dtype)
        base.dense = nn.Parameter(flat.view(base.dense.shape), requires_grad=False)
