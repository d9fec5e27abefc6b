"""The affine grid: value = (code - zero point) * scale, one scale and zero point a group of inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dovetail.quantize.packing import CODES_PER_UNIT, pack, packed_nbytes, read, unpack, value_table
from dovetail.quantize.storage import QuantizedWeight

if TYPE_CHECKING:
    from typing_extensions import Self


class AffineWeight(QuantizedWeight):
    """Codes of `bits` bits; `scale_og` (o, groups) float16; zero points packed like the codes, or none if symmetric.

    Symmetric codes lie in [-2^(bits-1), 2^(bits-1) - 1] and are stored with 2^(bits-1) added. Zero is exact in both.
    """

    scale_og: Tensor
    zero_og: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale_og: Tensor,
        zero_og: Tensor | None,
        *,
        shape: tuple[int, int],
        bits: int,
        identity: str,
    ) -> None:
        """Packed codes and packed zero points (`packing.pack`)."""
        super().__init__(shape, shape[1] // scale_og.shape[1], CODES_PER_UNIT[bits], identity)
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("scale_og", scale_og)
        self.register_buffer("zero_og", zero_og)

    @classmethod
    def from_scales(
        cls, weight_oi: Tensor, scale_og: Tensor, zero_og: Tensor | None, *, bits: int, identity: str
    ) -> AffineWeight:
        """The grid of given scales, with the codes nearest to weight_oi.

        weight_oi  (o, i) any float dtype
        scale_og   (o, groups) float16, not negative
        zero_og    (o, groups) integers in [0, 2^bits - 1], any dtype; None for a symmetric grid
        """
        packed_zero = None if zero_og is None else pack(zero_og.to(torch.uint8), bits)
        shape = (weight_oi.shape[0], weight_oi.shape[1])
        grid = cls.empty(shape, groups=scale_og.shape[1], bits=bits, symmetric=zero_og is None, identity=identity)
        grid.scale_og, grid.zero_og = scale_og.to(torch.float16), packed_zero
        return grid.encode(weight_oi)

    @classmethod
    def empty(cls, shape: tuple[int, int], *, groups: int, bits: int, symmetric: bool, identity: str) -> AffineWeight:
        """Zero buffers of the right shapes, to load a state_dict into."""
        o, i = shape
        codes = torch.zeros(packed_nbytes(o * i, bits), dtype=torch.uint8)
        scale_og = torch.zeros(o, groups, dtype=torch.float16)
        zero_og = None if symmetric else torch.zeros(packed_nbytes(o * groups, bits), dtype=torch.uint8)
        return cls(codes, scale_og, zero_og, shape=shape, bits=bits, identity=identity)

    def _grid(self, start: int, rows: int) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of the blocks of these rows, float32 (blocks,)."""
        first, last = self._block_range(start, rows)
        scale = self.scale_og.view(-1)[first:last].float()
        if self.zero_og is None:
            return scale, None
        levels = tuple(float(code) for code in range(2**self.bits))
        return scale, read(self.zero_og, self.bits, first, last, value_table(levels, self.bits, self.zero_og))

    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        i = self.shape[1]
        scale, zero = self._grid(start, stop - start)
        offset = 2 ** (self.bits - 1) if zero is None else 0
        if self.bits == 8:
            rows.copy_(self.codes[start * i : stop * i].view(-1, i)).sub_(offset)
        else:
            levels = tuple(float(code - offset) for code in range(2**self.bits))
            table = value_table(levels, self.bits, self.codes)
            read(self.codes, self.bits, start * i, stop * i, table, out=rows.view(-1))
        if zero is not None:
            self._by_block(Tensor.sub_, rows, zero)
        self._by_block(Tensor.mul_, rows, scale)

    def _to_steps(self, rows: Tensor, scale: Tensor) -> None:
        """Rows in steps from zero; a block whose scale is zero holds only zero."""
        self._by_block(Tensor.div_, rows, scale.masked_fill(scale == 0, torch.inf))

    def _to_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None, inside: Tensor | None = None) -> None:
        """Rows replaced by their codes, minus 2^(bits-1) if symmetric; the zero code is +0."""
        self._to_steps(rows, scale)
        rows.round_()
        if zero is None:
            lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        else:
            self._by_block(Tensor.add_, rows, zero)
            lowest, highest = 0, 2**self.bits - 1
        if inside is not None:
            torch.eq(rows, rows.clamp(lowest, highest), out=inside)
            if not bool(scale.all()):
                self._by_block(Tensor.logical_and_, inside, scale != 0)
        rows.clamp_(lowest, highest)
        if zero is None:
            rows.add_(0.0)

    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        scale, zero = self._grid(start, len(rows))
        self._to_codes(rows, scale, zero, inside)
        if zero is not None:
            self._by_block(Tensor.sub_, rows, zero)
        self._by_block(Tensor.mul_, rows, scale)

    def _encode(self, rows: Tensor, start: int) -> Tensor:
        scale, zero = self._grid(start, len(rows))
        self._to_codes(rows, scale, zero)
        if zero is None:
            rows.add_(2 ** (self.bits - 1))
        return rows.to(torch.uint8)

    def _inside(self, rows: Tensor, start: int, inside: Tensor) -> None:
        scale, zero = self._grid(start, len(rows))
        self._by_block(Tensor.div_, rows, scale)  # infinite or NaN, so not inside, where the scale is zero
        rows.round_()
        lowest = -(2 ** (self.bits - 1)) if zero is None else 0
        if zero is not None:
            self._by_block(Tensor.add_, rows, zero)
        half_range = (2**self.bits - 1) / 2
        torch.le(rows.sub_(lowest + half_range).abs_(), half_range, out=inside)

    def _zero_codes(self, start: int, stop: int) -> Tensor:
        if self.zero_og is None:
            return self.codes.new_full((1, 1), 2 ** (self.bits - 1))
        groups = self.scale_og.shape[1]
        zero = unpack(self.zero_og, self.bits, start * groups, stop * groups)
        return zero[:, None].expand(-1, self.block).reshape(stop - start, self.shape[1])

    def _with_codes(self, codes: Tensor) -> Self:
        packed = pack(codes, self.bits)
        return type(self)(packed, self.scale_og, self.zero_og, shape=self.shape, bits=self.bits, identity=self.identity)
