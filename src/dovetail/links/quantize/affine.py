"""The affine grid: value = (code - zero point) * scale, one scale and zero point a group of inputs.

The weight on it, and what its quantizers share (`ranges` computes their scales). A zero point is an integer, or a
float16 number: then zero is not on the grid, in general, and the grid counts as one without a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import Quantizer, Site, always_print, identity_of
from dovetail.chains.packing import CODES_PER_UNIT, pack, packed_nbytes, read, unpack, value_table
from dovetail.errors import ChainError
from dovetail.links.quantize import scales
from dovetail.links.quantize.accelerate import by_kernels, by_loops
from dovetail.links.quantize.ranges import SCALE_BITS, Scales, Symmetry, affine_range

if TYPE_CHECKING:
    from typing_extensions import Self


AffineScaleForm = Literal["float16", "float32", "e8m0", "double"]


class AffineWeight(QuantizedWeight):
    """Codes of `bits` bits; `scale_og` (o, groups), or scales in 8 bits (`scales`); `zero_og` zero points, or None.

    Symmetric codes, without zero points, lie in [-2^(bits-1), 2^(bits-1) - 1] and are stored with 2^(bits-1) added.
    Zero is exact there and with integer zero points, which are packed like the codes. Zero points of dtype float16,
    (o, groups), give a grid without a zero. They are stored as distances from 2^(bits-1), where float16 is finest.
    """

    scale_og: Tensor
    zero_og: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: dict[str, Tensor],
        zero_og: Tensor | None,
        *,
        shape: tuple[int, int],
        block: int,
        bits: int,
        identity: str,
    ) -> None:
        """Take packed codes, scales by name as `scales.encode` returns them, and zero points as they are stored."""
        super().__init__(shape, block, CODES_PER_UNIT[bits], identity)
        self.bits = bits
        self.register_buffer("codes", codes)
        self._scale_names = tuple(scale)
        for name, tensor in scale.items():
            self.register_buffer(name, tensor)
        self.register_buffer("zero_og", zero_og)

    @classmethod
    def from_scales(
        cls,
        weight_oi: Tensor,
        scale_og: Tensor,
        zero_og: Tensor | None,
        *,
        bits: int,
        identity: str,
        scale: AffineScaleForm = "float16",
        zero: Literal["integer", "float16"] = "integer",
    ) -> AffineWeight:
        """Return the grid of given scales, with the codes nearest to weight_oi.

        weight_oi  (o, i) any float dtype
        scale_og   (o, groups) any float dtype; negative ones only without zero points
        zero_og    (o, groups) integers in [0, 2^bits - 1], any dtype, or any numbers that float16 can hold; None for a
                   symmetric grid
        scale      how the scales are stored, to which they are rounded first (`dovetail.links.quantize.scales`)
        zero       how the zero points are stored
        """
        (o, i), groups = weight_oi.shape, scale_og.shape[1]
        stored_zero = zero_og
        if zero_og is not None:
            stored_zero = to_float16(zero_og, bits) if zero == "float16" else pack(zero_og.to(torch.uint8), bits)
        codes = torch.zeros(packed_nbytes(o * i, bits), dtype=torch.uint8, device=scale_og.device)
        stored = scales.encode(scale_og, scale, "scale_og")
        grid = cls(codes, stored, stored_zero, shape=(o, i), block=i // groups, bits=bits, identity=identity)
        return grid.encode(weight_oi)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        *,
        groups: int,
        bits: int,
        symmetric: bool,
        identity: str,
        scale: AffineScaleForm = "float16",
        zero: Literal["integer", "float16"] = "integer",
    ) -> AffineWeight:
        """Return zeroed buffers of the right shapes, to load a state_dict into; arguments as for `from_scales`."""
        o, i = shape
        codes = torch.zeros(packed_nbytes(o * i, bits), dtype=torch.uint8)
        zero_og = torch.zeros(o, groups, dtype=torch.float16)
        if zero == "integer":
            zero_og = torch.zeros(packed_nbytes(o * groups, bits), dtype=torch.uint8)
        stored = scales.empty((o, groups), scale, "scale_og")
        stored_zero = None if symmetric else zero_og
        return cls(codes, stored, stored_zero, shape=shape, block=i // groups, bits=bits, identity=identity)

    def block_scales(self) -> Tensor:
        """Return the scales of all groups, float32 (blocks,), in row-major order."""
        return self._grid(0, self.shape[0])[0]

    def zero_points(self) -> Tensor:
        """Return the integer zero points of all groups, uint8 (o, groups); 2^(bits-1) of a symmetric grid."""
        o, groups = self.shape[0], self.shape[1] // self.block
        if self.zero_og is None:
            return self.codes.new_full((o, groups), 2 ** (self.bits - 1))
        assert not self._zero_is_float
        return unpack(self.zero_og, self.bits, 0, o * groups).view(o, groups)

    def _grid(self, start: int, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zero points of the blocks of these rows, float32 (blocks,)."""
        first, last = self._block_range(start, rows)
        scale = scales.decode([self.get_buffer(name) for name in self._scale_names], first, last)
        if self.zero_og is None:
            return scale, None
        if self.zero_og.is_floating_point():
            return scale, from_float16(self.zero_og.view(-1)[first:last], self.bits)
        levels = tuple(float(code) for code in range(2**self.bits))
        return scale, read(self.zero_og, self.bits, first, last, value_table(levels, self.bits, self.zero_og))

    def dequantize(self, out: Tensor) -> Tensor:
        if not (out.is_contiguous() and by_kernels(self, out)):
            return super().dequantize(out)
        from dovetail.links.quantize import kernels

        self._check_shape(out)
        return kernels.decode(*self._for_kernels(), None, out, bits=self.bits, block=self.block)

    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        i = self.shape[1]
        scale, zero = self._grid(start, stop - start)
        offset = 2 ** (self.bits - 1) if zero is None else 0
        if by_loops(self, rows) and self.bits in (2, 4, 8) and self.block * self.bits % 8 == 0:
            from dovetail.links.quantize import loops

            zero = torch.full_like(scale, offset) if zero is None else zero
            codes = self.codes[start * i * self.bits // 8 : stop * i * self.bits // 8]
            packed = codes.view(torch.uint8).view(len(scale), -1)
            arrays = [rows.view(-1, self.block), scale, zero, packed]
            loops.over_blocks(loops.decode_affine, [array.numpy() for array in arrays], self.bits)
            return
        if self.bits == 8:
            rows.copy_(self.codes[start * i : stop * i].view(-1, i)).sub_(offset)
        else:
            levels = tuple(float(code - offset) for code in range(2**self.bits))
            table = value_table(levels, self.bits, self.codes)
            read(self.codes, self.bits, start * i, stop * i, table, out=rows.view(-1))
        self._to_values(rows, scale, zero)

    def product(self, x_ti: Tensor) -> Tensor | None:
        if by_kernels(self, x_ti):
            return self._product_by_kernel(x_ti)
        if not (by_loops(self, self.codes) and self.bits in (2, 4, 8) and self.block * self.bits % 8 == 0):
            return None
        from dovetail.links.quantize import loops

        o, groups = self.shape[0], self.shape[1] // self.block
        scale, zero = self._grid(0, o)
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if zero is None else zero
        y_ot = x_ti.new_empty(o, len(x_ti), dtype=torch.float32)
        arrays = [self.codes.view(torch.uint8).view(o, -1), scale.view(o, groups), zero.view(o, groups), y_ot]
        sums = x_ti.float().view(len(x_ti), groups, -1).sum(2).numpy()
        x = loops.by_place(x_ti, self.bits)
        loops.over_blocks(loops.multiply_affine, [array.numpy() for array in arrays], x, sums, self.bits)
        return y_ot.t()

    def _product_by_kernel(self, x_ti: Tensor) -> Tensor | None:
        from dovetail.links.quantize import kernels

        o, i = self.shape
        if not kernels.multiplies(i, self.bits, self.block):
            return None
        return kernels.multiply(*self._for_kernels(), None, x_ti, o, bits=self.bits, block=self.block)

    def _for_kernels(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return packed codes, scales and zero points as kernels on GPUs read them."""
        blocks = self.shape[0] * self.shape[1] // self.block
        scale = scales.plain([self.get_buffer(name) for name in self._scale_names], blocks)
        return self.codes.view(torch.uint8), scale, None if self.zero_og is None else self.zero_og.view(-1)

    def _to_values(self, rows: Tensor, scale: Tensor, zero: Tensor | None) -> None:
        """Replace codes, minus 2^(bits-1) if symmetric, by their values; zero is +0 for every scale."""
        if zero is not None:
            self._by_block(Tensor.sub_, rows, zero)
        self._by_block(Tensor.mul_, rows, scale)
        if bool((scale <= 0).any()):
            rows.add_(0.0)

    def _to_codes(self, rows: Tensor, scale: Tensor, zero: Tensor | None, inside: Tensor | None = None) -> None:
        """Replace rows by their codes, minus 2^(bits-1) if symmetric; the zero code is +0."""
        self._by_block(Tensor.div_, rows, scale.masked_fill(scale == 0, torch.inf))
        if zero is None:
            rows.round_()
            lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        else:
            lowest, highest = 0, 2**self.bits - 1
            if self._zero_is_float:
                self._by_block(Tensor.add_, rows, zero)
                rows.round_()
            else:
                rows.round_()
                self._by_block(Tensor.add_, rows, zero)
        if inside is not None:
            torch.eq(rows, rows.clamp(lowest, highest), out=inside)
            if not bool(scale.all()):
                self._by_block(Tensor.logical_and_, inside, scale != 0)
        rows.clamp_(lowest, highest)
        if zero is None or self._zero_is_float:
            rows.add_(0.0)

    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        if by_kernels(self, rows):
            from dovetail.links.quantize import kernels

            (_, scale, zero), (first, _) = self._for_kernels(), self._block_range(start, len(rows))
            kernels.snap_affine(rows, scale, zero, inside, first=first, bits=self.bits, block=self.block)
            return
        scale, zero = self._grid(start, len(rows))
        if by_loops(self, rows) and not self._zero_is_float:
            from dovetail.links.quantize import loops

            lowest = -(2 ** (self.bits - 1)) if zero is None else 0
            zero = torch.zeros_like(scale) if zero is None else zero
            inside = torch.empty(0, 0, dtype=torch.bool) if inside is None else inside.view(-1, self.block)
            arrays = [array.numpy() for array in (rows.view(-1, self.block), scale, zero, inside)]
            range_ = np.float32(lowest), np.float32(lowest + 2**self.bits - 1)
            loops.over_blocks(loops.snap_affine, arrays, *range_)
            return
        self._to_codes(rows, scale, zero, inside)
        self._to_values(rows, scale, zero)

    def _encode(self, rows: Tensor, start: int) -> Tensor:
        scale, zero = self._grid(start, len(rows))
        self._to_codes(rows, scale, zero)
        if zero is None:
            rows.add_(2 ** (self.bits - 1))
        return rows.to(torch.uint8)

    @property
    def _zero_is_float(self) -> bool:
        return self.zero_og is not None and self.zero_og.is_floating_point()

    def zero_codes(self, start: int, stop: int) -> Tensor | None:
        if self.zero_og is None:
            return self.codes.new_full((1, 1), 2 ** (self.bits - 1))
        if self._zero_is_float:
            return None
        groups = self.shape[1] // self.block
        zero = unpack(self.zero_og, self.bits, start * groups, stop * groups)
        return zero[:, None].expand(-1, self.block).reshape(stop - start, self.shape[1])

    def moved(self, factor_b: Tensor | None = None, offset_b: Tensor | None = None) -> Self:
        scale = {name: self.get_buffer(name) for name in self._scale_names}
        zero_og = self.zero_og
        if factor_b is not None:
            (name,) = self._scale_names
            scale[name] = (scale[name].float() * factor_b.view_as(scale[name])).to(scale[name].dtype)
        if offset_b is not None:
            assert zero_og is not None
            assert zero_og.is_floating_point()
            step, zero = self._grid(0, self.shape[0])
            assert zero is not None
            shift = offset_b.reshape(-1).float() / step.masked_fill(step == 0, torch.inf)
            zero_og = to_float16(zero - shift, self.bits).view_as(zero_og)
        return self._like(self.codes, scale, zero_og)

    def rows(self, start: int, stop: int) -> Self:
        groups = self.shape[1] // self.block
        scale, zero_og = {"scale_og": self._grid(start, stop - start)[0].view(-1, groups)}, self.zero_og
        if zero_og is not None:
            zero_og = zero_og[start:stop] if self._zero_is_float else pack(self.zero_points()[start:stop], self.bits)
        codes = pack(self.codes_of(start, stop)[0], self.bits)
        shape, said = (stop - start, self.shape[1]), self.identity
        return type(self)(codes, scale, zero_og, shape=shape, block=self.block, bits=self.bits, identity=said)

    def _with_codes(self, codes: Tensor) -> Self:
        scale = {name: self.get_buffer(name) for name in self._scale_names}
        return self._like(pack(codes, self.bits), scale, self.zero_og)

    def _like(self, codes: Tensor, scale: dict[str, Tensor], zero_og: Tensor | None) -> Self:
        return type(self)(
            codes,
            scale,
            zero_og,
            shape=self.shape,
            block=self.block,
            bits=self.bits,
            identity=self.identity,
        )


def to_float16(zero: Tensor, bits: int) -> Tensor:
    """Return zero points, any float, as a grid stores them: distances from the middle code in float16."""
    return (zero - 2 ** (bits - 1)).to(torch.float16)


def from_float16(stored: Tensor, bits: int) -> Tensor:
    """Return the zero points that `to_float16` stored, float32."""
    return stored.float() + 2 ** (bits - 1)


@dataclass(frozen=True)
class GroupQuantizer(Quantizer):
    """Codes of a few bits; `group` inputs share a scale (0: one group a row)."""

    widths: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    """The bits that a code can have."""

    bits: int = always_print(4)
    group: int = always_print(64)

    @property
    def movable(self) -> frozenset[Literal["scales", "zeros"]]:
        return frozenset({"scales"})

    def __post_init__(self) -> None:
        if self.bits not in self.widths:
            *others, last = self.widths
            rule = f"bits must be {', '.join(map(str, others))} or {last}"
            raise self._bad(f"bits={self.bits}", rule, "set bits=4")
        if self.group < 0:
            fix = "set group=64, or group=0 for one group per row"
            raise self._bad(f"group={self.group}", "group must be at least 0", fix)

    def check(self, site: Site) -> None:
        """Raise ChainError where group does not divide the layer's inputs."""
        self._groups(site.in_features, f"{self.name} at {site.name}")

    def _groups(self, in_features: int, where: str) -> int:
        if self.group == 0:
            return 1
        if in_features % self.group:
            divisors = (g for g in range(1, in_features + 1) if in_features % g == 0)
            nearest = min(divisors, key=lambda g: abs(g - self.group))
            raise ChainError(
                where,
                found=f"in_features={in_features}, group={self.group}",
                rule="group must divide in_features",
                fix=f"use group={nearest}, or group=0 for one group per row",
            )
        return in_features // self.group


@dataclass(frozen=True)
class AffineQuantizer(GroupQuantizer):
    """Integers of 2, 3, 4 or 8 bits; `group` inputs share a float16 scale (0: one group a row).

    symmetric  false: with zero points; true: without, scale = max|w| over half the steps; signed: without, scale = the
               weight of the largest absolute value over -2^(bits-1), which may be negative
    """

    symmetric: Symmetry = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric not in (True, False, "signed"):
            rule = "symmetric must be true, false or signed"
            raise self._bad(f"symmetric={self.symmetric}", rule, "set symmetric=signed")

    def _check_scales(self, scale_bits: int | None, scales: Scales) -> None:
        """Raise ChainError for scales that `_ranges` does not compute."""
        if scale_bits is not None and scale_bits not in SCALE_BITS:
            raise self._bad(f"scale_bits={scale_bits}", "scale_bits must be 4, 7 or none", "set scale_bits=4")
        if scales not in ("range", "search"):
            raise self._bad(f"scales={scales}", "scales must be range or search", "set scales=range")

    def empty(self, shape: tuple[int, int]) -> AffineWeight:
        groups, identity = self._groups(shape[1], self.name), identity_of(self)
        symmetric = bool(self.symmetric)
        return AffineWeight.empty(shape, groups=groups, bits=self.bits, symmetric=symmetric, identity=identity)

    def _ranges(self, weight_oi: Tensor, scale_bits: int | None, scales: Scales) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zero points of the groups of weight_oi (o, i) float32, as `affine_range` does."""
        return affine_range(
            weight_oi,
            self._groups(weight_oi.shape[1], self.name),
            bits=self.bits,
            symmetric=self.symmetric,
            where=self.name,
            scale_bits=scale_bits,
            search=scales == "search",
        )
