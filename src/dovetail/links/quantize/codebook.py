"""The code-book grid: value = level[code] * scale, a few fixed levels, one scale a block in row-major order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.packing import CODES_PER_UNIT, pack, packed_nbytes, read, value_table
from dovetail.links.quantize import scales
from dovetail.links.quantize.accelerate import by_kernels, by_loops, four_bit_kernel
from dovetail.links.quantize.nearest import nearest

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Book:
    """2^bits levels, `levels[code]`, each the nearest float32; one of them is exactly 0.

    ieee  rounds as a float type does: a number between two levels to the even code, a negative one to negative zero,
          numbers divided by their scale. Otherwise as bitsandbytes: to the lower level, to the code of zero, numbers
          multiplied by the reciprocal of their scale
    """

    name: str
    levels: tuple[float, ...]
    ieee: bool = False

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The codes by ascending level; of two zeros, the lower code first, or negative zero."""
        return tuple(
            sorted(range(len(self.levels)), key=lambda code: (self.levels[code], -code if self.ieee else code))
        )

    @cached_property
    def ascending(self) -> tuple[float, ...]:
        return tuple(sorted(self.levels))

    @cached_property
    def span(self) -> float:
        """The power of two by which numbers are divided, exactly, so that all levels lie in [-1, 1]."""
        return 2.0 ** math.ceil(math.log2(self.ascending[-1]))

    @cached_property
    def middles(self) -> tuple[float, ...]:
        """The midpoints between neighbouring levels over `span`, computed in float32; up to each is the lower level."""
        with torch.device("cpu"):
            ascending = torch.tensor(self.ascending, dtype=torch.float32) / self.span
            middle = (ascending[:-1] + ascending[1:]) / 2
            if self.ieee:
                upwards = torch.tensor(self.order[1:]) % 2 == 0
                # Below zero by a normal number: a processor may take a subnormal one for zero.
                before = middle.nextafter(torch.tensor(-torch.inf))
                before = before.masked_fill(middle == 0, -torch.finfo(torch.float32).tiny)
                middle = torch.where(upwards, before, middle)
        return tuple(middle.tolist())

    @cached_property
    def by_code(self) -> np.ndarray:
        """The levels by code, float32."""
        return np.array(self.levels, np.float32)

    @cached_property
    def for_loops(self) -> tuple[np.ndarray, np.ndarray]:
        """The levels and the midpoints between them, ascending, float32."""
        return np.array(self.ascending, np.float32), np.array(self.middles, np.float32) * np.float32(self.span)

    def nearest_level(self, scaled: Tensor) -> Tensor:
        """Return the level nearest to each number of `scaled`, float32, which is overwritten."""
        return nearest(self._within(scaled), self.middles, self.ascending, torch.float32)

    def nearest_code(self, scaled: Tensor) -> Tensor:
        """Return the code of the level nearest to each number of `scaled`, uint8; `scaled` is overwritten."""
        return nearest(self._within(scaled), self.middles, self.order, torch.uint8)

    def _within(self, scaled: Tensor) -> Tensor:
        return (scaled if self.span == 1 else scaled.div_(self.span)).clamp_(-1, 1)

    @property
    def zero_code(self) -> int:
        return self.levels.index(0.0)

    @property
    def reach(self) -> float:
        """How far the straight-through gradient passes: half a step beyond the greatest level."""
        return self.ascending[-1] + (self.ascending[-1] - self.ascending[-2]) / 2


class CodeBookWeight(QuantizedWeight):
    """Codes of a book's levels, and a scale per block in one of the forms of `scales`."""

    def __init__(
        self, codes: Tensor, scale: dict[str, Tensor], *, shape: tuple[int, int], block: int, book: Book, identity: str
    ) -> None:
        """Take packed codes, and scales by name as `scales.encode` returns them."""
        super().__init__(shape, block, CODES_PER_UNIT[book.bits], identity)
        self.bits = book.bits
        self.book = book
        self.register_buffer("codes", codes)
        self._scale_names = tuple(scale)
        for name, tensor in scale.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_weight(cls, weight_oi: Tensor, *, block: int, double: bool, book: Book, identity: str) -> CodeBookWeight:
        """Return the codes and scales of weight_oi (o, i), float32, contiguous, each scale a block's largest number.

        Byte for byte those of bitsandbytes for a book of 4 bits.
        """
        shape = (weight_oi.shape[0], weight_oi.shape[1])
        flat = weight_oi.view(-1)
        whole = flat.numel() // block * block
        scale = flat[:whole].view(-1, block).abs().amax(dim=1)
        scaled = (flat[:whole].view(-1, block) * (1.0 / scale.clamp(min=1e-38))[:, None]).view(-1)
        if whole < flat.numel():
            last = flat[whole:].abs().amax().clamp(min=1e-38)
            scale = torch.cat([scale, last[None]])
            scaled = torch.cat([scaled, flat[whole:] / last])
        codes = pack(_whole_units(book.nearest_code(scaled), book), book.bits)
        stored = scales.encode(scale, "double" if double else "float32")
        return cls(codes, stored, shape=shape, block=block, book=book, identity=identity)

    @classmethod
    def from_scales(
        cls, weight_oi: Tensor, scale: dict[str, Tensor], *, block: int, book: Book, identity: str
    ) -> CodeBookWeight:
        """Return the grid of stored scales, by name, with the codes nearest to weight_oi (o, i), any float dtype."""
        shape = (weight_oi.shape[0], weight_oi.shape[1])
        codes = torch.zeros(packed_nbytes(shape[0] * shape[1], book.bits), dtype=torch.uint8, device=weight_oi.device)
        return cls(codes, scale, shape=shape, block=block, book=book, identity=identity).encode(weight_oi)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], *, block: int, scale: scales.ScaleForm, book: Book, identity: str
    ) -> CodeBookWeight:
        """Return zeroed buffers of the right shapes, to load a state_dict into."""
        count = shape[0] * shape[1]
        codes = torch.zeros(packed_nbytes(count, book.bits), dtype=torch.uint8)
        stored = scales.empty((-(-count // block),), scale)
        return cls(codes, stored, shape=shape, block=block, book=book, identity=identity)

    def block_scales(self, start: int, rows: int) -> Tensor:
        """Return the scales of the blocks of these rows, float32 (blocks,); zero where they are below DEAD_SCALE."""
        return scales.decode([self.get_buffer(name) for name in self._scale_names], *self._block_range(start, rows))

    def dequantize(self, out: Tensor) -> Tensor:
        """Write the values into `out`; on a GPU by a kernel where there is one, with the same bits."""
        if out.is_contiguous() and by_kernels(self, out):
            from dovetail.links.quantize import kernels

            self._check_shape(out)
            levels = _tables(self.book, out.device)[0]
            return kernels.decode(self.codes, self._plain_scales(), None, levels, out, bits=self.bits, block=self.block)
        kernel = four_bit_kernel(self.book.name, self.book.levels, self.shape, self.block, out.dtype, self.codes)
        if kernel is None or not out.is_contiguous():
            return super().dequantize(out)
        self._check_shape(out)
        return out.copy_(kernel(self.codes, self.block_scales(0, self.shape[0]), self.shape))

    def product(self, x_ti: Tensor) -> Tensor | None:
        """Return x Wᵀ (t, o), float32, straight from the codes, on a GPU where there are kernels; else None."""
        if not by_kernels(self, x_ti):
            return None
        from dovetail.links.quantize import kernels

        o, i = self.shape
        if not kernels.multiplies(i, self.bits, self.block):
            return None
        levels, scale = _tables(self.book, x_ti.device)[0], self._plain_scales()
        return kernels.multiply(self.codes, scale, None, levels, x_ti, o, bits=self.bits, block=self.block)

    def _plain_scales(self) -> Tensor:
        blocks = -(-self.shape[0] * self.shape[1] // self.block)
        return scales.plain([self.get_buffer(name) for name in self._scale_names], blocks)

    def moved(self, factor_b: Tensor | None = None, offset_b: Tensor | None = None) -> Self:
        assert offset_b is None
        assert factor_b is not None
        (name,) = self._scale_names
        scale = self.get_buffer(name)
        moved = {name: (scale.float() * factor_b.view_as(scale)).to(scale.dtype)}
        return type(self)(self.codes, moved, shape=self.shape, block=self.block, book=self.book, identity=self.identity)

    def rows(self, start: int, stop: int) -> Self:
        first, last = self._block_range(start, stop - start)
        name, *others = self._scale_names
        scale = {name: self.get_buffer(name).view(-1)[first:last]}
        if others:
            scale = {"scale": self.block_scales(start, stop - start)}
        codes = pack(_whole_units(self.codes_of(start, stop)[0].reshape(-1), self.book), self.bits)
        shape, said = (stop - start, self.shape[1]), self.identity
        return type(self)(codes, scale, shape=shape, block=self.block, book=self.book, identity=said)

    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        i = self.shape[1]
        if by_loops(self, rows) and self.bits in (2, 4, 8) and self.block * self.bits % 8 == 0:
            from dovetail.links.quantize import loops

            scale = self.block_scales(start, stop - start)
            codes = self.codes[start * i * self.bits // 8 : stop * i * self.bits // 8].view(len(scale), -1)
            arrays = [array.numpy() for array in (rows.view(-1, self.block), scale, codes)]
            loops.over_blocks(loops.decode_levels, arrays, self.bits, self.book.by_code)
            return
        table = value_table(self.book.levels, self.bits, self.codes)
        read(self.codes, self.bits, start * i, stop * i, table, out=rows.view(-1))
        self._by_block(Tensor.mul_, rows, self.block_scales(start, stop - start))

    def _to_levels(self, rows: Tensor, scale: Tensor) -> None:
        """Divide rows by their scale; as bitsandbytes, by its reciprocal, except in the short last block."""
        if self.book.ieee:
            self._by_block(Tensor.div_, rows, scale)
            return
        flat = rows.view(-1)
        whole = flat.numel() // self.block
        flat[: whole * self.block].view(whole, self.block).mul_((1.0 / scale[:whole])[:, None])
        if whole < len(scale):
            flat[whole * self.block :].div_(scale[-1])

    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        if by_kernels(self, rows):
            from dovetail.links.quantize import kernels

            _, levels, middles = _tables(self.book, rows.device)
            kernels.snap_levels(
                rows,
                self._plain_scales(),
                inside,
                levels,
                middles,
                first=self._block_range(start, len(rows))[0],
                block=self.block,
                reach=self.book.reach,
                divides=self.book.ieee,
            )
            return
        scale = self.block_scales(start, len(rows))
        if by_loops(self, rows) and self.bits <= 4:
            from dovetail.links.quantize import loops

            inside = torch.empty(0, 0, dtype=torch.bool) if inside is None else inside.view(-1, self.block)
            arrays = [array.numpy() for array in (rows.view(-1, self.block), scale, inside)]
            reach = np.float32(self.book.reach)
            loops.over_blocks(loops.snap_levels, arrays, *self.book.for_loops, reach, self.book.ieee)
            return
        self._to_levels(rows, _never_zero(scale))
        if inside is not None:
            torch.le(rows.abs(), self.book.reach, out=inside)
            if not bool(scale.all()):
                self._by_block(Tensor.logical_and_, inside, scale != 0)
        rows.copy_(self.book.nearest_level(rows))
        self._by_block(Tensor.mul_, rows, scale)

    def _encode(self, rows: Tensor, start: int) -> Tensor:
        self._to_levels(rows, _never_zero(self.block_scales(start, len(rows))))
        return self.book.nearest_code(rows)

    def zero_codes(self, start: int, stop: int) -> Tensor:
        return self.codes.new_full((1, 1), self.book.zero_code)

    def _with_codes(self, codes: Tensor) -> Self:
        packed = pack(_whole_units(codes.reshape(-1), self.book), self.bits)
        scale = {name: self.get_buffer(name) for name in self._scale_names}
        return type(self)(packed, scale, shape=self.shape, block=self.block, book=self.book, identity=self.identity)


@lru_cache(maxsize=64)
def _tables(book: Book, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the levels by code, the levels ascending and the midpoints between them, float32, on a device."""
    with torch.inference_mode(False):
        ascending, middles = (torch.from_numpy(each).to(device) for each in book.for_loops)
        return torch.from_numpy(book.by_code).to(device), ascending, middles


def _whole_units(codes: Tensor, book: Book) -> Tensor:
    """Fill up codes (n,) with that of zero, as bitsandbytes does, to a multiple of those that are packed at once."""
    tail = -codes.numel() % CODES_PER_UNIT[book.bits]
    return torch.cat([codes, codes.new_full((tail,), book.zero_code)]) if tail else codes


def _never_zero(scale: Tensor) -> Tensor:
    """Replace a scale of zero by infinity: a block with scale zero holds only zero."""
    return scale.masked_fill(scale == 0, torch.inf)
