"""Scales as a grid stores them: one a block, in a float type, or in 8 bits with constants of their own.

| form      | tensors                                                | bits per scale |
|-----------|--------------------------------------------------------|----------------|
| "float16" | one, float16                                           | 16             |
| "float32" | one, float32                                           | 32             |
| "e8m0"    | one, float8_e8m0fnu: a power of two (OCP MX)           | 8              |
| "e4m3"    | one, float8_e4m3fn, and a float32 divisor (NVFP4)      | 8              |
| "double"  | 8-bit codes, float32 per 256 codes, float32 (dynamic8) | 8.125          |

A grid keeps the tensors as buffers and reads the scales of a range of blocks from them, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dovetail.links.quantize import dynamic8

ScaleForm = Literal["float16", "float32", "e8m0", "e4m3", "double"]

DTYPES = {
    "float16": torch.float16, "float32": torch.float32, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn
}  # fmt: skip

DEAD_SCALE = 2.0**-116
"""Blocks with a smaller scale are zero: their values would be subnormal, which no two processors round alike."""


def empty(shape: tuple[int, ...], form: ScaleForm, name: str = "scale") -> dict[str, Tensor]:
    """Return zeroed tensors of the right shapes by name: one `name`, or several in 8 bits.

    shape  of the scales, in row-major order of their blocks
    """
    if form == "double":
        count = torch.Size(shape).numel()
        return {
            "scale_codes": torch.zeros(count, dtype=torch.uint8),
            "scale_absmax": torch.zeros(-(-count // dynamic8.BLOCK), dtype=torch.float32),
            "scale_offset": torch.zeros((), dtype=torch.float32),
        }
    tensors = {name: torch.zeros(shape, dtype=DTYPES[form])}
    return tensors | {"scale_divisor": torch.zeros((), dtype=torch.float32)} if form == "e4m3" else tensors


def encode(
    scale: Tensor, form: Literal["float16", "float32", "e8m0", "double"], name: str = "scale"
) -> dict[str, Tensor]:
    """Return the tensors that store these scales, by name, each scale rounded to the nearest of the form.

    scale  any shape, any float dtype, in row-major order of the blocks
    """
    if form == "double":
        scale_codes, scale_absmax, scale_offset = dynamic8.encode(scale.reshape(-1).float())
        return {"scale_codes": scale_codes, "scale_absmax": scale_absmax, "scale_offset": scale_offset}
    return {name: scale.to(DTYPES[form])}


def decode(tensors: Sequence[Tensor], first: int, last: int) -> Tensor:
    """Return the scales of the blocks [first, last), float32 (blocks,); zero where they are below DEAD_SCALE.

    tensors  what `encode` or `empty` returned, in that order
    """
    if tensors[0].dtype == torch.float16:  # its smallest number is larger; -0 becomes 0 as the others below
        return tensors[0].view(-1)[first:last].float().add_(0.0)
    if len(tensors) == 3:
        scale = dynamic8.decode(tensors, first, last)
    else:
        scale = tensors[0].view(-1)[first:last].float()
        if len(tensors) == 2:
            scale = scale / tensors[1]
    return torch.where(scale.abs() < DEAD_SCALE, 0.0, scale)


def plain(tensors: Sequence[Tensor], blocks: int) -> Tensor:
    """Return all scales as kernels on GPUs read them, (blocks,): float16 or float32 as stored, else decoded."""
    if len(tensors) == 1 and tensors[0].dtype in (torch.float16, torch.float32):
        return tensors[0].view(-1)
    return decode(tensors, 0, blocks)
