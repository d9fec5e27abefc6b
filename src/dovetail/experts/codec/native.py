"""What compiled loops share: compilation that is kept on disk where it can be, machine instructions on words, CRC-32C.

Every loop is compiled by numba on first use and kept beside its file, or in the user's cache where the package can't
be written, or not at all. All of them release the interpreter's lock, so that threads run them side by side. Kept loops
don't notice a change of this file: who makes one removes `__pycache__`.

Arrays are read and written here without the check that numba makes for negative positions, which costs a third of the
decoder's time. Who uses `get`, `put` and `load64` answers for the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

_instruction = cast(Any, intrinsic)  # whose first argument its callers don't give


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called with arguments of some types."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither the package nor the user's cache can be written
        return numba.njit(function, nogil=True)


@_instruction
def popcount(typing_context: Any, word: Any):
    """How many bits of a uint64 are set, as an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@_instruction
def trailing_zeros(typing_context: Any, word: Any):
    """The number of the lowest bit that is set in a uint64, as an int64; 64 where none is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.false_bit)

    return types.int64(types.uint64), generate


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@_instruction
def get(typing_context: Any, array: Any, at: Any):
    """array[at], 0 <= at < len(array)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature, arguments))

    return array.dtype(array, types.int64), generate


@_instruction
def put(typing_context: Any, array: Any, at: Any, value: Any):
    """array[at] = value, 0 <= at < len(array); the value is of the array's dtype."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


@_instruction
def load64(typing_context: Any, data: Any, at: Any):
    """Eight bytes of a uint8 array from position `at` on, 0 <= at <= len(data) - 8, as a little-endian uint64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature, arguments)
        word = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(types.Array(types.uint8, 1, "C"), types.int64), generate


@_instruction
def prefetch(typing_context: Any, array: Any, at: Any):
    """Asks for the cache line of array[at], which may lie behind the array's end: nothing is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(_place(context, builder, signature, arguments), address)
        builder.call(function, [place, number(0), number(3), number(1)])  # to read, into the nearest cache, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _spread(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of one value."""
    vector, number = ir.VectorType(value.type, lanes), ir.IntType(32)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, number(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(number, lanes), [number(0)] * lanes))


@_instruction
def above64(typing_context: Any, array: Any, at: Any, mask: Any, bound: Any):
    """Bit j of a uint64: array[at + j] & mask > bound, of 64 unsigned integers; 0 <= at <= len(array) - 64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(array.dtype), 64)
        place = _place(context, builder, signature, arguments)
        values = builder.load(builder.bitcast(place, vector.as_pointer()), align=array.dtype.bitwidth // 8)
        mask, bound = _spread(builder, arguments[2], 64), _spread(builder, arguments[3], 64)
        return builder.bitcast(builder.icmp_unsigned(">", builder.and_(values, mask), bound), ir.IntType(64))

    return types.uint64(array, types.int64, array.dtype, array.dtype), generate


@_instruction
def place8(typing_context: Any, ones: Any, at: Any, k: Any, lows: Any, signs: Any, start: Any, kept: Any):
    """kept[i] = ((ones[i] - i) << k) + byte j of lows + i + start, and bit j of signs in bit 31; i = at + j, j = 0..7.

    All uint32 but `lows` and `signs`, uint64. As vectors, which the compiler doesn't make of a loop by itself.
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


@_instruction
def _crc_instruction(typing_context: Any, value: Any, word: Any):
    """The CRC-32C register after eight more bytes, by the processor (SSE 4.2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)] * 2)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse42.crc32.64.64")
        return builder.call(function, arguments)

    return types.uint64(types.uint64, types.uint64), generate


def _crc_tables() -> np.ndarray:
    """[j, b]: the CRC register, from 0, after byte b and j bytes of zeros."""
    tables = np.zeros((8, 256), dtype=np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        tables[0, byte] = value
    for j in range(1, 8):
        tables[j] = tables[j - 1] >> 8 ^ tables[0][tables[j - 1] & 0xFF]
    return tables


_CRC = _crc_tables()


@numba.njit(nogil=True)
def crc_tables_step(value, word):
    """The CRC-32C register after eight more bytes, by eight tables."""
    byte, mixed = np.uint64(0xFF), word ^ value
    return np.uint64(
        _CRC[7, mixed & byte]
        ^ _CRC[6, mixed >> np.uint64(8) & byte]
        ^ _CRC[5, mixed >> np.uint64(16) & byte]
        ^ _CRC[4, mixed >> np.uint64(24) & byte]
        ^ _CRC[3, mixed >> np.uint64(32) & byte]
        ^ _CRC[2, mixed >> np.uint64(40) & byte]
        ^ _CRC[1, mixed >> np.uint64(48) & byte]
        ^ _CRC[0, mixed >> np.uint64(56)]
    )


_target = cast(Any, config)  # what numba was told to compile for; by itself it is this processor
_by_instruction = _target.CPU_NAME is None and _target.CPU_FEATURES is None
_by_instruction = _by_instruction and binding.get_host_cpu_features().get("sse4.2", False)
_step = _crc_instruction if _by_instruction else crc_tables_step


@numba.njit(nogil=True)
def crc32c_of(data, length):
    """CRC-32C (Castagnoli: polynomial 0x1EDC6F41, reflected, from and xor 0xFFFFFFFF) of the first `length` bytes."""
    value = np.uint64(0xFFFFFFFF)
    at = 0
    while at + 8 <= length:
        value = _step(value, load64(data, at))
        at += 8
    while at < length:
        value = (value >> np.uint64(8)) ^ np.uint64(_CRC[0, (value ^ np.uint64(data[at])) & np.uint64(0xFF)])
        at += 1
    return value ^ np.uint64(0xFFFFFFFF)


@compiled
def _crc32c(data):
    return crc32c_of(data, len(data))


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C of bytes or of a uint8 array: 0xE3069283 of b"123456789"."""
    return int(_crc32c(np.frombuffer(data, dtype=np.uint8).copy() if isinstance(data, bytes) else data))
