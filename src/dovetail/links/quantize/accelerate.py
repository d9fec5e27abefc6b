"""Which weights faster code works on, with the bits of the definitions in plain torch.

On processors, compiled loops (`loops`); on GPUs, Triton's kernels (`kernels`) where Triton is installed and compiles on
this machine, else bitsandbytes' dequantize kernel where that is installed, on our codes, into our buffer. All take
seconds to import, so they are not imported for small weights. bitsandbytes' kernel reads wrong scales where blocks
straddle rows, and loses accuracy at blocks of 2048 and more, on processors at least: these take the definition.
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

from dovetail.chains.packing import pack

if TYPE_CHECKING:
    from dovetail.chains.grid import QuantizedWeight

SMALLEST = 2**19
"""Weights from which a kernel is worth its import."""
SMALLEST_FOR_LOOPS = 2**17
DEVICES = ("cuda",)
"""Where the kernels are faster than what else there is."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


def by_kernels(quantized: QuantizedWeight, tensor: Tensor) -> bool:
    """Return whether Triton's kernels (`dovetail.links.quantize.kernels`) work on this tensor of a weight."""
    o, i = quantized.shape
    plain = type(tensor) is Tensor and type(quantized.codes) is Tensor and quantized.codes.device == tensor.device
    usable = plain and tensor.device.type in DEVICES and tensor.dtype in KERNEL_DTYPES and o * i >= SMALLEST
    return usable and kernels_work(tensor.device)


@cache
def kernels_work(device: torch.device) -> bool:
    """Return whether Triton's kernels compile for this device and equal the definition on a sample: products nearly.

    Triton is installed with torch for CUDA on Linux, and compiles at the first call with a C compiler, which it may not
    find.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        block, bits = 64, 4
        codes = torch.arange(256).repeat(block).to(torch.uint8)
        scale = torch.logspace(-3, 1, 2 * len(codes) // block)
        zero = torch.randint(16, scale.shape, generator=generator).float()
        levels = torch.randn(16, generator=generator).sort().values
        middles = (levels[1:] + levels[:-1]) / 2
        number = torch.stack([codes >> 4, codes & 15], dim=1).view(-1, block).float()
        rows = 12 * scale[:, None] * torch.randn(number.shape, generator=generator)
        code = ((rows / scale[:, None]).round() + zero[:, None]).clamp(0, 15)
        scaled = rows * (1 / scale)[:, None]
        wanted = [((number - zero[:, None]) * scale[:, None]).to(dtype) for dtype in KERNEL_DTYPES]
        wanted.append((code - zero[:, None]) * scale[:, None])
        wanted.append(levels[torch.bucketize(scaled, middles)] * scale[:, None])
        x = torch.randn(2, 4 * block, generator=generator)
        product = x.double() @ wanted[0].view(-1, 4 * block).t().double()
    try:
        from dovetail.links.quantize import kernels

        points = pack(zero.to(torch.uint8), bits)
        codes, scale, points, levels, middles = (each.to(device) for each in (codes, scale, points, levels, middles))
        found = [torch.empty(number.shape, dtype=dtype, device=device) for dtype in KERNEL_DTYPES]
        for each in found:
            kernels.decode(codes, scale, points, None, each, bits=bits, block=block)
        found += [rows.to(device, copy=True), rows.to(device, copy=True)]
        kernels.snap_affine(found[-2], scale, points, None, first=0, bits=bits, block=block)
        kernels.snap_levels(found[-1], scale, None, levels, middles, first=0, block=block, reach=1.0, divides=False)
        y = kernels.multiply(codes, scale, points, None, x.to(device), product.shape[1], bits=bits, block=block)
    except Exception:  # an optional accelerator that does not run on this machine is an absent one
        return False
    near = (y.cpu() - product).abs().max() <= 4 * block * torch.finfo(torch.float32).eps * product.abs().max()
    return bool(near) and all(torch.equal(each.cpu(), right) for each, right in zip(found, wanted, strict=True))


Kernel = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
"""(packed codes, float32 scales, shape) -> values."""


def four_bit_kernel(
    name: str, levels: tuple[float, ...], shape: tuple[int, int], block: int, dtype: torch.dtype, codes: Tensor
) -> Kernel | None:
    """Return bitsandbytes' kernel for a weight of this shape, or None where the path in plain torch is used."""
    usable = name in BOOKS and shape[1] % block == 0 and block <= LARGEST_BLOCK and shape[0] * shape[1] >= SMALLEST
    usable = usable and dtype in KERNEL_DTYPES and type(codes) is Tensor
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
