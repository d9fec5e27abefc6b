"""K-quants: blocks of 256 weights whose groups have scales of 4, 6 or 8 bits, times a float16 number of the block.

| format | group | scale of a group         | offset                     | value          | bits per weight |
|--------|-------|--------------------------|----------------------------|----------------|-----------------|
| Q2_K   | 16    | d * 4 bits               | -dmin * 4 bits             | q * s + o      | 2.625           |
| Q3_K   | 16    | d * (6 bits - 32)        |                            | (q - 4) * s    | 3.4375          |
| Q4_K   | 32    | d * 6 bits               | -dmin * 6 bits             | q * s + o      | 4.5             |
| Q5_K   | 32    | d * 6 bits               | -dmin * 6 bits             | q * s + o      | 5.5             |
| Q6_K   | 16    | d * signed 8 bits        |                            | (q - 32) * s   | 6.5625          |

Q3_K and Q6_K hold zero exactly; the others do not, in general.

Source: ggml's `ggml-quants.c` (`dequantize_row_q2_K` and others), and `quants.py` of the gguf package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.links.quantize.ggml.weight import BlockFormat, Plane, float16_at


def _q2(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """16 bytes of a scale and an offset of 4 bits each, d, dmin."""
    factors = scales[:, :16]
    return float16_at(scales, 16) * (factors & 15), -(float16_at(scales, 18) * (factors >> 4))


def _q3(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """8 bytes of low halves, 4 bytes of the two high bits of four factors each, d."""
    low = torch.cat([scales[:, :8] & 15, scales[:, :8] >> 4], dim=1)
    high = torch.cat([(scales[:, 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    return float16_at(scales, 12) * ((low | high << 4).float() - 32), None


def _q4(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """d, dmin, and 12 bytes of eight factors and eight offsets of 6 bits."""
    first, second, third = scales[:, 4:8], scales[:, 8:12], scales[:, 12:16]
    factors = torch.cat([first & 63, (third & 15) | (first >> 2) & 48], dim=1)
    offsets = torch.cat([second & 63, (third >> 4) | (second >> 2) & 48], dim=1)
    return float16_at(scales, 0) * factors, -(float16_at(scales, 2) * offsets)


def _q6(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """16 signed bytes, d."""
    return float16_at(scales, 16) * scales[:, :16].contiguous().view(torch.int8).float(), None


_BOTH = (0, 2)  # d and dmin before the factors of Q4_K and Q5_K
_LOW_2, _HIGH_4 = Plane(nbytes=64, bits=2, run=32), Plane(nbytes=64, bits=2, run=32, shift=4)
_THIRD, _FIFTH = (Plane(nbytes=32, bits=1, run=32, shift=shift) for shift in (2, 4))
_LOW_4, _LOW_4_OF_64 = (Plane(nbytes=128, bits=4, run=run) for run in (32, 64))

Q2_K = BlockFormat("Q2_K", 10, 256, 16, (_LOW_2,), ((16, 80),), 84, _q2, has_zero=False, halves=(16, 18))
Q3_K = BlockFormat("Q3_K", 11, 256, 16, (_THIRD, _LOW_2), ((0, 96),), 110, _q3, lowest=-4, halves=(12,))
Q4_K = BlockFormat("Q4_K", 12, 256, 32, (_LOW_4,), ((16, 144),), 144, _q4, has_zero=False, halves=_BOTH)
Q5_K = BlockFormat("Q5_K", 13, 256, 32, (_FIFTH, _LOW_4), ((16, 176),), 176, _q4, has_zero=False, halves=_BOTH)
Q6_K = BlockFormat("Q6_K", 14, 256, 16, (_LOW_4_OF_64, _HIGH_4), ((0, 192),), 210, _q6, lowest=-32, halves=(16,))
