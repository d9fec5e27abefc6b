"""The contract of a weight on a grid: packed codes and scales.

`dequantize` gives the values, `snap_` rounds other weights to the same grid, `encode` gives their codes, `inside` says
where the grid's range does not clip. They agree to the bit: `snap_` gives what `dequantize` gives for `encode`'s codes.

A grid may lack a zero (`zero_codes` is None). It is stored, packed and snapped to like any other, but no weight on it
can be pruned (`chains/check.py`).

A grid cuts the weight, in row-major order, into blocks of equal length that share a scale (the last one may be short).
Work goes by chunks of rows that fit the processor's cache. Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dovetail.chains.packing import unpack
from dovetail.errors import DovetailError

if TYPE_CHECKING:
    from typing_extensions import Self

CPU_CHUNK = 2**18
"""Weights in a chunk for one thread: 1 MiB of float32, a second-level cache. A chunk is made for at least four threads:
smaller ones cost more in calls than a nearer cache saves."""
DEVICE_CHUNK = 2**24
"""Weights in a chunk elsewhere: enough to keep an accelerator busy, small against the model."""


WORKING_NBYTES = 16
"""Bytes per weight of a chunk that `dequantize` and `snap_` hold at most while they work, on any grid."""


def has_values(tensor: Tensor) -> bool:
    """Return whether there is something to compute: not on the fake and meta tensors of a dry run."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def row_slices(start: int, stop: int, step: int, like: Tensor) -> list[slice]:
    """Cut rows [start, stop) into chunks of `step` rows, to work on one after the other.

    On tensors without values, the first chunk stands for all: each chunk is freed before the next one, so that the
    first one needs as much memory as all of them.
    """
    if not has_values(like):
        stop = min(start + step, stop)
    return [slice(row, min(row + step, stop)) for row in range(start, stop, step)]


class QuantizedWeight(nn.Module, ABC):
    """A weight (o, i) on its grid: packed codes plus scales as persistent buffers, which is exactly what is stored."""

    codes: Tensor
    bits: int
    """Of one code as it is packed (`packing.pack`)."""

    def __init__(self, shape: tuple[int, int], block: int, codes_per_unit: int, identity: str) -> None:
        """Shape (o, i); `block` weights share a scale; chunks must hold whole units of packed codes."""
        super().__init__()
        self.shape = (int(shape[0]), int(shape[1]))
        self.block = block
        self.identity = identity
        self._alignment = math.lcm(block, codes_per_unit)

    @abstractmethod
    def _decode(self, start: int, stop: int, rows: Tensor) -> None:
        """Write the values of weight rows [start, stop) into `rows`, contiguous float32, a fresh tensor's start."""

    @abstractmethod
    def _snap(self, rows: Tensor, start: int, inside: Tensor | None = None) -> None:
        """Replace `rows`, contiguous float32, by the nearest grid values.

        inside  bool, filled with whether each number was not clipped; where the block's scale is zero, with False
        """

    @abstractmethod
    def _encode(self, rows: Tensor, start: int) -> Tensor:
        """Return the codes of the grid values nearest to `rows`, contiguous float32; may overwrite `rows`."""

    @abstractmethod
    def _with_codes(self, codes: Tensor) -> Self:
        """Return the same grid, sharing its tensors, with other codes (o, i), not packed."""

    @abstractmethod
    def zero_codes(self, start: int, stop: int) -> Tensor | None:
        """Return the code of zero in weight rows [start, stop): uint8 (stop - start, i), or (1, 1) if one code.

        None where the grid has blocks without a code of exact zero; then for any rows.
        """

    def dequantize(self, out: Tensor) -> Tensor:
        """Write the values into `out` and return it.

        out  (o, i) any float dtype, any strides; value = code * scale in float32, rounded once to out's dtype
        """
        self._check_shape(out)
        if not out.is_contiguous() and out.t().is_contiguous():
            # Transposing at once, within one dtype, is several times faster than strided writes by chunks.
            out.t().copy_(self.dequantize(torch.empty(self.shape, dtype=out.dtype, device=out.device)).t())
            return out
        if not has_values(out):
            self._rehearse(out)
            return out
        aligned = out.storage_offset() % 4 == 0 and self.shape[1] % 4 == 0  # every row as a fresh tensor is
        if out.dtype == torch.float32 and out.is_contiguous() and aligned:
            for start, stop in self._chunks(self.shape[0]):
                self._decode(start, stop, out[start:stop])
            return out
        scratch = torch.empty(self.rows_per_chunk, self.shape[1], dtype=torch.float32, device=out.device)
        for start, stop in self._chunks(self.shape[0]):
            values = scratch[: stop - start]
            self._decode(start, stop, values)
            out[start:stop].copy_(values)
        return out

    def product(self, x_ti: Tensor) -> Tensor | None:
        """Return x Wᵀ (t, o), float32, straight from the codes: they are read, and no weight is made.

        x_ti  (t, i) any float dtype, of few vectors; sums are taken in float32 in an order of its own
        None where the grid has no such product, or is too small for one
        """
        return None

    @property
    def rows_per_chunk(self) -> int:
        """Rows in a cache-sized chunk that starts and ends with whole blocks; all rows where blocks straddle many."""
        o, i = self.shape
        step = self._alignment // math.gcd(self._alignment, i)
        threads = max(4, torch.get_num_threads())
        size = CPU_CHUNK * threads if self.codes.device.type == "cpu" else DEVICE_CHUNK
        return min(o, max(1, size // (i * step)) * step)

    @torch.no_grad()
    def snap_(self, rows: Tensor, start: int, inside: Tensor | None = None) -> Tensor:
        """Replace rows in place by the nearest values on the grid: those of `dequantize` for `encode`'s codes.

        rows   (n, i) contiguous; float32, or a wider or narrower dtype that is rounded to float32 first
        start  the weight row of rows[0]; start and start + n must be ends of blocks (see `rows_per_chunk`)
        inside (n, i) bool, filled with what `inside` returns for the rows
        """
        if not has_values(rows):
            self._rehearse(rows)
            return rows
        for rows_32, at in self._float32_chunks(rows, start, copy=False):
            part = None if inside is None else inside[at - start : at - start + len(rows_32)]
            self._snap(rows_32, at, part)
            if rows.dtype != torch.float32:
                rows[at - start : at - start + len(rows_32)].copy_(rows_32)
        return rows

    def inside(self, rows: Tensor, start: int) -> Tensor:
        """Return where the straight-through gradient passes, up to half a step beyond the grid's range: (n, i) bool.

        Nothing passes in a block whose scale is zero, which holds only zero. Arguments as for `snap_`; the rows are
        unchanged.
        """
        inside = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
        self.snap_(rows.clone(memory_format=torch.contiguous_format), start, inside)
        return inside

    @torch.no_grad()
    def encode(self, weight_oi: Tensor) -> Self:
        """Return the same grid, sharing its tensors, with the codes nearest to weight_oi (o, i), any float dtype."""
        self._check_shape(weight_oi)
        return self._with_codes(
            torch.cat([self._encode(rows_32, at) for rows_32, at in self._float32_chunks(weight_oi, 0, copy=True)])
        )

    @torch.no_grad()
    def with_zeros(self, keep_oi: Tensor) -> Self:
        """Return the same grid with the code of zero where keep_oi (o, i) bool is False: prunes a quantized weight.

        Raises DovetailError where the grid has no zero.
        """
        self._check_shape(keep_oi)
        codes, zero = self.codes_of(0, self.shape[0])
        if zero is None:
            raise DovetailError(
                self.identity,
                found="a grid without an exact zero",
                rule="a quantized weight can be pruned only where its grid represents zero exactly",
                fix="use a quantizer whose grid has a zero, such as nf4 or int(bits=4)",
            )
        return self._with_codes(torch.where(keep_oi, codes, zero))

    def codes_of(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return the codes of weight rows [start, stop), uint8 (n, i), and those of exact zero (`zero_codes`)."""
        i = self.shape[1]
        flat = self.codes.view(torch.uint8).view(-1)
        return unpack(flat, self.bits, start * i, stop * i).view(-1, i), self.zero_codes(start, stop)

    def with_codes(self, codes_oi: Tensor) -> Self:
        """Return the same grid, sharing its tensors, with these codes: uint8 (o, i), not packed."""
        self._check_shape(codes_oi)
        return self._with_codes(codes_oi)

    @torch.no_grad()
    def off_grid(self, weight_oi: Tensor) -> int:
        """Count the weights that are not exactly a grid value rounded to weight_oi's dtype, (o, i) any float."""
        self._check_shape(weight_oi)
        count = torch.zeros((), dtype=torch.int64, device=weight_oi.device)
        for start, stop in self._chunks(self.shape[0]):
            wanted = weight_oi[start:stop]
            nearest = _middle_of_rounding_interval(wanted).contiguous()
            self._snap(nearest, start)
            count += (nearest.to(wanted.dtype) != wanted).sum()
        return int(count)

    def rows(self, start: int, stop: int) -> Self:
        """Return weight rows [start, stop) with the same codes and values; both must be ends of blocks."""
        raise NotImplementedError(f"the grid of {self.identity} cannot be cut")

    def moved(self, factor_b: Tensor | None = None, offset_b: Tensor | None = None) -> Self:
        """Return a grid with the same codes, whose blocks are scaled or shifted; its numbers are rounded as stored.

        factor_b  (blocks,) not negative, multiplies the scale of each block; for a grid whose quantizer has "scales" in
                  `movable`
        offset_b  (blocks,) added to the values of each block, through its zero point; for "zeros" in `movable`. A
                  block whose scale is zero is not moved
        """
        raise NotImplementedError(f"the grid of {self.identity} has no numbers that can be trained")

    @property
    def nbytes(self) -> int:
        """Exact stored bytes: packed codes, scales, zero points, nested constants."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _rehearse(self, rows: Tensor) -> None:
        """Allocate what the work on a chunk of these rows needs, and free it: all that a dry run needs to know."""
        if not rows.is_meta:
            weights = min(len(rows), self.rows_per_chunk) * self.shape[1]
            torch.empty(WORKING_NBYTES * weights, dtype=torch.uint8, device=rows.device)

    def _by_block(self, operation: Callable[[Tensor, Tensor], Tensor], rows: Tensor, per_block: Tensor) -> None:
        """Apply an in-place operation to the rows with one operand per block; per_block (blocks in rows,)."""
        if rows.shape[1] % self.block == 0:
            operation(rows.view(-1, self.block), per_block[:, None])
            return
        flat = rows.view(-1)
        whole = flat.numel() // self.block
        operation(flat[: whole * self.block].view(whole, self.block), per_block[:whole, None])
        if whole * self.block < flat.numel():
            operation(flat[whole * self.block :], per_block[-1])

    def _block_range(self, start: int, rows: int) -> tuple[int, int]:
        i = self.shape[1]
        return start * i // self.block, -(-(start + rows) * i // self.block)

    def _chunks(self, rows: int, start: int = 0) -> Iterator[tuple[int, int]]:
        for chunk in row_slices(start, start + rows, self.rows_per_chunk, self.codes):
            yield chunk.start, chunk.stop

    def _float32_chunks(self, rows: Tensor, start: int, *, copy: bool) -> Iterator[tuple[Tensor, int]]:
        """Yield cache-sized float32 chunks with their first weight row: views of rows where that is possible."""
        o, i = self.shape
        stop = start + len(rows)
        if rows.shape[1:] != (i,) or start * i % self.block or (stop * i % self.block and stop != o) or stop > o:
            raise ValueError(f"rows [{start}, {stop}) of shape {tuple(rows.shape)} do not cut {self.shape} into blocks")
        for first, last in self._chunks(len(rows), start):
            chunk = rows[first - start : last - start]
            yield chunk.to(torch.float32, copy=copy, memory_format=torch.contiguous_format).contiguous(), first

    def _check_shape(self, tensor: Tensor) -> None:
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} for a weight of shape {self.shape}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model but keep the dtypes: `model.to(bfloat16)` must not round the grid."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.identity}, shape={self.shape}, nbytes={self.nbytes}"


def refuse_bad_weight(where: str, weight_oi: Tensor) -> Tensor:
    """Return weight_oi in float32, contiguous; raise DovetailError where it is not a finite matrix."""
    if weight_oi.dim() != 2 or not weight_oi.is_floating_point():
        raise DovetailError(
            where,
            found=f"a tensor of shape {tuple(weight_oi.shape)} and dtype {weight_oi.dtype}",
            rule="the weight to quantize must be a matrix (out, in) of floats",
            fix="flatten a convolution's kernel into its input dimension",
        )
    weight_32 = weight_oi.detach().to(torch.float32).contiguous()
    refuse_not_finite(where, weight_32)
    return weight_32


def refuse_not_finite(where: str, weight: Tensor) -> None:
    """Raise DovetailError for weights that are NaN or infinite."""
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise DovetailError(
            where,
            found=f"{bad} weights that are NaN or infinite in {str(weight.dtype).removeprefix('torch.')}",
            rule="weights to prune or quantize must be finite",
            fix="check the checkpoint, or the training that made these weights",
        )


def _middle_of_rounding_interval(weight_oi: Tensor) -> Tensor:
    """Return the middle of the interval of numbers that round to weight_oi, in float32.

    It is the weight itself, except for a power of two in a 16-bit dtype: there the interval is twice as long upwards.
    A grid value lies in the interval exactly where the grid value nearest to its middle does.
    """
    weight_32 = weight_oi.to(torch.float32, copy=True)
    if weight_oi.dtype not in (torch.bfloat16, torch.float16):
        return weight_32
    info = torch.finfo(weight_oi.dtype)
    power_of_two = torch.frexp(weight_32).mantissa.abs() == 0.5
    power_of_two &= weight_32.abs() > info.smallest_normal
    return torch.where(power_of_two, weight_32 * (1 + info.eps / 8), weight_32)
