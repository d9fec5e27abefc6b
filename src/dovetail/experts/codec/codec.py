"""A ternary tensor as coded blocks, each with an entry in a directory (`docs/format.md`).

A tensor's values, row after row or (`columns`) column after column, are cut into blocks of 65,536, which know nothing
of each other. A block's entry says its length, how it is coded, how many values it keeps and its CRC-32C, so that any
block is found by adding up lengths, checked by itself, and decoded in any thread.

Ternary values come and go as two bit masks: uint64, (2, words); row 0 says where they are plus, row 1 where minus;
value v, in row-major order, is bit v mod 64 of word v div 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.errors import LoadError
from dovetail.experts.codec.constants import BLOCK, EMPTY, PAYLOAD
from dovetail.experts.codec.decoding import CHANGED, dense_blocks, indices_of, mask_blocks
from dovetail.experts.codec.encoding import encode_blocks, transposed

ENTRY = np.dtype([("length", "<u2"), ("count", "<u2"), ("mode", "u1"), ("crc32c", "<u4")])
"""Of a block: its bytes, values kept modulo 65,536, mode in the low four bits and k in the high ones, CRC-32C."""
_WORTH = 0.01  # what storing by columns must save
_RANGE = 64  # blocks that a thread decodes at a time
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Coded:
    """A ternary tensor, coded.

    directory  ENTRY, one a block
    blocks     uint8, the blocks' bytes one after the other
    columns    whether a matrix is stored column after column
    """

    shape: tuple[int, ...]
    columns: bool
    directory: np.ndarray
    blocks: np.ndarray

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.directory.nbytes + self.blocks.nbytes

    @property
    def kept(self) -> int:
        """How many values aren't zero."""
        return int(counts_of(self.directory).sum())


def block_count(numel: int) -> int:
    """How many blocks so many values take."""
    return -(-numel // BLOCK)


def word_count(numel: int) -> int:
    """How many words a mask of so many values takes."""
    return -(-numel // 64)


def counts_of(directory: np.ndarray) -> np.ndarray:
    """Values kept by each block; 65,536 is stored as 0, which an empty block has as well."""
    counts = directory["count"].astype(np.int64)
    return np.where((counts == 0) & (directory["mode"] & 15 != EMPTY), BLOCK, counts)


def code(masks: np.ndarray, shape: tuple[int, ...]) -> Coded:
    """Codes the masks of a tensor in as few bytes as the format can.

    A matrix at least four times as high as wide may be stored by columns: of a low-rank B (out, rank), scales differ by
    rank, so that columns are dense or sparse as a whole. It is where that saves a hundredth or more: rows are decoded
    faster.
    """
    by_rows = Coded(shape, False, *_encode(masks, math.prod(shape)))
    if len(shape) != 2 or shape[1] < 2 or shape[0] < 4 * shape[1]:
        return by_rows
    turned = np.stack([transposed(mask, shape[0], shape[1]) for mask in masks])
    by_columns = Coded(shape, True, *_encode(turned, math.prod(shape)))
    return by_columns if by_columns.nbytes < (1 - _WORTH) * by_rows.nbytes else by_rows


def _encode(masks: np.ndarray, numel: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = block_count(numel)
    directory, out = np.zeros(blocks, ENTRY), np.empty(blocks * PAYLOAD, np.uint8)
    fields = [directory[name].astype(np.int64) for name in ("length", "count", "mode", "crc32c")]
    used = encode_blocks(masks[0], masks[1], numel, out, *fields)
    for name, values in zip(("length", "count", "mode", "crc32c"), fields, strict=True):
        directory[name] = values & 0xFFFF if name == "count" else values
    return directory, out[:used].copy()


def _fields(coded: Coded, where: str) -> tuple[np.ndarray, ...]:
    """Starts, lengths, counts, modes and CRCs of the blocks, within the bytes that there are."""
    lengths, counts = coded.directory["length"].astype(np.int64), counts_of(coded.directory)
    ends = np.cumsum(lengths)
    if (
        len(lengths) != block_count(coded.numel)
        or (ends[-1] if len(ends) else 0) != len(coded.blocks)
        or (len(lengths) and (lengths.max() > PAYLOAD or counts.max() > BLOCK))
    ):
        rule = "a directory has an entry for each 65,536 values, and their lengths add up to the blocks' bytes"
        raise LoadError(where, found=f"{len(lengths)} entries for {len(coded.blocks)} bytes", rule=rule)
    modes, crcs = coded.directory["mode"].astype(np.int64), coded.directory["crc32c"].astype(np.int64)
    return ends - lengths, lengths, counts, modes, crcs


def _run(where: str, kernel: Callable[..., Any], coded: Coded, threads: int, *arguments: Any) -> None:
    """The kernel over all blocks, a range of them at a time; LoadError for the first block that is wrong."""
    fields, count = _fields(coded, where), block_count(coded.numel)
    height = coded.shape[0] if coded.columns else 0

    def work(first: int) -> tuple[int, int]:
        return kernel(
            coded.blocks, *fields, first, min(first + _RANGE, count), coded.numel, height, *arguments
        )  # fmt: skip

    ranges = range(0, count, _RANGE)
    if threads > 1 and len(ranges) > 1:
        with ThreadPoolExecutor(threads) as pool:
            results: Sequence[tuple[int, int]] = list(pool.map(work, ranges))
    else:
        results = [work(first) for first in ranges]
    for block, wrong in results:
        if wrong:
            found = (
                "bytes with another CRC-32C than the directory says"
                if wrong == CHANGED
                else "bytes that no encoder writes"
            )
            raise LoadError(f"{where}, block {block}", found=found, rule="docs/format.md", fix="copy the file again")


def decode_dense(coded: Coded, out: Tensor, scale: float, where: str, threads: int = 1) -> None:
    """Writes scale times the ternary values into `out`: contiguous, of as many elements, any float dtype.

    errors  LoadError, saying `where`, for bytes that were changed; what has been decoded until then is in `out`
    """
    whole = _INTEGERS[out.dtype.itemsize]
    number = torch.tensor([scale, -scale], dtype=torch.float64).to(out.dtype)
    if not bool(torch.isfinite(number).all()):
        rule = f"at most {torch.finfo(out.dtype).max:g} in {out.dtype}"
        raise LoadError(where, found=f"scale {scale:g}", rule=rule, fix="decode to another dtype")
    flat = out.view(-1).view(whole).numpy()
    unsigned = flat.view(f"u{flat.itemsize}")
    plus, minus = number.view(whole).numpy().view(unsigned.dtype)
    if coded.columns:
        unsigned[:] = 0
    _run(where, dense_blocks, coded, threads, plus, minus, unsigned)


def decode_masks(coded: Coded, masks: np.ndarray, offset: int, where: str, threads: int = 1) -> None:
    """Writes the tensor's words in masks of many tensors, (2, words), from word `offset` on."""
    if coded.columns:
        masks[:, offset : offset + word_count(coded.numel)] = 0
        threads = 1  # two blocks set bits of the same words
    _run(where, mask_blocks, coded, threads, masks.reshape(-1), offset, masks.shape[1])


def decode_indices(coded: Coded, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Row-major positions (int64, rising) of the values that aren't zero, and their signs (int8, 1 or -1)."""
    masks = np.empty((2, word_count(coded.numel)), np.uint64)
    decode_masks(coded, masks, 0, where)
    return indices_of(masks[0], masks[1])
