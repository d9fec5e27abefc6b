"""Laws of the codec, for ternary tensors of any shape and density: what is decoded is what was encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail import experts
from dovetail.errors import LoadError
from dovetail.experts.codec.codec import Coded, code, counts_of, decode_dense, decode_indices, decode_masks
from dovetail.experts.merging import packed

law = settings(derandomize=True, deadline=None, max_examples=60)


@dataclass(frozen=True)
class Ternary:
    shape: tuple[int, ...]
    signs: np.ndarray

    @property
    def masks(self) -> np.ndarray:
        return np.stack([packed(torch.from_numpy(self.signs == sign)) for sign in (1, -1)])

    @property
    def coded(self) -> Coded:
        return code(self.masks, self.shape)


@st.composite
def ternary(draw: st.DrawFn) -> Ternary:
    """Stretches of unlike densities, which take different forms of blocks and sub-blocks; rows, tall or wide."""
    stretches = draw(
        st.lists(
            st.tuples(st.integers(0, 30_000), st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]), st.integers(0, 99)),
            max_size=5,
        )
    )
    parts = [np.zeros(0, np.int8)]
    for length, density, seed in stretches:
        random = np.random.default_rng(seed)
        parts.append(random.choice(np.array([-1, 1], np.int8), length) * (random.random(length) < density))
    width = draw(st.sampled_from([0, 1, 2, 5, 16]))
    signs = np.concatenate(parts).astype(np.int8)
    if not width:
        return Ternary((len(signs),), signs)
    signs = signs[: len(signs) // width * width]
    if draw(st.booleans()):  # columns of unlike densities, which are stored by columns
        signs = np.ascontiguousarray(signs.reshape(width, -1).T).reshape(-1)
    return Ternary((len(signs) // width, width), signs)


@law
@given(ternary())
def test_decoding_inverts_encoding(some: Ternary) -> None:
    coded = some.coded
    out = torch.full(some.shape, math.nan, dtype=torch.float32)
    decode_dense(coded, out, 0.5, "w")
    assert np.array_equal(out.numpy().reshape(-1), some.signs * np.float32(0.5))
    masks = np.full_like(some.masks, 2**64 - 1)
    decode_masks(coded, masks, 0, "w")
    assert np.array_equal(masks, some.masks)
    at, signs = decode_indices(coded, "w")
    assert np.array_equal(at, np.flatnonzero(some.signs))
    assert np.array_equal(signs, some.signs[at])
    assert coded.kept == np.count_nonzero(some.signs)


@law
@given(ternary())
def test_no_block_is_longer_than_a_bitmap_with_signs(some: Ternary) -> None:
    directory = some.coded.directory
    counts = counts_of(directory)
    values = np.full(len(directory), 65536)
    values[-1:] = (len(some.signs) - 1) % 65536 + 1
    assert (directory["length"] <= -(-values // 8) + -(-counts // 8)).all()
    assert (directory["length"][counts == 0] == 0).all()
    assert (directory["length"][counts == values] == -(-values // 8)[counts == values]).all()


@law
@given(ternary(), st.data())
def test_every_changed_bit_of_a_block_is_detected(some: Ternary, data: st.DataObject) -> None:
    coded = some.coded
    if not len(coded.blocks):
        return
    blocks = coded.blocks.copy()
    blocks[data.draw(st.integers(0, len(blocks) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(LoadError, match="CRC-32C"):
        decode_dense(replace(coded, blocks=blocks), torch.empty(some.shape), 1.0, "w")


@law
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-3, 1e-30, -1e30]), max_size=200),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_compression_keeps_the_largest_values_and_of_equal_ones_the_first(
    values: list[float], density: float, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    made = experts.compress({"w": tensor}, density)
    order = sorted(range(len(values)), key=lambda at: (-tensor[at].abs().item(), at))
    expected = torch.zeros(len(values), dtype=torch.float64)
    for at in order[: round(density * len(values))]:
        expected[at] = tensor[at].sign()
    spread = tensor.double().std().item() if len(values) > 1 else 0.0
    assert made.scales["w"] == pytest.approx(spread, rel=1e-6)
    at, signs = made.indices("w")
    assert torch.equal(at, expected.nonzero().reshape(-1))
    assert torch.equal(signs.double(), expected[at])
