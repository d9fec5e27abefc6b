"""Masks as bits: packed to one bit a weight, unpacked to integers wide enough for a bitwise AND with a weight."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes -> the integer type of that width."""


def pack_bits(keep_oi: Tensor) -> Tensor:
    """(o, i) bool -> (o, ceil(i / 8)) uint8; the first weight is the lowest bit."""
    o, i = keep_oi.shape
    padded = torch.nn.functional.pad(keep_oi.to(torch.uint8), (0, -i % 8)).view(o, -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=keep_oi.device)
    return (padded * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(n, ceil(width / 8)) uint8 -> (n, width) integers of `dtype`, -1 (all ones) for a set bit, 0 for a clear one."""
    n = bits.shape[0]
    bytes_ = _table(bits.device).index_select(0, bits.flatten().int()).view(torch.int8)
    return bytes_.view(n, -1)[:, :width].to(dtype)


@cache
def _table(device: torch.device) -> Tensor:
    """Entry b: the eight bits of byte b as eight bytes, -1 or 0, seen as one int64, to be gathered at once."""
    with torch.inference_mode(False):
        byte = torch.arange(256, dtype=torch.int64)[:, None]
        bit = (byte >> torch.arange(8)) & 1
        return (-bit).to(torch.int8).contiguous().view(torch.int64).flatten().to(device)
