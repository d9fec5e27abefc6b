"""A ternary tensor as coded blocks, each with an entry in a directory (`docs/format.md`).

The values of a tensor, in row-major order or (`columns`) column by column, are cut into independent blocks of 65,536.
The entry of a block holds its length, its form, the number of values it keeps and its CRC-32C. Any block is found by a
sum of lengths, checked by itself, and decoded in any thread.

Ternary values are passed as two bit masks: uint64, (2, words). Row 0 marks plus, row 1 minus. Value v, in row-major
order, is bit v mod 64 of word v div 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import LoadError
from dovetail.experts.codec.decoding import dense_blocks, indices_of, mask_blocks
from dovetail.experts.codec.encoding import BLOCK, EMPTY, PAYLOAD, encode_blocks, transposed
from dovetail.experts.codec.native import crc32c

ENTRY = np.dtype([("length", "<u2"), ("count", "<u2"), ("mode", "u1"), ("crc32c", "<u4")])
"""Of a block: number of bytes, values kept modulo 65,536, mode (low four bits) and k (high four bits), CRC-32C."""
_WORTH = 0.01  # the least share that storing by columns must save
_RANGE = 64  # blocks per unit of work of a thread
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Coded:
    """A coded ternary tensor.

    directory  ENTRY, one per block
    blocks     uint8, the bytes of all blocks
    columns    whether a matrix is stored column by column
    """

    shape: tuple[int, ...]
    columns: bool
    directory: np.ndarray
    blocks: np.ndarray

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def order(self) -> str:
        return "columns" if self.columns else "rows"

    @property
    def nbytes(self) -> int:
        return self.directory.nbytes + self.blocks.nbytes

    @property
    def kept(self) -> int:
        """Number of nonzero values."""
        return int(counts_of(self.directory).sum())


def block_count(numel: int) -> int:
    """Return the number of blocks of `numel` values."""
    return -(-numel // BLOCK)


def word_count(numel: int) -> int:
    """Return the number of words in a mask of `numel` values."""
    return -(-numel // 64)


def counts_of(directory: np.ndarray) -> np.ndarray:
    """Return the number of values that each block keeps. Both 65,536 and an empty block are stored as 0."""
    counts = directory["count"].astype(np.int64)
    return np.where((counts == 0) & (directory["mode"] & 15 != EMPTY), BLOCK, counts)


def code(masks: np.ndarray, shape: tuple[int, ...]) -> Coded:
    """Encode the masks of a tensor in as few bytes as possible.

    A matrix at least four times as high as wide is stored by columns where that saves 1 % or more, since rows are
    decoded faster. The scales of a low-rank B (out, rank) differ by rank, so that its columns differ in density.
    """
    by_rows = Coded(shape, False, *_encode(masks, math.prod(shape)))
    if len(shape) != 2 or shape[1] < 2 or shape[0] < 4 * shape[1]:
        return by_rows
    turned = np.stack([transposed(mask, shape[0], shape[1]) for mask in masks])
    by_columns = Coded(shape, True, *_encode(turned, math.prod(shape)))
    return by_columns if by_columns.nbytes < (1 - _WORTH) * by_rows.nbytes else by_rows


def _encode(masks: np.ndarray, numel: int) -> tuple[np.ndarray, np.ndarray]:
    directory, out = np.zeros(block_count(numel), ENTRY), np.empty(block_count(numel) * PAYLOAD, np.uint8)
    lengths, counts, modes = (np.zeros(len(directory), np.int64) for _ in range(3))
    used = encode_blocks(masks[0], masks[1], numel, out, lengths, counts, modes)
    directory["length"], directory["count"], directory["mode"] = lengths, counts & 0xFFFF, modes
    view, bounds = out.data, [0, *np.cumsum(lengths).tolist()]
    directory["crc32c"] = [crc32c(view[first:last]) for first, last in pairwise(bounds)]
    return directory, out[:used].copy()


def _run(where: str, kernel: Callable[..., int], coded: Coded, threads: int, *arguments: Any) -> None:
    """Apply the kernel to all blocks with a valid CRC-32C, a range at a time. LoadError for the first invalid block."""
    lengths, counts = coded.directory["length"].astype(np.int64), counts_of(coded.directory)
    modes, ends, count = coded.directory["mode"].astype(np.int64), np.cumsum(lengths), block_count(coded.numel)
    too_long = count and (lengths.max() > PAYLOAD or counts.max() > BLOCK)
    if len(lengths) != count or (ends[-1] if count else 0) != len(coded.blocks) or too_long:
        rule = "each 65,536 values must have an entry, and lengths must add up"
        found = f"{len(lengths)} entries for {len(coded.blocks)} bytes"
        raise LoadError(where, found=found, rule=rule, fix="copy the file again")
    starts, height = ends - lengths, coded.shape[0] if coded.columns else 0
    view, bounds, crcs = coded.blocks.data, [0, *ends.tolist()], coded.directory["crc32c"].tolist()

    def work(first: int) -> tuple[int, str]:
        last = min(first + _RANGE, count)
        intact = (crc32c(view[bounds[block] : bounds[block + 1]]) == crcs[block] for block in range(first, last))
        stop = next((block for block, right in enumerate(intact, first) if not right), last)
        wrong = kernel(coded.blocks, starts, lengths, counts, modes, first, stop, coded.numel, height, *arguments)
        if wrong >= 0:
            return wrong, "bytes that no encoder writes"
        return (stop, "bytes with another CRC-32C than in the directory") if stop < last else (-1, "")

    ranges = range(0, count, _RANGE)
    if threads > 1 and len(ranges) > 1:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, ranges))
    else:
        results = [work(first) for first in ranges]
    for block, found in results:
        if found:
            rule = "the bytes of a block must be as docs/format.md defines"
            raise LoadError(f"{where}, block {block}", found=found, rule=rule, fix="copy the file again")


def decode_dense(coded: Coded, out: Tensor, scale: float, where: str, threads: int = 1) -> None:
    """Write scale times the ternary values into `out`: contiguous, with as many elements, any float dtype.

    errors  LoadError, with `where`, for changed bytes; `out` then holds the blocks that were decoded before
    """
    whole = _INTEGERS[out.dtype.itemsize]
    number = torch.tensor([scale, -scale], dtype=torch.float64).to(out.dtype)
    if not bool(torch.isfinite(number).all()):
        rule = f"a scale may be at most {torch.finfo(out.dtype).max:g} in {out.dtype}"
        raise LoadError(where, found=f"scale {scale:g}", rule=rule, fix="decode to another dtype")
    flat = out.view(-1).view(whole).numpy()
    unsigned = flat.view(f"u{flat.itemsize}")
    plus, minus = number.view(whole).numpy().view(unsigned.dtype)
    if coded.columns:
        unsigned[:] = 0
    _run(where, dense_blocks, coded, threads, plus, minus, unsigned)


def decode_masks(coded: Coded, masks: np.ndarray, offset: int, where: str, threads: int = 1) -> None:
    """Write the words of the tensor into masks of many tensors, (2, words), from word `offset`."""
    if coded.columns:
        masks[:, offset : offset + word_count(coded.numel)] = 0
        threads = 1  # two blocks set bits of the same words
    _run(where, mask_blocks, coded, threads, masks.reshape(-1), offset, masks.shape[1])


def decode_indices(coded: Coded, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return row-major positions (int64, rising) of the nonzero values, and their signs (int8, 1 or -1)."""
    masks = np.empty((2, word_count(coded.numel)), np.uint64)
    decode_masks(coded, masks, 0, where)
    return indices_of(masks[0], masks[1])
