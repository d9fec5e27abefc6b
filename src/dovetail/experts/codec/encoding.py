"""The form of one block, and its encoder: up to 65,536 values, of which some are kept with a sign (`docs/format.md`).

Kept values are numbered by their position in the block. A gap g is the number of values between two neighbouring kept
ones. Golomb's code for geometric gaps with a power of two (Rice 1979) writes g div 2^k in unary and g mod 2^k in k
bits. At density p it takes k + 1 + q/(1-q) + 1 bits per kept value with its sign, q = (1-p)^(2^k): 1.009 times the
entropy at 5 %. With k = 0 it is the bitmap of the kept values. The encoder writes each block in its shortest form.

In these functions `kept` is uint32: the position in the block, with the sign (1 is minus) in bit 31.
"""

from __future__ import annotations

import numba
import numpy as np

from dovetail.chains.compiled import compiled
from dovetail.experts.codec.native import get, put, trailing_zeros

BLOCK, SUB = 65536, 4096
EMPTY, RICE, SUBS, FULL = 0, 1, 2, 3
PAYLOAD = BLOCK // 8 * 2
"""The largest payload in bytes: a bitmap, and a sign for each value."""
RAW, KEPT = PAYLOAD + 64, BLOCK + 64
"""Lengths of the arrays in which a block is coded. The bytes after the payload are zero."""
MAX_K = 15


@compiled
def encode_blocks(plus, minus, numel, out, lengths, counts, modes):
    """Encode masks into `out` and fill in the fields of the directory. Return the number of bytes used."""
    raw, kept, gaps = np.zeros(RAW, np.uint8), np.zeros(KEPT, np.uint32), np.zeros(KEPT, np.uint32)
    sub_counts, sub_ks = np.zeros(16, np.int64), np.zeros(16, np.int64)
    used = 0
    for block in range(len(lengths)):
        values, count = min(BLOCK, numel - block * BLOCK), 0
        first = block * (BLOCK // 64)
        for w in range((values + 63) // 64):
            negative = get(minus, first + w)
            both = get(plus, first + w) | negative
            while both != np.uint64(0):
                bit = trailing_zeros(both)
                both &= both - np.uint64(1)
                sign = np.uint32(negative >> np.uint64(bit) & np.uint64(1))
                put(kept, count, np.uint32(w * 64 + bit) | sign << np.uint32(31))
                count += 1
        mode, k, length = encode(kept, count, values, raw, gaps, sub_counts, sub_ks)
        out[used : used + length] = raw[:length]
        lengths[block], counts[block], modes[block] = length, count, mode | k << 4
        used += length
    return used


@compiled
def transposed(mask, rows, columns):
    """Return the mask of the transposed matrix."""
    out = np.zeros(len(mask), np.uint64)
    for w in range(len(mask)):
        word = mask[w]
        while word != np.uint64(0):
            at = w * 64 + trailing_zeros(word)
            word &= word - np.uint64(1)
            to = (at % columns) * rows + at // columns
            out[to >> 6] |= np.uint64(1) << np.uint64(to & 63)
    return out


@numba.njit(nogil=True)
def _quotients(gaps, first, last, k):
    """Return the sum of the quotients of gaps[first:last]."""
    total = np.uint64(0)
    for i in range(first, last):
        total += np.uint64(get(gaps, i) >> np.uint32(k))
    return np.int64(total)


@numba.njit(nogil=True)
def _parameter(gaps, first, last, span):
    """Return the k for which gaps[first:last], over `span` values, are shortest, and the bits of both streams."""
    count = last - first
    if count == 0:
        return 0, 0
    k = 0
    while k < MAX_K and (count << (k + 1)) * 13 < (span - count) * 9:  # 2^k about ln 2 times the mean gap
        k += 1
    bits = count * (k + 1) + _quotients(gaps, first, last, k)
    while k > 0:
        other = count * k + _quotients(gaps, first, last, k - 1)
        if other > bits:
            break
        bits, k = other, k - 1
    while k < MAX_K:
        other = count * (k + 2) + _quotients(gaps, first, last, k + 1)
        if other >= bits:
            break
        bits, k = other, k + 1
    if bits > span:
        return 0, count + _quotients(gaps, first, last, 0)
    return k, bits


@numba.njit(nogil=True)
def encode(kept, count, values, raw, gaps, counts, ks):
    """Encode a block into raw (uint8, RAW long) in its shortest form. Return mode, k and the number of bytes.

    kept, gaps  uint32, KEPT long; gaps, counts and ks (int64, 16 each) are scratch
    """
    if count == 0:
        return EMPTY, 0, 0
    signs = (count + 7) >> 3
    if count == values:
        raw[:signs] = 0
        _write_signs(kept, count, raw, 0)
        return FULL, 0, signs
    before = np.uint32(0xFFFFFFFF)
    for i in range(count):
        at = get(kept, i) & np.uint32(0xFFFF)
        put(gaps, i, at - before - np.uint32(1))
        before = at
    k, bits = _parameter(gaps, 0, count, values)
    low = count * k
    length = ((low + 7) >> 3) + signs + ((bits - low + 7) >> 3)
    mode, at = RICE, 0
    subs = (values + SUB - 1) // SUB
    if subs > 1:
        first, low_subs, bits_subs, most = 0, 0, 0, 0
        for s in range(subs):
            last = first
            while last < count and np.int64(get(kept, last) & np.uint32(0xFFFF)) < (s + 1) * SUB:
                last += 1
            if last > first:
                whole = get(gaps, first)
                put(gaps, first, np.uint32(np.int64(get(kept, first) & np.uint32(0xFFFF)) - s * SUB))
                ks[s], taken = _parameter(gaps, first, last, SUB)
                put(gaps, first, whole)
            else:
                ks[s], taken = 0, 0
            counts[s] = last - first
            most = max(most, last - first)
            low_subs += counts[s] * ks[s]
            bits_subs += taken
            first = last
        length_subs = 2 * subs + ((low_subs + 7) >> 3) + signs + ((bits_subs - low_subs + 7) >> 3)
        if length_subs < length and most < SUB:
            mode, length, low, k, at = SUBS, length_subs, low_subs, 0, 2 * subs
    raw[:length] = 0
    if mode == SUBS:
        for s in range(subs):
            raw[2 * s] = np.uint8(counts[s] & 0xFF)
            raw[2 * s + 1] = np.uint8(counts[s] >> 8 | ks[s] << 4)
    else:
        subs, counts[0], ks[0] = 1, count, k
    sign_at = at + ((low + 7) >> 3)
    _write_signs(kept, count, raw, sign_at)
    _write_gaps(kept, subs, counts, ks, raw, at, sign_at + signs)
    return mode, k, length


@numba.njit(nogil=True)
def _write_signs(kept, count, raw, at):
    for i in range(count):
        place = at + (i >> 3)
        put(raw, place, get(raw, place) | np.uint8((get(kept, i) >> np.uint32(31)) << np.uint32(i & 7)))


@numba.njit(nogil=True)
def _write_gaps(kept, segments, counts, ks, raw, low_at, unary_at):
    """Write low bits and unary stream of kept values. The gaps restart in each segment."""
    held, filled = np.uint64(0), 0  # low bits that are not yet written
    i = unary = 0
    for s in range(segments):
        before, k = s * SUB - 1, ks[s]
        mask = np.uint64((1 << k) - 1)
        for _ in range(counts[s]):
            at = np.int64(get(kept, i) & np.uint32(0xFFFF))
            gap = at - before - 1
            before = at
            held |= (np.uint64(gap) & mask) << np.uint64(filled)
            filled += k
            while filled >= 8:
                put(raw, low_at, np.uint8(held & np.uint64(0xFF)))
                held >>= np.uint64(8)
                filled -= 8
                low_at += 1
            unary += gap >> k
            place = unary_at + (unary >> 3)
            put(raw, place, get(raw, place) | np.uint8(1 << (unary & 7)))
            unary += 1
            i += 1
    if filled:
        put(raw, low_at, np.uint8(held & np.uint64(0xFF)))
