"""Which weights faster code works on, with the bits of the definitions in plain torch.

On processors, compiled loops (`dovetail.links.quantize.loops`); on GPUs, bitsandbytes' dequantize kernel where it is
installed, on our codes, into our buffer. Both take seconds to import, so they are not imported for small weights. The
kernel reads wrong scales where blocks straddle rows, and loses accuracy at blocks of 2048 and more, on processors at
least: these take the definition.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dovetail.chains.grid import QuantizedWeight

SMALLEST = 2**19
"""Weights from which the kernel is worth its import."""
SMALLEST_FOR_LOOPS = 2**17
DEVICES = ("cuda",)
"""Where the kernel is faster than what else there is."""
LARGEST_BLOCK = 1024
BOOKS = ("nf4", "fp4")
"""The code books that the kernel knows."""

# One complaint, about a kernel nobody here uses, would greet every user: transformers' Trainer imports peft, and that
# bitsandbytes.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())


def by_loops(quantized: QuantizedWeight, rows: Tensor) -> bool:
    """Return whether the compiled loops (`dovetail.links.quantize.loops`) work on these rows of a weight."""
    o, i = quantized.shape
    plain = rows.device.type == "cpu" and type(rows) is Tensor
    return plain and i % quantized.block == 0 and o * i >= SMALLEST_FOR_LOOPS


Kernel = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
"""(packed codes, float32 scales, shape) -> values."""


def four_bit_kernel(
    name: str, levels: tuple[float, ...], shape: tuple[int, int], block: int, dtype: torch.dtype, codes: Tensor
) -> Kernel | None:
    """Return the kernel for a weight of this shape, or None where the path in plain torch is used."""
    usable = name in BOOKS and shape[1] % block == 0 and block <= LARGEST_BLOCK and shape[0] * shape[1] >= SMALLEST
    usable = usable and dtype in (torch.float32, torch.bfloat16, torch.float16) and type(codes) is Tensor
    if not usable or codes.device.type not in DEVICES or not _available():
        return None
    return _proved_kernel(name, levels, block, dtype, codes.device)


@cache
def _available() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("bitsandbytes")
    except Exception:  # an optional accelerator that does not load on this machine is an absent one
        return False
    return True


@lru_cache(maxsize=64)
def _proved_kernel(
    name: str, levels: tuple[float, ...], block: int, dtype: torch.dtype, device: torch.device
) -> Kernel | None:
    """Return the kernel if it equals the definition bit for bit, for every pair of codes, on this device."""

    def kernel(codes: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.ops.bitsandbytes.dequantize_4bit.default(codes, scale, block, name, shape, dtype)

    with torch.inference_mode(False), torch.no_grad():
        codes = torch.arange(256, device=device).repeat(block).to(torch.uint8)
        count = 2 * len(codes) // block
        scale = torch.logspace(-3, 1, count, device=device) * (1 - 2 * (torch.arange(count, device=device) % 7 == 0))
        pairs = torch.stack([codes >> 4, codes & 15], dim=1).view(count, block)
        expected = (torch.tensor(levels, device=device)[pairs.long()] * scale[:, None]).to(dtype)
        try:
            found = kernel(codes, scale, (count // 4, 4 * block)).view_as(expected)
        except (RuntimeError, NotImplementedError):
            return None
        return kernel if torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) else None
