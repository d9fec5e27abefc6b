"""A weight in the blocks of a GGUF file, as ggml stores them: codes and scales with their own bits.

A block of 32 or 256 weights of one row has bytes of codes and bytes of scales. They are kept apart, byte for byte, so
that `block_bytes` gives the file's bytes again. Every format is one formula, in float32, in this order:

    value = level[code] * scale + offset        scale and offset of a group of 16 or 32 weights

The products are exact in float32 (11 bits of a float16 number, at most 7 of a factor and 6 of a level). Only the sum is
rounded, and the values are those of the `dequantize` of the gguf package.

`snap_` finds the nearest level for fixed scales and offsets. `encode` leaves the code of a weight that has the value of
its own code already, also where several codes have that value, such as in a group whose scale is zero. A weight that
was not changed keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dovetail.chains.grid import QuantizedWeight
from dovetail.errors import LoadError
from dovetail.links.quantize.accelerate import by_loops
from dovetail.links.quantize.codebook import Book

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Plane:
    """Bytes of a block that hold the same bits of all its codes.

    Of `run` bytes, the lowest `bits` bits belong to `run` consecutive codes, the next ones to the next `run` codes.

    shift  the place of these bits in a code
    """

    nbytes: int
    bits: int
    run: int
    shift: int = 0

    @property
    def shifts(self) -> range:
        """The places of the codes in a byte."""
        return range(0, 8, self.bits)

    def unpack(self, plane: Tensor) -> Tensor:
        """Return these bits of the codes at their place, uint8 (blocks, weights), of bytes (blocks, nbytes)."""
        shifts = torch.tensor(list(self.shifts), dtype=torch.uint8, device=plane.device)[:, None]
        split = plane.view(len(plane), -1, 1, self.run) >> shifts
        return split.bitwise_and_(2**self.bits - 1).bitwise_left_shift_(self.shift).view(len(plane), -1)

    def pack(self, codes: Tensor) -> Tensor:
        """Return the bytes (blocks, nbytes) of these bits of codes, uint8 (blocks, weights)."""
        split = (codes >> self.shift).bitwise_and_(2**self.bits - 1).view(len(codes), -1, len(self.shifts), self.run)
        packed = split[:, :, 0].clone()
        for place, shift in enumerate(self.shifts):
            packed |= split[:, :, place] << shift
        return packed.view(len(codes), self.nbytes)


@dataclass(frozen=True)
class BlockFormat:
    """A format of ggml.

    name      as in llama.cpp, "Q4_K"
    number    of ggml's type
    block     weights in a block
    group     weights that share a scale
    planes    of the codes, in the order of their bytes
    places    where the codes' bytes lie in a block: [start, stop) of each piece
    nbytes    of a block
    scales    bytes of scales (blocks, scale_nbytes) -> scale and offset, float32 (blocks, groups); no offset: None
    lowest    level of code 0, where the levels are consecutive integers
    book      the levels, where they are not
    has_zero  whether zero is a value for every scale
    halves    where the float16 numbers lie among the bytes of scales; none for scales of another form
    """

    name: str
    number: int
    block: int
    group: int
    planes: tuple[Plane, ...]
    places: tuple[tuple[int, int], ...]
    nbytes: int
    scales: Callable[[Tensor], tuple[Tensor, Tensor | None]] = field(repr=False)
    lowest: int = 0
    book: Book | None = field(default=None, repr=False)
    has_zero: bool = True
    halves: tuple[int, ...] = (0,)

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return sum(plane.bits for plane in self.planes)

    @property
    def code_nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    @property
    def scale_places(self) -> tuple[tuple[int, int], ...]:
        """Where the scales' bytes lie in a block: between those of the codes."""
        ends = [0, *(end for place in self.places for end in place), self.nbytes]
        return tuple((a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b)

    def unpack(self, codes: Tensor) -> Tensor:
        """Return the codes, uint8 (blocks, block), of their bytes (blocks, code_nbytes)."""
        parts = codes.split([plane.nbytes for plane in self.planes], dim=1)
        found = self.planes[0].unpack(parts[0])
        for plane, part in zip(self.planes[1:], parts[1:], strict=True):
            found |= plane.unpack(part)
        return found

    def pack(self, codes: Tensor) -> Tensor:
        """Return the bytes (blocks, code_nbytes) of codes, uint8 (blocks, block)."""
        return torch.cat([plane.pack(codes) for plane in self.planes], dim=1)


class BlockWeight(QuantizedWeight):
    """`codes` (blocks, code bytes) and `scales` (blocks, scale bytes), uint8, of blocks in row-major order.

    `bits` is that of the packed codes of a pruned model: 8 for formats of 5 and 6 bits.
    """

    scales: Tensor

    def __init__(
        self, codes: Tensor, scales: Tensor, *, shape: tuple[int, int], form: BlockFormat, identity: str
    ) -> None:
        super().__init__(shape, form.group, form.block, identity)
        self.form = form
        self.bits = next(bits for bits in (2, 3, 4, 8) if bits >= form.bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def from_bytes(
        cls, where: str, blocks: Tensor, shape: tuple[int, int], form: BlockFormat, identity: str
    ) -> BlockWeight:
        """Return the weight of a file's bytes, which are copied.

        where   the tensor's name, for errors
        blocks  uint8 (blocks, form.nbytes)
        errors  LoadError for scales that are not finite, or that give values that are not
        """
        codes = torch.cat([blocks[:, a:b] for a, b in form.places], dim=1)
        scales = torch.cat([blocks[:, a:b] for a, b in form.scale_places], dim=1)
        found = cls(codes, scales, shape=shape, form=form, identity=identity)
        found.check_scales(where)
        return found

    @classmethod
    def empty(cls, shape: tuple[int, int], form: BlockFormat, identity: str) -> BlockWeight:
        """Return zeroed bytes of the right shapes, to load a state_dict into."""
        blocks = shape[0] * shape[1] // form.block
        codes = torch.zeros(blocks, form.code_nbytes, dtype=torch.uint8)
        scales = torch.zeros(blocks, form.nbytes - form.code_nbytes, dtype=torch.uint8)
        return cls(codes, scales, shape=shape, form=form, identity=identity)

    def block_bytes(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the bytes of these rows as a GGUF file has them, uint8 (rows, bytes of a row)."""
        o, form = self.shape[0], self.form
        blocks = self.codes.new_empty(*self.codes.shape[:-1], form.nbytes).view(o, -1, form.nbytes)[rows]
        for places, tensor in ((form.places, self.codes), (form.scale_places, self.scales)):
            parts = tensor.view(o, -1, tensor.shape[1])[rows].split([b - a for a, b in places], dim=-1)
            for (a, b), part in zip(places, parts, strict=True):
                blocks[..., a:b] = part
        return blocks.flatten(1)

    def rows(self, start: int, stop: int) -> Self:
        codes, scales = (self._blocks(tensor, start, stop - start) for tensor in (self.codes, self.scales))
        return type(self)(codes, scales, shape=(stop - start, self.shape[1]), form=self.form, identity=self.identity)

    def check_scales(self, where: str) -> None:
        """Raise LoadError for scales that are NaN or infinite, and for values beyond float32."""
        if self.form.halves:  # a finite float16 number times a factor and a level is far below float32's largest
            high = torch.stack([self.scales[:, at + 1] & 0x7C for at in self.form.halves])
            bad = (high == 0x7C).any(dim=0)
        else:
            scale, _ = self._grid(0, self.shape[0])
            bad = ~(scale * max(map(abs, self._ends()))).isfinite()
        if bool(bad.any()):
            raise LoadError(
                where,
                found=f"{int(bad.sum())} blocks of {self.form.name} whose scales are NaN, infinite or too large",
                rule="scales, and scales times codes, must be finite",
                fix="download or convert the file again",
            )

    def _ends(self) -> tuple[float, float]:
        """Return the lowest and the highest level."""
        form = self.form
        if form.book is not None:
            return form.book.ascending[0], form.book.ascending[-1]
        return float(form.lowest), float(form.lowest + 2**form.bits - 1)

    def _blocks(self, tensor: Tensor, start: int, rows: int) -> Tensor:
        in_row = self.shape[1] // self.form.block
        return tensor[start * in_row : (start + rows) * in_row]

    def _grid(self, start: int, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and offset of the groups of these rows, float32 (groups,)."""
        scale, offset = self.form.scales(self._blocks(self.scales, start, rows))
        return scale.reshape(-1), None if offset is None else offset.reshape(-1)

    def _unpacked(self, start: int, rows: int) -> Tensor:
        return self.form.unpack(self._blocks(self.codes, start, rows)).view(rows, self.shape[1])

    def codes_of(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        return self._unpacked(start, stop - start), self.zero_codes(start, stop)

    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        self._to_values(self._unpacked(start, stop - start), rows, *self._grid(start, stop - start))

    def _to_values(self, codes: Tensor, rows: Tensor, scale: Tensor, offset: Tensor | None) -> None:
        """Write the values of codes, uint8 (n, i), into `rows`, float32 (n, i)."""
        if (book := self.form.book) is not None:
            rows.copy_(torch.tensor(book.levels, device=rows.device)[codes.int()])
        else:
            rows.copy_(codes)
            if self.form.lowest:
                rows.add_(self.form.lowest)
        self._by_block(Tensor.mul_, rows, scale)
        if offset is not None:
            self._by_block(Tensor.add_, rows, offset)

    def _to_codes(self, rows: Tensor, scale: Tensor, offset: Tensor | None, inside: Tensor | None = None) -> Tensor:
        """Return the codes nearest to rows, which are overwritten; of a zero scale, that of the level nearest to 0."""
        if offset is not None:
            self._by_block(Tensor.sub_, rows, offset)
        self._by_block(Tensor.div_, rows, scale.masked_fill(scale == 0, torch.inf))
        if inside is not None:
            near, ends = rows, self._ends()
            if self.form.book is None:
                near = rows.round()
            else:
                levels = self.form.book.ascending
                ends = ends[0] - (levels[1] - levels[0]) / 2, ends[1] + (levels[-1] - levels[-2]) / 2
            torch.eq(near, near.clamp(*ends), out=inside)
            if not bool(scale.all()):
                self._by_block(Tensor.logical_and_, inside, scale != 0)
        if (book := self.form.book) is not None:
            return book.nearest_code(rows)
        return rows.round_().clamp_(*self._ends()).sub_(self.form.lowest).nan_to_num_(0).to(torch.uint8)

    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        scale, offset = self._grid(start, len(rows))
        if self.form.book is None and by_loops(self, rows):
            from dovetail.links.quantize import loops

            offset = torch.full_like(scale, -0.0) if offset is None else offset  # x + (-0) is x for every x
            passes = torch.empty(0, 0, dtype=torch.bool) if inside is None else inside.view(-1, self.block)
            arrays = [array.numpy() for array in (rows.view(-1, self.block), scale, offset, passes)]
            loops.over_blocks(loops.snap_uniform, arrays, *map(np.float32, self._ends()))
            return
        missing = rows.isnan() if not bool(rows.sum().isfinite()) else None
        codes = self._to_codes(rows, scale, offset, inside)
        self._to_values(codes, rows, scale, offset)
        if missing is not None:
            rows.masked_fill_(missing, torch.nan)

    def _encode(self, rows: Tensor, start: int) -> Tensor:
        return self._to_codes(rows, *self._grid(start, len(rows)))

    @torch.no_grad()
    def encode(self, weight_oi: Tensor) -> Self:
        """Return the same grid with the codes nearest to weight_oi (o, i); a code with that value already stays."""
        self._check_shape(weight_oi)
        found = []
        for start, stop in self._chunks(self.shape[0]):
            given, own = weight_oi[start:stop], self._unpacked(start, stop - start)
            rows = given.to(torch.float32, copy=True, memory_format=torch.contiguous_format).contiguous()
            values = torch.empty_like(rows)
            self._to_values(own, values, *self._grid(start, stop - start))
            found.append(torch.where(values.to(given.dtype) == given, own, self._encode(rows, start)))
        return self._with_codes(torch.cat(found))

    def zero_codes(self, start: int, stop: int) -> Tensor | None:
        if not self.form.has_zero:
            return None
        code = -self.form.lowest if self.form.book is None else self.form.book.zero_code
        return self.codes.new_full((1, 1), code)

    def _with_codes(self, codes: Tensor) -> Self:
        packed = self.form.pack(codes.reshape(-1, self.form.block))
        return type(self)(packed, self.scales, shape=self.shape, form=self.form, identity=self.identity)


def float16_at(scales: Tensor, at: int) -> Tensor:
    """Return the float16 numbers at a place of the bytes of scales (blocks, n), float32 (blocks, 1)."""
    return scales[:, at : at + 2].contiguous().view(torch.float16).float()
