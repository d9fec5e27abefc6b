"""The code-book grid: value = level[code] * scale, 16 levels in [-1, 1], one scale a block in row-major order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.packing import pack, packed_nbytes, read, value_table
from dovetail.links.quantize import dynamic8
from dovetail.links.quantize.accelerate import four_bit_kernel
from dovetail.links.quantize.nearest import nearest

if TYPE_CHECKING:
    from typing_extensions import Self

DEAD_SCALE = 2.0**-116
"""Blocks with a smaller scale are zero: their values would be subnormal, which no two processors round alike."""

KERNEL_CHUNK = 2**20
"""Weights that the kernel dequantizes at once on CPU: they stay in cache until they are copied into the buffer."""


@dataclass(frozen=True)
class Book:
    """16 levels, `levels[code]`, each the nearest float32; the greatest is 1, one of them is exactly 0."""

    name: str
    levels: tuple[float, ...]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The codes by ascending level; of two zeros, the lower code first."""
        return tuple(sorted(range(16), key=self.levels.__getitem__))

    @cached_property
    def ascending(self) -> tuple[float, ...]:
        return tuple(sorted(self.levels))

    def nearest_level(self, scaled: Tensor) -> Tensor:
        """Return the level nearest to each number in [-1, 1], float32."""
        return nearest(scaled, self.ascending, self.ascending, torch.float32)

    def nearest_code(self, scaled: Tensor) -> Tensor:
        """Return the code of the level nearest to each number in [-1, 1], uint8."""
        return nearest(scaled, self.ascending, self.order, torch.uint8)

    @property
    def zero_code(self) -> int:
        return self.levels.index(0.0)

    @property
    def reach(self) -> float:
        """How far the straight-through gradient passes: half a step beyond the greatest level."""
        return self.ascending[-1] + (self.ascending[-1] - self.ascending[-2]) / 2


class CodeBookWeight(QuantizedWeight):
    """4-bit codes and a scale per block: float32, or 8-bit dynamic codes (`dynamic8`)."""

    def __init__(
        self, codes: Tensor, scales: dict[str, Tensor], *, shape: tuple[int, int], block: int, book: Book, identity: str
    ) -> None:
        """Take packed codes, and scales named "scale", or "scale_codes", "scale_absmax" and "scale_offset"."""
        super().__init__(shape, block, 2, identity)
        self.bits = 4
        self.book = book
        self.register_buffer("codes", codes)
        self._scale_names = tuple(scales)
        for name, tensor in scales.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_weight(cls, weight_oi: Tensor, *, block: int, double: bool, book: Book, identity: str) -> CodeBookWeight:
        """Return the codes and scales of weight_oi (o, i), float32, contiguous: byte for byte those of bitsandbytes."""
        shape = (weight_oi.shape[0], weight_oi.shape[1])
        flat = weight_oi.view(-1)
        whole = flat.numel() // block * block
        scale = flat[:whole].view(-1, block).abs().amax(dim=1)
        scaled = (flat[:whole].view(-1, block) * (1.0 / scale.clamp(min=1e-38))[:, None]).view(-1)
        if whole < flat.numel():
            last = flat[whole:].abs().amax().clamp(min=1e-38)
            scale = torch.cat([scale, last[None]])
            scaled = torch.cat([scaled, flat[whole:] / last])
        if flat.numel() % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])
        codes = pack(book.nearest_code(scaled.clamp_(-1, 1)), 4)
        scales = {"scale": scale}
        if double:
            scale_codes, scale_absmax, scale_offset = dynamic8.encode(scale)
            scales = {"scale_codes": scale_codes, "scale_absmax": scale_absmax, "scale_offset": scale_offset}
        return cls(codes, scales, shape=shape, block=block, book=book, identity=identity)

    @classmethod
    def empty(cls, shape: tuple[int, int], *, block: int, double: bool, book: Book, identity: str) -> CodeBookWeight:
        """Return zeroed buffers of the right shapes, to load a state_dict into."""
        count = shape[0] * shape[1]
        blocks = -(-count // block)
        codes = torch.zeros(packed_nbytes(count, 4), dtype=torch.uint8)
        if double:
            scales = {
                "scale_codes": torch.zeros(blocks, dtype=torch.uint8),
                "scale_absmax": torch.zeros(-(-blocks // dynamic8.BLOCK), dtype=torch.float32),
                "scale_offset": torch.zeros((), dtype=torch.float32),
            }
        else:
            scales = {"scale": torch.zeros(blocks, dtype=torch.float32)}
        return cls(codes, scales, shape=shape, block=block, book=book, identity=identity)

    def block_scales(self, start: int, rows: int) -> Tensor:
        """Return the scales of the blocks of these rows, float32 (blocks,); zero where they are below DEAD_SCALE."""
        first, last = self._block_range(start, rows)
        tensors = [self.get_buffer(name) for name in self._scale_names]
        scale = tensors[0][first:last] if len(tensors) == 1 else dynamic8.decode(tensors, first, last)
        return scale.masked_fill(scale.abs() < DEAD_SCALE, 0.0)

    def dequantize(self, out: Tensor) -> Tensor:
        """Write the values into `out`, by bitsandbytes' kernel where it is installed: faster and bit-identical."""
        kernel = four_bit_kernel(self.book.name, self.book.levels, self.shape, self.block, out.dtype, self.codes)
        if kernel is None or not out.is_contiguous():
            return super().dequantize(out)
        self._check_shape(out)
        (o, i), block = self.shape, self.block
        scale = self.block_scales(0, o)
        step = max(1, KERNEL_CHUNK // i) if out.device.type == "cpu" else o
        for start in range(0, o, step):
            stop = min(start + step, o)
            codes = self.codes[start * i // 2 : stop * i // 2]
            out[start:stop].copy_(kernel(codes, scale[start * i // block : stop * i // block], (stop - start, i)))
        return out

    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        i = self.shape[1]
        table = value_table(self.book.levels, 4, self.codes)
        read(self.codes, 4, start * i, stop * i, table, out=rows.view(-1))
        self._by_block(Tensor.mul_, rows, self.block_scales(start, stop - start))

    def _to_levels(self, rows: Tensor, scale: Tensor) -> None:
        """Divide rows by their scale, as bitsandbytes does: by its reciprocal, except in the short last block."""
        flat = rows.view(-1)
        whole = flat.numel() // self.block
        flat[: whole * self.block].view(whole, self.block).mul_((1.0 / scale[:whole])[:, None])
        if whole < len(scale):
            flat[whole * self.block :].div_(scale[-1])

    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        scale = self.block_scales(start, len(rows))
        self._to_levels(rows, _never_zero(scale))
        if inside is not None:
            torch.le(rows.abs(), self.book.reach, out=inside)
            if not bool(scale.all()):
                self._by_block(Tensor.logical_and_, inside, scale != 0)
        rows.copy_(self.book.nearest_level(rows.clamp_(-1, 1)))
        self._by_block(Tensor.mul_, rows, scale)

    def _encode(self, rows: Tensor, start: int) -> Tensor:
        self._to_levels(rows, _never_zero(self.block_scales(start, len(rows))))
        return self.book.nearest_code(rows.clamp_(-1, 1))

    def zero_codes(self, start: int, stop: int) -> Tensor:
        return self.codes.new_full((1, 1), self.book.zero_code)

    def _with_codes(self, codes: Tensor) -> Self:
        flat = codes.reshape(-1)
        if flat.numel() % 2:
            flat = torch.cat([flat, flat.new_full((1,), self.book.zero_code)])
        scales = {name: self.get_buffer(name) for name in self._scale_names}
        return type(self)(
            pack(flat, 4), scales, shape=self.shape, block=self.block, book=self.book, identity=self.identity
        )


def _never_zero(scale: Tensor) -> Tensor:
    """Replace a scale of zero by infinity: a block with scale zero holds only zero."""
    return scale.masked_fill(scale == 0, torch.inf)
