"""Blocks of 32 weights with one float16 scale `d`, and in the formats `_1` a float16 offset `m`.

| format | bytes of a block        | value           | bits per weight |
|--------|-------------------------|-----------------|-----------------|
| Q4_0   | d, 16 of codes          | (q - 8) * d     | 4.5             |
| Q4_1   | d, m, 16 of codes       | q * d + m       | 5               |
| Q5_0   | d, 4 of high bits, 16   | (q - 16) * d    | 5.5             |
| Q5_1   | d, m, 4 of high bits, 16| q * d + m       | 6               |
| Q8_0   | d, 32 of signed codes   | q * d           | 8.5             |

Code j of 4 bits is in the low half of byte j, code j + 16 in its high half. Fifth bits are those of a little-endian
number. A scale may be negative. Formats without an offset hold zero exactly.

Source: ggml's `ggml-quants.c` (`dequantize_row_q4_0` and others), and `quants.py` of the gguf package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.links.quantize.ggml.weight import BlockFormat, Plane, float16_at

_LOW = Plane(nbytes=16, bits=4, run=16)
_FIFTH = Plane(nbytes=4, bits=1, run=1, shift=4)


class _Signed(Plane):
    """Bytes that are signed codes: as codes without a sign, 128 is added."""

    def unpack(self, plane: Tensor) -> Tensor:
        return plane ^ 128

    def pack(self, codes: Tensor) -> Tensor:
        return codes ^ 128


def _scale(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    return float16_at(scales, 0), None


def _scale_and_offset(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    both = scales.contiguous().view(torch.float16).float()
    return both[:, :1], both[:, 1:]


Q4_0 = BlockFormat("Q4_0", 2, 32, 32, (_LOW,), ((2, 18),), 18, _scale, lowest=-8)
Q4_1 = BlockFormat("Q4_1", 3, 32, 32, (_LOW,), ((4, 20),), 20, _scale_and_offset, has_zero=False, halves=(0, 2))
Q5_0 = BlockFormat("Q5_0", 6, 32, 32, (_FIFTH, _LOW), ((2, 22),), 22, _scale, lowest=-16)
Q5_1 = BlockFormat("Q5_1", 7, 32, 32, (_FIFTH, _LOW), ((4, 24),), 24, _scale_and_offset, has_zero=False, halves=(0, 2))
Q8_0 = BlockFormat("Q8_0", 8, 32, 32, (_Signed(nbytes=32, bits=8, run=32),), ((2, 34),), 34, _scale, lowest=-128)
