"""Scales in 8 bits: QLoRA's double quantization, in the layout of bitsandbytes.

The block scales are quantized too: minus their mean, in blocks of 256, to the 256 values of the "dynamic map" (Dettmers
2015, arXiv:1511.04561): a sign, a decimal exponent from 1e-6 to 1 given by the number of leading zero bits, and the
remaining bits as a linear fraction. A scale takes 8.125 bits instead of 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dovetail.chains.packing import read, value_table

BLOCK = 256


def _dynamic_map() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = ((10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += means + [-mean for mean in means]
    return tuple(sorted(values))


DYNAMIC_MAP = _dynamic_map()
"""The 256 values in ascending order, each a float32; the lowest is -0.993, the highest 1."""


def encode(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 scales (n,) -> codes uint8 (n,), float32 absolute maxima (ceil(n / 256),) and float32 offset ().

    As in bitsandbytes' CPU kernel, a number is first rounded to one of 2^16 between -1 and 1, then to the nearest value
    of the map, a tie to the lower one. A block that is all zero gets code 0.
    """
    offset = scale.mean()
    centred = scale - offset
    blocks = torch.nn.functional.pad(centred, (0, -len(centred) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    values = value_table(DYNAMIC_MAP, 8, scale).view(-1)
    middles = 0.5 * (values[:-1] + values[1:])
    divisor = absmax.masked_fill(absmax == 0, torch.inf)[:, None]
    wanted = (blocks * (1.0 / divisor)).clamp(-1.0, 1.0)
    rounded = ((wanted + 1.0) * 0.5 * 65535 + 0.5).trunc()
    codes = torch.bucketize(-1.0 + 2.0 * rounded / 65535, middles)
    codes = codes.masked_fill((absmax == 0)[:, None], 0)
    return codes.to(torch.uint8).view(-1)[: len(scale)].clone(), absmax, offset


def decode(encoded: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Return the float32 scales [start, stop) of what `encode` returned."""
    codes, absmax, offset = encoded
    first = start // BLOCK
    factor = absmax[first : -(-stop // BLOCK)].repeat_interleave(BLOCK)[start - first * BLOCK :][: stop - start]
    return read(codes, 8, start, stop, value_table(DYNAMIC_MAP, 8, codes)).mul_(factor).add_(offset)
