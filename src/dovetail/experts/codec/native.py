"""Shared parts of the compiled loops (`dovetail.chains.compiled`): machine instructions on words, and CRC-32C.

`get`, `put` and `load64` access arrays without numba's handling of negative positions, which costs a third of the
decoder's time. The caller must ensure the bounds.
"""

from __future__ import annotations

from typing import Any, cast

import google_crc32c
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.cpython.unsafe import numbers
from numba.extending import intrinsic

_instruction = cast(Any, intrinsic)  # callers do not pass the first argument of an intrinsic
_trailing_zeros = cast(Any, numbers.trailing_zeros)


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """Return the CRC-32C (Castagnoli) of contiguous bytes: 0xE3069283 for b"123456789"."""
    return google_crc32c.value(bytes(data))


@_instruction
def popcount(typing_context: Any, word: Any):
    """Return the number of set bits of a uint64, as an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@numba.njit(nogil=True)
def trailing_zeros(word):
    """Return the position of the lowest set bit of a uint64, as an int64; 64 if no bit is set."""
    return np.int64(_trailing_zeros(word))


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@_instruction
def get(typing_context: Any, array: Any, at: Any):
    """Return array[at], 0 <= at < len(array)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature, arguments))

    return array.dtype(array, types.int64), generate


@_instruction
def put(typing_context: Any, array: Any, at: Any, value: Any):
    """Assign array[at] = value, 0 <= at < len(array); the value has the array's dtype."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


@_instruction
def load64(typing_context: Any, data: Any, at: Any):
    """Return eight bytes of a uint8 array from position `at`, 0 <= at <= len(data) - 8, as a little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature, arguments)
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(types.Array(types.uint8, 1, "C"), types.int64), generate


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector that repeats one value."""
    vector, number = ir.VectorType(value.type, lanes), ir.IntType(32)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, number(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(number, lanes), [number(0)] * lanes))


@_instruction
def above64(typing_context: Any, array: Any, at: Any, mask: Any, bound: Any):
    """Return a uint64 with bit j set if array[at + j] & mask > bound, unsigned; 0 <= at <= len(array) - 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(array.dtype), 64)
        place = _place(context, builder, signature, arguments)
        values = builder.load(builder.bitcast(place, vector.as_pointer()), align=array.dtype.bitwidth // 8)
        mask, bound = _spread(builder, arguments[2], 64), _spread(builder, arguments[3], 64)
        return builder.bitcast(builder.icmp_unsigned(">", builder.and_(values, mask), bound), ir.IntType(64))

    return types.uint64(array, types.int64, array.dtype, array.dtype), generate


@_instruction
def place8(typing_context: Any, ones: Any, at: Any, k: Any, lows: Any, signs: Any, start: Any, kept: Any):
    """Assign kept[i] = ((ones[i] - i) << k) + byte j of lows + i + start, with bit j of signs in bit 31.

    i = at + j, j = 0..7. `lows` and `signs` are uint64, the rest uint32. LLVM does not vectorize such a loop itself.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, first, shift, bytes_, bits, begin, _ = arguments
        number = ir.IntType(32)
        vector = ir.VectorType(number, 8)

        def place(array: int) -> Any:
            given = context.make_array(signature.args[array])(context, builder, arguments[array])
            return builder.bitcast(builder.gep(given.data, [first]), vector.as_pointer())

        def spread(value: Any) -> Any:
            return _spread(builder, value, 8)

        numbers = builder.add(spread(builder.trunc(first, number)), ir.Constant(vector, list(range(8))))
        quotients = builder.shl(builder.sub(builder.load(place(0), align=4), numbers), spread(shift))
        low = builder.zext(builder.bitcast(bytes_, ir.VectorType(ir.IntType(8), 8)), vector)
        positions = builder.add(builder.add(quotients, low), builder.add(numbers, spread(begin)))
        moved = builder.shl(spread(builder.trunc(bits, number)), ir.Constant(vector, list(range(31, 23, -1))))
        sign = builder.and_(moved, ir.Constant(vector, [1 << 31] * 8))
        builder.store(builder.or_(positions, sign), place(6), align=4)
        return context.get_dummy_value()

    words = types.Array(types.uint32, 1, "C")
    return types.void(words, types.int64, types.uint32, types.uint64, types.uint64, types.uint32, words), generate
