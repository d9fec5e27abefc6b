"""Laws of packing: codes come back, whole and from any place, in exactly the bytes that are promised."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.chains.packing import pack, packed_nbytes, read, unpack, value_table

law = settings(derandomize=True, deadline=None, max_examples=200)


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Bits, and codes of so many bits."""
    bits = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))


@law
@given(coded())
def test_codes_come_back_in_the_promised_bytes(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_nbytes(len(codes), bits)
    assert unpack(packed, bits, 0, len(codes)).tolist() == codes


@law
@given(coded(), st.data())
def test_any_range_is_read_without_the_rest(case: tuple[int, list[int]], data: st.DataObject) -> None:
    bits, codes = case
    start = data.draw(st.integers(0, len(codes)))
    stop = data.draw(st.integers(start, len(codes)))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert unpack(packed, bits, start, stop).tolist() == codes[start:stop]
    levels = tuple(float(code) - 1.5 for code in range(2**bits))
    found = read(packed, bits, start, stop, value_table(levels, bits, packed))
    assert found.tolist() == [levels[code] for code in codes[start:stop]]


@law
@given(coded())
def test_bytes_are_the_codes_as_one_big_endian_number(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    number = int.from_bytes(bytes(packed.tolist()), "big")
    digits = [number >> (8 * packed.numel() - bits * (at + 1)) & (2**bits - 1) for at in range(len(codes))]
    assert digits == codes


@law
@given(coded(), coded())
def test_equal_bytes_mean_equal_codes(one: tuple[int, list[int]], two: tuple[int, list[int]]) -> None:
    bits = one[0]
    codes = [code % 2**bits for code in two[1]]
    count = min(len(one[1]), len(codes))
    first = pack(torch.tensor(one[1][:count], dtype=torch.uint8), bits)
    second = pack(torch.tensor(codes[:count], dtype=torch.uint8), bits)
    assert torch.equal(first, second) == (one[1][:count] == codes[:count])
