"""A reader of expert files written from docs/format.md alone: plain Python, value by value, nothing of dovetail."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def bits(data: bytes) -> list[int]:
    return [byte >> i & 1 for byte in data for i in range(8)]


def number(stream: list[int], at: int, width: int) -> int:
    return sum(bit << i for i, bit in enumerate(stream[at : at + width]))


def block(data: bytes, mode: int, k: int, n: int, values: int) -> list[int]:
    out = [0] * values
    if mode == 0:
        assert n == 0
        assert not data
        return out
    if mode == 3:
        assert n == values
        return [-1 if bit else 1 for bit in bits(data)[:n]]
    heads = [(n, k, 0)]
    if mode == 2:
        subs = math.ceil(values / 4096)
        words = [int.from_bytes(data[2 * i : 2 * i + 2], "little") for i in range(subs)]
        heads = [(word & 0xFFF, word >> 12, i * 4096) for i, word in enumerate(words)]
        data = data[2 * subs :]
    else:
        assert mode == 1
    assert sum(count for count, _, _ in heads) == n
    low_nbytes = math.ceil(sum(count * k for count, k, _ in heads) / 8)
    sign_nbytes = math.ceil(n / 8)
    low, signs = bits(data[:low_nbytes]), bits(data[low_nbytes : low_nbytes + sign_nbytes])
    unary = bits(data[low_nbytes + sign_nbytes :])
    assert sum(unary) == n
    low_at = sign_at = unary_at = 0
    for count, k, position in heads:
        for _ in range(count):
            quotient = 0
            while unary[unary_at] == 0:
                quotient, unary_at = quotient + 1, unary_at + 1
            unary_at += 1
            position += (quotient << k) + number(low, low_at, k)
            low_at += k
            out[position] = -1 if signs[sign_at] else 1
            sign_at, position = sign_at + 1, position + 1
    return out


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The header, and each tensor's signs, row-major."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    container, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert sorted(container) == ["__metadata__", "blocks", "directory"]
    begin, end = container["directory"]["data_offsets"]
    directory = rest[begin:end]
    begin, end = container["blocks"]["data_offsets"]
    blocks = rest[begin:end]
    text = container["__metadata__"]["dovetail"]
    assert int(container["__metadata__"]["crc32c"], 16) == crc32c(text.encode() + directory)
    header, tensors = json.loads(text), {}
    entry = offset = 0
    for said in header["tensors"]:
        numel, signs = math.prod(said["shape"]), []
        for first in range(0, numel, 65536):
            fields = directory[9 * entry : 9 * entry + 9]
            nbytes, n = int.from_bytes(fields[:2], "little"), int.from_bytes(fields[2:4], "little")
            mode, k = fields[4] & 15, fields[4] >> 4
            body = blocks[offset : offset + nbytes]
            assert crc32c(body) == int.from_bytes(fields[5:], "little")
            signs += block(body, mode, k, n or (65536 if mode else 0), min(65536, numel - first))
            entry, offset = entry + 1, offset + nbytes
        if said["order"] == "columns":
            rows, columns = said["shape"]
            turned = [0] * numel
            for v, sign in enumerate(signs):
                turned[v % rows * columns + v // rows] = sign
            signs = turned
        tensors[said["name"]] = signs
    assert 9 * entry == len(directory)
    assert offset == len(blocks)
    return header, tensors
