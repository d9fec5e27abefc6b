"""Blocks whose codes of 4 bits select a level of a table.

| format | block | group | scale of a group          | levels                   | bits per weight |
|--------|-------|-------|---------------------------|--------------------------|-----------------|
| IQ4_NL | 32    | 32    | d                         | -127 to 113, no zero     | 4.5             |
| IQ4_XS | 256   | 32    | d * (6 bits - 32)         | the same                 | 4.25            |
| MXFP4  | 32    | 32    | 2^(e - 128)               | twice those of e2m1      | 4.25            |

MXFP4 holds zero exactly; IQ4_NL and IQ4_XS have no level of zero.

Source: ggml's `ggml-quants.c` and `kvalues_iq4nl`, and `quants.py` of the gguf package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.links.quantize.codebook import Book
from dovetail.links.quantize.ggml.weight import BlockFormat, Plane, float16_at

_NONLINEAR = Book("iq4", (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1_TWICE = Book("e2m1 twice", (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
_HALVES = Plane(nbytes=16, bits=4, run=16)


def _nl(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    return float16_at(scales, 0), None


def _xs(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """d, 2 bytes of the two high bits of eight factors, 4 bytes of their low halves."""
    low = torch.stack([scales[:, 4:8] & 15, scales[:, 4:8] >> 4], dim=2).flatten(1)
    high = torch.stack([(scales[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    return float16_at(scales, 0) * ((low | high << 4).float() - 32), None


def _mx(scales: Tensor) -> tuple[Tensor, Tensor | None]:
    """One byte e: 2^(e - 128), as the bits of a float32 number; below 2^-126 a subnormal one."""
    exponent = scales.int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1).clamp(min=0) << 23)
    return bits.view(torch.float32), None


IQ4_NL = BlockFormat("IQ4_NL", 20, 32, 32, (_HALVES,), ((2, 18),), 18, _nl, book=_NONLINEAR, has_zero=False)
IQ4_XS = BlockFormat(
    "IQ4_XS", 23, 256, 32, (Plane(nbytes=128, bits=4, run=16),), ((8, 136),), 136, _xs, book=_NONLINEAR, has_zero=False
)
MXFP4 = BlockFormat("MXFP4", 39, 32, 32, (_HALVES,), ((1, 17),), 17, _mx, book=_E2M1_TWICE, halves=())
