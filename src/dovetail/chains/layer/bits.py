"""Masks of one bit per weight, unpacked to integers as wide as a weight, for a bitwise AND with it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes -> the integer type of that width."""


def pack_bits(keep_oi: Tensor) -> Tensor:
    """Pack (o, i) bool into (o, ceil(i / 8)) uint8; the first weight is the lowest bit."""
    o, i = keep_oi.shape
    padded = torch.nn.functional.pad(keep_oi.to(torch.uint8), (0, -i % 8)).view(o, -1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=keep_oi.device)
    return (padded * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bits: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Unpack (n, ceil(width / 8)) uint8 to (n, width) integers of `dtype`: -1 (all ones) for a set bit, else 0."""
    n = bits.shape[0]
    bytes_ = _table(bits.device).index_select(0, bits.flatten().int()).view(torch.int8)
    return bytes_.view(n, -1)[:, :width].to(dtype)


@cache
def _table(device: torch.device) -> Tensor:
    """Return a table whose entry b is the eight bits of byte b as eight bytes, -1 or 0, in one int64."""
    with torch.inference_mode(False):
        byte = torch.arange(256, dtype=torch.int64)[:, None]
        bit = (byte >> torch.arange(8)) & 1
        return (-bit).to(torch.int8).contiguous().view(torch.int64).flatten().to(device)


def split_zeros(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Separate numbers into a mask of the nonzero ones and their values.

    parts    chunks of the numbers, in order: (n,) integers, and their codes of zero, (n,) or (1,); each chunk except
             the last has a multiple of 8 numbers
    returns  mask, uint8 (ceil(numbers / 8),), the first number's bit lowest; and the nonzero numbers, in order
    """
    masks, values = [], []
    for numbers, zero in parts:
        keep = numbers != zero
        masks.append(pack_bits(keep[None])[0])
        values.append(numbers[keep])
    return torch.cat(masks), torch.cat(values)


def join_zeros(mask: Tensor, values: Tensor, zeros: Iterable[Tensor]) -> Tensor:
    """Join what `split_zeros` separated.

    zeros   the codes of zero, (n,), in the chunks that were split
    errors  ValueError where the number of set bits is not the number of values
    """
    parts, at, first = [], 0, 0
    for zero in zeros:
        last = first + zero.numel()
        # All bits of the last byte, so that a set bit after the last number is found.
        bits = unpack_bits(mask[None, first // 8 : -(-last // 8)], -(-zero.numel() // 8) * 8, torch.int8)[0].bool()
        count = int(bits.count_nonzero())
        if at + count > values.numel() or bool(bits[zero.numel() :].any()):
            break
        parts.append(zero.masked_scatter(bits[: zero.numel()], values[at : at + count]))
        first, at = last, at + count
    else:
        if at == values.numel():
            return torch.cat(parts)
    raise ValueError(f"a mask with other than {values.numel()} bits set for {values.numel()} values")
