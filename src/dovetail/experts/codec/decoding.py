"""From coded blocks to numbers or masks (`encoding` has the form of a block).

Each of the three parts of a block is a stream of its own and is read in a simple loop, eight values at a time: first
the positions of the set bits of the unary stream, then all parts together, without a branch:

  position(i) = (one(i) - i) 2^k + low(0) + … + low(i) + i.

In these functions `kept` is uint32: the position in the block, with the sign (1 is minus) in bit 31.
"""

from __future__ import annotations

import numba
import numpy as np

from dovetail.chains.compiled import compiled
from dovetail.experts.codec.encoding import BLOCK, EMPTY, FULL, KEPT, MAX_K, PAYLOAD, RAW, RICE, SUB, SUBS
from dovetail.experts.codec.native import get, load64, place8, popcount, put, trailing_zeros


@numba.njit(nogil=True)
def decode_block(raw, length, mode, k, count, values, kept, ones, counts, ks):
    """Decode a payload of `length` bytes. Return False if it does not code `count` of `values` values.

    raw         uint8, RAW long, zeros after the payload; length <= PAYLOAD
    kept, ones  uint32, KEPT long: the result, and scratch; counts and ks are scratch, int64, 16 each

    For any bytes, no access leaves these arrays. Before positions are read, the streams are checked to lie within the
    payload, and the unary stream to have `count` set bits. Positions rise, so the last one of each segment shows
    whether all of them lie within the block.
    """
    if count < 0 or count > values or values > BLOCK or length > PAYLOAD:
        return False
    if mode != RICE and k != 0:
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
    found = 0
    for place in range(unary_at, length, 8):
        found += popcount(load64(raw, place))
    if found != count:
        return False
    _ones(raw, unary_at, count, ones)
    first, low_bit, base = 0, at * 8, 0
    for s in range(segments):
        n, shift = counts[s], ks[s]
        if n == 0:
            continue
        start = s * size - first - ((base - first) << shift)
        if shift <= 5:
            total = _join_small(ones, first, n, raw, low_bit, shift, sign_at, start, kept)
        else:
            total = _join_large(ones, first, n, raw, low_bit, shift, sign_at, start, kept)
        end = np.int64(get(ones, first + n - 1)) + 1
        if s * size + ((end - base - n) << shift) + total + n > min((s + 1) * size, values):
            return False
        first, base, low_bit = first + n, end, low_bit + n * shift
    return True


@numba.njit(nogil=True)
def _ones(raw, at, count, ones):
    """Write the positions of the set bits, eight at a time, with up to seven more than there are."""
    i = base = 0
    while i < count:
        word = load64(raw, at)
        stop = i + popcount(word)
        place = i
        while place < stop:
            for j in range(8):
                put(ones, place + j, np.uint32(base + trailing_zeros(word)))
                word &= word - np.uint64(1)
            place += 8
        i, base, at = stop, base + 64, at + 8


@numba.njit(nogil=True)
def _repeated(bits, every):
    """Return a word with `bits` ones at the start of every `every` bits."""
    word, step = (np.uint64(1) << np.uint64(bits)) - np.uint64(1), every
    while step < 64:
        word |= word << np.uint64(step)
        step *= 2
    return word


@numba.njit(nogil=True)
def _join_small(ones, first, n, raw, bit, k, sign_at, start, kept):
    """Write positions and signs of n values of one segment, and up to 7 more; return the sum of their low bits; k <= 5.

    Eight numbers of k bits are spread to bytes by halving. A product adds to each byte those below it, up to 248.
    """
    halves, quarters, eighths = _repeated(4 * k, 64), _repeated(2 * k, 32), _repeated(k, 16)
    total = 0
    for i in range(first, first + n, 8):
        lows = load64(raw, bit >> 3) >> np.uint64(bit & 7)
        lows = lows & halves | lows << np.uint64(32 - 4 * k) & halves << np.uint64(32)
        lows = lows & quarters | lows << np.uint64(16 - 2 * k) & quarters << np.uint64(16)
        lows = lows & eighths | lows << np.uint64(8 - k) & eighths << np.uint64(8)
        if first + n - i < 8:
            lows &= (np.uint64(1) << np.uint64(8 * (first + n - i))) - np.uint64(1)
        lows *= np.uint64(0x0101010101010101)
        signs = load64(raw, sign_at + (i >> 3)) >> np.uint64(i & 7)
        place8(ones, i, np.uint32(k), lows, signs, np.uint32(start + total), kept)
        total += np.int64(lows >> np.uint64(56))
        bit += 8 * k
    return total


@numba.njit(nogil=True)
def _join_large(ones, first, n, raw, bit, k, sign_at, start, kept):
    """Do the same for any k, one value at a time; with large gaps there are few values."""
    mask, total = np.uint64((1 << k) - 1), 0
    for i in range(first, first + n):
        total += np.int64(load64(raw, bit >> 3) >> np.uint64(bit & 7) & mask)
        position = ((np.int64(get(ones, i)) - i) << k) + total + i + start
        sign = np.uint32(get(raw, sign_at + (i >> 3))) >> np.uint32(i & 7) & np.uint32(1)
        put(kept, i, np.uint32(position) | sign << np.uint32(31))
        bit += k
    return total


@numba.njit(nogil=True)
def _fetch(blocks, starts, lengths, counts, modes, block, values, raw, kept, ones, sub_counts, sub_ks):
    """Decode one block, whose bounds `codec` has checked, into kept. Return False if no encoder writes such bytes."""
    start, length = starts[block], lengths[block]
    for i in range(length):
        put(raw, i, get(blocks, start + i))
    raw[length : length + 64] = 0
    mode, k = modes[block] & 15, modes[block] >> 4
    return decode_block(raw, length, mode, k, counts[block], values, kept, ones, sub_counts, sub_ks)


@compiled
def dense_blocks(blocks, starts, lengths, counts, modes, first, last, numel, height, plus, minus, out):
    """Write blocks [first, last) as numbers into the tensor. Return the first invalid block, or -1.

    height  number of rows of a zeroed matrix that is stored by columns, or 0
    """
    raw, kept, ones = np.zeros(RAW, np.uint8), np.zeros(KEPT, np.uint32), np.zeros(KEPT, np.uint32)
    sub_counts, sub_ks = np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, last):
        start = block * BLOCK
        values = min(BLOCK, numel - start)
        if not _fetch(blocks, starts, lengths, counts, modes, block, values, raw, kept, ones, sub_counts, sub_ks):
            return block
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
    return -1


@compiled
def mask_blocks(blocks, starts, lengths, counts, modes, first, last, numel, height, masks, offset, words):
    """Write blocks [first, last) as bits. Return the first invalid block, or -1.

    Bits of plus begin at word `offset`, those of minus `words` later; with `height`, all of them are zero before.
    """
    raw, kept, ones = np.zeros(RAW, np.uint8), np.zeros(KEPT, np.uint32), np.zeros(KEPT, np.uint32)
    sub_counts, sub_ks = np.zeros(16, np.int64), np.zeros(16, np.int64)
    for block in range(first, last):
        start = block * BLOCK
        values = min(BLOCK, numel - start)
        if not _fetch(blocks, starts, lengths, counts, modes, block, values, raw, kept, ones, sub_counts, sub_ks):
            return block
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
    return -1


@compiled
def indices_of(plus, minus):
    """Return the positions of the bits set in either mask, and 1 or -1 for each."""
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
