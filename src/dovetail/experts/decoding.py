"""From coded blocks to numbers or masks (`blocks`).

The three parts of a block lie in streams of their own, so that the decoder takes each in a simple loop that the
compiler turns to vectors: positions of the set bits of the unary stream; low bits; their running sum; and all together

  position(i) = (one(i) - i) 2^k + low(0) + … + low(i) + i.

In these functions `kept` is uint32: the position in the block, and the sign (1 is minus) in bit 31.
"""

from __future__ import annotations

import numba
import numpy as np

from dovetail.experts.blocks import BLOCK, EMPTY, FULL, KEPT, MAX_K, PAYLOAD, RAW, SUB, SUBS
from dovetail.experts.native import compiled, crc32c_of, get, load64, popcount, put, trailing_zeros

CHANGED, WRONG = 1, 2


@numba.njit(nogil=True)
def decode_block(raw, length, mode, k, count, values, kept, lows, counts, ks):
    """Decodes a payload of `length` bytes. False where it isn't one that codes `count` of `values` values.

    raw         uint8, RAW long, zeros behind the payload; length <= PAYLOAD
    kept, lows  uint32, KEPT long: what is decoded, and scratch; counts and ks are scratch, int64, 16 each

    Whatever the bytes are, nothing outside these arrays is read or written: streams are checked to lie within the
    payload, and the unary one to have `count` bits set, before positions are read; a position that isn't in the block
    is found by the last one of its segment, since they rise.
    """
    if count < 0 or count > values or values > BLOCK or length > PAYLOAD:
        return False
    signs = (count + 7) >> 3
    if mode == EMPTY:
        return count == 0 and length == 0
    if mode == FULL:
        if count != values or length != signs:
            return False
        for i in range(count):
            sign = np.uint32(get(raw, i >> 3)) >> np.uint32(i & 7) & np.uint32(1)
            put(kept, i, np.uint32(i) | sign << np.uint32(31))
        return True
    at, segments, size, low = 0, 1, values, count * k
    counts[0], ks[0] = count, k
    if mode == SUBS:
        segments, size = (values + SUB - 1) // SUB, SUB
        at, total, low = 2 * segments, 0, 0
        for s in range(segments):
            head = np.int64(raw[2 * s]) | np.int64(raw[2 * s + 1]) << 8
            counts[s], ks[s] = head & 0xFFF, head >> 12
            total += counts[s]
            low += counts[s] * ks[s]
        if total != count:
            return False
    sign_at = at + ((low + 7) >> 3)
    unary_at = sign_at + signs
    if mode > SUBS or k > MAX_K or count == 0 or unary_at >= length:
        return False
    ones = 0
    for place in range(unary_at, length, 8):
        ones += popcount(load64(raw, place))
    if ones != count:
        return False
    _ones(raw, unary_at, count, kept)
    first, low_bit, base = 0, at * 8, 0
    for s in range(segments):
        n, shift = counts[s], ks[s]
        if n == 0:
            continue
        _low_bits(raw, low_bit, shift, first, n, lows)
        low_bit += n * shift
        total = np.uint32(0)
        for i in range(first, first + n):
            total += get(lows, i)
            put(lows, i, total)
        end = np.int64(get(kept, first + n - 1)) + 1
        if s * size + ((end - base - n) << shift) + np.int64(total) + n > min((s + 1) * size, values):
            return False
        if segments == 1:
            _join_block(raw, sign_at, signs, kept, lows, shift)
            return True
        _join(kept, lows, first, n, shift, np.uint32(s * size - first - ((base - first) << shift)))
        first, base = first + n, end
    _join_signs(raw, sign_at, signs, kept)
    return True


@numba.njit(nogil=True)
def _ones(raw, at, count, kept):
    """Positions of the set bits: eight at a time, as many too many as don't matter."""
    i = base = 0
    while i < count:
        word = load64(raw, at)
        stop = i + popcount(word)
        place = i
        while place < stop:
            for j in range(8):
                put(kept, place + j, np.uint32(base + trailing_zeros(word)))
                word &= word - np.uint64(1)
            place += 8
        i, base, at = stop, base + 64, at + 8


@numba.njit(nogil=True)
def _low_bits(raw, bit, k, first, n, lows):
    """n numbers of k bits from a bit on; up to 7 more are written behind them."""
    mask = np.uint64((1 << k) - 1)
    if k <= 7:
        for i in range(first, first + n, 8):
            word = load64(raw, bit >> 3) >> np.uint64(bit & 7)
            for j in range(8):
                put(lows, i + j, np.uint32(word >> np.uint64(j * k) & mask))
            bit += 8 * k
        return
    for i in range(first, first + n):
        put(lows, i, np.uint32(load64(raw, bit >> 3) >> np.uint64(bit & 7) & mask))
        bit += k


@numba.njit(nogil=True)
def _join(kept, lows, first, n, k, start):
    for i in range(first, first + n):
        put(kept, i, ((get(kept, i) - np.uint32(i)) << np.uint32(k)) + get(lows, i) + np.uint32(i) + start)


@numba.njit(nogil=True)
def _join_block(raw, at, signs, kept, lows, k):
    """Positions and signs of a block that is one segment, in one go; up to 7 too many."""
    for group in range(signs):
        byte = np.uint32(get(raw, at + group))
        for j in range(8):
            i = group * 8 + j
            position = ((get(kept, i) - np.uint32(i)) << np.uint32(k)) + get(lows, i) + np.uint32(i)
            put(kept, i, position | (byte >> np.uint32(j) & np.uint32(1)) << np.uint32(31))


@numba.njit(nogil=True)
def _join_signs(raw, at, signs, kept):
    for group in range(signs):
        byte = np.uint32(get(raw, at + group))
        for j in range(8):
            i = group * 8 + j
            put(kept, i, get(kept, i) | (byte >> np.uint32(j) & np.uint32(1)) << np.uint32(31))


@numba.njit(nogil=True)
def _fetch(blocks, starts, lengths, counts, modes, crcs, block, values, raw, kept, lows, sub_counts, sub_ks):
    """Checks and decodes one block into kept; 0, or what is wrong with it. Bounds were checked (`codec`)."""
    start, length = starts[block], lengths[block]
    for i in range(length):
        put(raw, i, get(blocks, start + i))
    raw[length : length + 64] = 0
    if np.int64(crc32c_of(raw, length)) != crcs[block]:
        return CHANGED
    mode, k = modes[block] & 15, modes[block] >> 4
    right = decode_block(raw, length, mode, k, counts[block], values, kept, lows, sub_counts, sub_ks)
    return 0 if right else WRONG


@compiled
def dense_blocks(blocks, starts, lengths, counts, modes, crcs, first, last, numel, height, plus, minus, out):
    """Blocks [first, last) as numbers into the tensor; `height`: rows of a zeroed matrix that lies by columns, or 0."""
    raw, kept, lows = np.zeros(RAW, np.uint8), np.zeros(KEPT, np.uint32), np.zeros(KEPT, np.uint32)
    sub_counts, sub_ks = np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, last):
        start = block * BLOCK
        values = min(BLOCK, numel - start)
        wrong = _fetch(blocks, starts, lengths, counts, modes, crcs, block, values, raw, kept, lows, sub_counts, sub_ks)
        if wrong != 0:
            return block, wrong
        if height == 0:
            out[start : start + values] = 0
            for i in range(counts[block]):
                entry = get(kept, i)
                at = start + np.int64(entry & np.uint32(0xFFFF))
                put(out, at, minus if entry >> np.uint32(31) else plus)
        else:
            width = numel // height
            for i in range(counts[block]):
                at = start + np.int64(kept[i] & np.uint32(0xFFFF))
                out[at % height * width + at // height] = minus if kept[i] >> np.uint32(31) else plus
    return -1, 0


@compiled
def mask_blocks(blocks, starts, lengths, counts, modes, crcs, first, last, numel, height, masks, offset, words):
    """Blocks [first, last) as bits: of plus from word `offset` on, of minus `words` further on; by columns, zeroed."""
    raw, kept, lows = np.zeros(RAW, np.uint8), np.zeros(KEPT, np.uint32), np.zeros(KEPT, np.uint32)
    sub_counts, sub_ks = np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, last):
        start = block * BLOCK
        values = min(BLOCK, numel - start)
        wrong = _fetch(blocks, starts, lengths, counts, modes, crcs, block, values, raw, kept, lows, sub_counts, sub_ks)
        if wrong != 0:
            return block, wrong
        if height == 0:
            to = offset + (start >> 6)
            masks[to : to + ((values + 63) >> 6)] = 0
            masks[to + words : to + words + ((values + 63) >> 6)] = 0
        for i in range(counts[block]):
            entry = get(kept, i)
            at = start + np.int64(entry & np.uint32(0xFFFF))
            if height != 0:
                at = at % height * (numel // height) + at // height
            to = offset + (at >> 6) + np.int64(entry >> np.uint32(31)) * words
            put(masks, to, get(masks, to) | np.uint64(1) << np.uint64(at & 63))
    return -1, 0


@compiled
def indices_of(plus, minus):
    """Positions of the bits set in either mask, and 1 or -1."""
    count = 0
    for w in range(len(plus)):
        count += popcount(plus[w] | minus[w])
    indices, signs = np.empty(count, np.int64), np.empty(count, np.int8)
    at = 0
    for w in range(len(plus)):
        both = plus[w] | minus[w]
        while both != np.uint64(0):
            bit = trailing_zeros(both)
            both &= both - np.uint64(1)
            indices[at] = w * 64 + bit
            signs[at] = 1 - 2 * np.int64(minus[w] >> np.uint64(bit) & np.uint64(1))
            at += 1
    return indices, signs
