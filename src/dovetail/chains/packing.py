"""Codes of 1, 2, 3, 4 or 8 bits, packed without gaps; and their values by table.

One order for every width: the first code sits in the highest bits (bitsandbytes' order for 4 bits). 1, 2, 4 and 8 bits
fill whole bytes; 3 bits put 8 codes into 3 bytes. The tail is padded with zeros to a whole unit.

A table makes reading fast: an index (a byte; 12 bits for 3-bit codes, 4 for 1-bit ones) selects a row of 4, 2 or 1
values at once.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

CODES_PER_UNIT = {1: 8, 2: 4, 3: 8, 4: 2, 8: 1}
BYTES_PER_UNIT = {1: 1, 2: 1, 3: 3, 4: 1, 8: 1}
INDEX_BITS = {1: 4, 2: 8, 3: 12, 4: 8, 8: 8}

_ONE_ELEMENT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype as wide as a table's row in bytes: on CPU one wide element is copied much faster than a row."""


def packed_nbytes(count: int, bits: int) -> int:
    """Return the exact bytes of `count` codes of `bits` bits.

    >>> packed_nbytes(9, bits=3)
    6
    """
    return -(-count // CODES_PER_UNIT[bits]) * BYTES_PER_UNIT[bits]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes of any shape, in row-major order: uint8 (packed_nbytes,).

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4).tolist()
    [18, 48]
    """
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    tail = -flat.numel() % CODES_PER_UNIT[bits]
    if tail:
        flat = torch.cat([flat, flat.new_zeros(tail)])
    if bits == 4:
        return (flat[0::2] << 4) | flat[1::2]
    if bits == 2:
        return (flat[0::4] << 6) | (flat[1::4] << 4) | (flat[2::4] << 2) | flat[3::4]
    c = flat.view(-1, 8)
    if bits == 1:
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=flat.device)
        return (c << shifts).sum(dim=1, dtype=torch.uint8)
    first = (c[:, 0] << 5) | (c[:, 1] << 2) | (c[:, 2] >> 1)
    second = ((c[:, 2] & 1) << 7) | (c[:, 3] << 4) | (c[:, 4] << 1) | (c[:, 5] >> 2)
    third = ((c[:, 5] & 3) << 6) | (c[:, 6] << 3) | c[:, 7]
    return torch.stack([first, second, third], dim=1).view(-1)


def unpack(packed: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Return the codes [start, stop) of packed bytes, uint8 (stop - start,).

    >>> unpack(torch.tensor([18, 48], dtype=torch.uint8), bits=4, start=1, stop=3).tolist()
    [2, 3]
    """
    return read(packed, bits, start, stop, value_table((), bits, packed))


def read(packed: Tensor, bits: int, start: int, stop: int, table: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the values [start, stop) of packed codes, by a `value_table`, in the table's dtype.

    out  (stop - start,) contiguous, of table's dtype, aligned like a fresh tensor; if given, it is filled and returned
    """
    unit = CODES_PER_UNIT[bits]
    first, last = start // unit, -(-stop // unit)
    index = _indices(packed[first * BYTES_PER_UNIT[bits] : last * BYTES_PER_UNIT[bits]], bits)
    if start == first * unit and stop == last * unit:
        return _select(table, index, out)
    values = _select(table, index, None)[start - first * unit : stop - first * unit]
    return values if out is None else out.copy_(values)


def value_table(levels: tuple[float, ...], bits: int, like: Tensor) -> Tensor:
    """Return the values of every index: (2 ** INDEX_BITS, codes per index), on the device of `like`.

    levels   `levels[code]` is the float32 value of a code; empty: the codes themselves, uint8

    Cached per device, except for tensors that are not plain (fake tensors of a dry run).
    """
    if type(like) is not Tensor:
        return _make_table(levels, bits, like.device)
    return _kept_table(levels, bits, like.device)


def _indices(packed: Tensor, bits: int) -> Tensor:
    index = packed.to(torch.int32)
    if bits == 1:
        return torch.stack([index >> 4, index & 15], dim=1).view(-1)
    if bits != 3:
        return index
    a, b, c = index.view(-1, 3).unbind(1)
    return torch.stack([(a << 4) | (b >> 4), ((b & 15) << 8) | c], dim=1).view(-1)


def _select(table: Tensor, index: Tensor, out: Tensor | None) -> Tensor:
    if index.device.type != "cpu":
        values = table[index.long()].view(-1)
        return values if out is None else out.copy_(values)
    wide = _ONE_ELEMENT[table.shape[1] * table.element_size()]
    if out is None:
        return torch.index_select(table.view(wide).view(-1), 0, index).view(table.dtype)
    torch.index_select(table.view(wide).view(-1), 0, index, out=out.view(wide))
    return out


@lru_cache(maxsize=64)
def _kept_table(levels: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _make_table(levels, bits, device)


def _make_table(levels: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    index = torch.arange(2 ** INDEX_BITS[bits], device=device)
    shifts = torch.arange(INDEX_BITS[bits] - bits, -1, -bits, device=device)
    codes = (index[:, None] >> shifts) & (2**bits - 1)
    if not levels:
        return codes.to(torch.uint8)
    return torch.tensor(levels, dtype=torch.float32, device=device)[codes]
