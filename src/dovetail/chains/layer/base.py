"""The base of a layer: a dense or quantized weight, and what the pruners and quantizers decided about it.

    dense      the weight itself, frozen, in the layer's own layout
    quantized  packed codes and scales (`dovetail.chains.grid.QuantizedWeight`)
    mask_bits  one bit a weight: where the pruner left a weight; kept when a later link needs it
    start      the weight before quantizing, in full precision; kept while training for
               `regrid(start=weights)`
    kept       room for the weight that a closed chain makes, while training (`chains/layer/keeping.py`)

The planner asks three things of it: the matrix (o, i) in a dtype, its row norms, and the mask's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight, row_slices
from dovetail.chains.layer.bits import INTEGERS, pack_bits, unpack_bits
from dovetail.chains.layer.operators import Numbered
from dovetail.chains.link import Quantizer
from dovetail.chains.statistics import InputStatistics
from dovetail.models.layouts import Layout

CHUNK_BYTES = 1 << 22
"""Rows are worked on in chunks that stay in the processor's caches; on other devices than the CPU all at once."""


class Scratch:
    """Buffers that the layers of a model share for weights that live for one product only. Grows to the largest."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised contiguous tensor: the same memory at each call with that slot, dtype and device."""
        key, numel = (slot, dtype, device), math.prod(shape)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < numel:
            with torch.inference_mode(False):  # an inference tensor could not be written to while training
                self._flat[key] = flat = torch.empty(numel, dtype=dtype, device=device)
        return flat[:numel].view(shape)

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()  # a copy shares no memory


class Base(Numbered):
    """What the chain starts from, on one layer.

    weight  the layer's own frozen weight, in its own layout
    """

    mask_bits: Tensor | None
    start: Tensor | None
    kept: Tensor | None

    def __init__(self, layout: Layout, weight: Tensor, scratch: Scratch) -> None:
        super().__init__()
        self.layout = layout
        self.scratch = scratch
        self._dtype = weight.dtype
        self.dense: nn.Parameter | None = nn.Parameter(weight, requires_grad=False)
        self.quantized: QuantizedWeight | None = None
        self.register_buffer("mask_bits", None)
        self.register_buffer("start", None, persistent=False)
        self.register_buffer("kept", None, persistent=False)
        self._row_square: dict[bool, Tensor] = {}
        self.kept_key: Hashable = None
        self.blocked: list[Tensor] = []
        self._held: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight: the dense one's, or the one that codes are dequantized to."""
        return self._dtype if self.dense is None else self.dense.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Base:
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype  # codes follow `model.to(dtype)` when dequantized
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()

    def _changed(self) -> None:
        """Give up what was computed from the base as it was."""
        self._row_square = {}
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle gets: no kept weight, whose key holds in this process only."""
        buffers = {**self._buffers, "kept": None}
        return {**self.__dict__, "_buffers": buffers, "kept_key": None, "blocked": []}

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.out_features, self.layout.in_features

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def stored(self) -> Tensor:
        """The dense weight in the layer's own layout, or the packed codes."""
        if self.dense is not None:
            return self.dense
        assert self.quantized is not None
        return self.quantized.codes

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the base weight (o, i), in its own dtype by default. Dense: a view; quantized: a new tensor."""
        dtype = dtype or self.dtype
        if self.dense is not None:
            return self.layout.matrix(self.dense.detach()).to(dtype)
        assert self.quantized is not None
        return self.quantized.dequantize(torch.empty(self.shape, dtype=dtype, device=self.device))

    def native(self, dtype: torch.dtype, slot: str = "weight") -> Tensor:
        """Return the base weight in the layer's own layout: itself, or dequantized into the shared buffer `slot`."""
        if self.dense is not None:
            return self.dense.detach().to(dtype)
        assert self.quantized is not None
        if self._held is not None and self._held.dtype == dtype:
            return self._held
        native = self.buffer(dtype, slot)
        self.quantized.dequantize(self.layout.matrix(native))
        return native

    def hold(self) -> None:
        """Keep the dequantized weight, which `native` then returns, until `release`."""
        self._held = self.native(self.dtype).clone()

    def release(self) -> None:
        """Give the dequantized weight up."""
        self._held = None

    def keep(self, asked: bool) -> None:
        """Make room for the weight of a closed chain, in the base's dtype, or give it up."""
        self.kept = self.layout.empty(self.dtype, self.device) if asked else None
        self.forget()

    def forget(self) -> None:
        """Let the weight of a closed chain be made again where it is used next.

        kept_key  of what the weight in `kept` was made from; None: of nothing
        blocked   the places in the weight (o, i), flat, where its constraints that list them pass no gradient
        """
        self.kept_key, self.blocked = None, []

    def buffer(self, dtype: torch.dtype, slot: str) -> Tensor:
        """Return the shared buffer in the layer's own layout, uninitialised."""
        shape = tuple(self.layout.empty(dtype, torch.device("meta")).shape)
        return self.take(slot, shape, dtype)

    def take(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.scratch.take(slot, shape, dtype, self.device)

    def start_weight(self, from_codes: bool, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (o, i) that the chain's differentiable links start from; it must not be written to.

        from_codes  the base as stored; else the weight before quantizing, where it was kept
        dtype       codes are dequantized to it, into a buffer of their own; None: to the base's dtype, into the buffer
                    that `native` uses
        """
        if self.start is not None and not from_codes:
            return self.layout.matrix(self.start)
        if self.dense is not None:
            return self.layout.matrix(self.dense.detach())
        assert self.quantized is not None
        if dtype is None:
            return self.layout.matrix(self.native(self.dtype))
        return self.quantized.dequantize(self.take("start", self.shape, dtype))

    def row_square(self, from_codes: bool) -> Tensor:
        """‖W‖² of each row of `start_weight`, (o,), at least float32; cached until the base changes."""
        found = self._row_square.get(from_codes)
        if found is None or found.device != self.device:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            weight = self.start_weight(from_codes)
            found = self._row_square[from_codes] = torch.empty(self.shape[0], dtype=wide, device=weight.device)
            for rows in self.row_chunks(wide):
                found[rows] = weight[rows].to(wide).square().sum(1)
        return found

    def row_chunks(self, dtype: torch.dtype) -> list[slice]:
        """Slices of rows to work on one after the other."""
        o, i = self.shape
        step = o
        if self.device.type == "cpu":
            step = max(1, CHUNK_BYTES // (i * dtype.itemsize))
            if self.quantized is not None:
                unit = self.quantized.rows_per_chunk
                step = max(unit, step // unit * unit) if unit < o else o
        return row_slices(0, o, step, self.stored)

    # What pruners, quantizers and merging do to the base.

    def sharing(self, scratch: Scratch) -> Base:
        """Return a base of the same weight, mask and codes, which are not copied, with these shared buffers."""
        weight = torch.empty(0, dtype=self.dtype) if self.dense is None else self.dense.detach()
        other = Base(self.layout, weight, scratch)
        other.mask_bits = self.mask_bits
        if self.quantized is not None:
            other.set_quantized(self.quantized)
        return other

    def set_dense(self, weight_oi: Tensor) -> None:
        """Replace a dense base by another weight (o, i)."""
        self.dense = nn.Parameter(self.layout.native(weight_oi.to(self.dtype)), requires_grad=False)
        self.quantized = None
        self._changed()

    def set_quantized(self, quantized: QuantizedWeight) -> None:
        """Replace the base by codes on a grid."""
        self.quantized = quantized
        self.dense = None
        self._changed()

    def quantize(
        self,
        quantizer: Quantizer,
        inputs: InputStatistics | None = None,
        keep_start: bool = False,
        weight_oi: Tensor | None = None,
    ) -> None:
        """Quantize a dense base; with `keep_start`, keep the weights that were rounded beside the codes.

        weight_oi  another weight in its place, in the base's dtype
        """
        weight = self.matrix() if weight_oi is None else weight_oi
        if keep_start:
            quantized, rounded = quantizer.quantize_from(weight, inputs)
            self.start = self.layout.native(rounded)
        else:
            quantized, self.start = quantizer.quantize(weight, inputs), None
        self.set_quantized(quantized)

    @property
    def identity(self) -> str:
        """The dtype of a dense base, or the quantizer of a quantized one with its arguments."""
        return str(self.dtype) if self.quantized is None else self.quantized.identity

    def allocate(self, quantizer: Quantizer | None, *, mask: bool, start: bool) -> None:
        """Allocate what a stage's base holds, with arbitrary values: a dense weight or zeroed codes, a mask, a start.

        quantizer  on whose grid the base is; None leaves the dense weight
        """
        o, i = self.shape
        self.mask_bits = torch.zeros(o, -(-i // 8), dtype=torch.uint8, device=self.device) if mask else None
        self.start = self.layout.empty(self.dtype, self.device) if start else None
        if quantizer is not None:
            self.set_quantized(quantizer.empty(self.shape).to(self.device))

    def restore(self, quantizer: Quantizer | None, state: Mapping[str, Tensor]) -> None:
        """Load a base's `state_dict`, on the grid of `quantizer`, and its `start` where there is one."""
        start = state.get("start")
        self.allocate(quantizer, mask="mask_bits" in state, start=start is not None)
        self.load_state_dict({name: value for name, value in state.items() if name != "start"})
        if start is not None:
            self.start = start.to(self.device)

    def place(self, quantizer: Quantizer | None, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a base's `state_dict` and its `start`, uncopied, on the grid of `quantizer`."""
        if quantizer is not None:
            with torch.device("meta"):
                self.set_quantized(quantizer.empty(self.shape))
        self.mask_bits, self.start = state.get("mask_bits"), state.get("start")
        self.load_state_dict({name: value for name, value in state.items() if name != "start"}, assign=True)

    def set_mask(self, keep_oi: Tensor, weight_oi: Tensor | None = None) -> None:
        """Set the pruned weights to zero, and keep the mask, one bit per weight.

        Zeros of an earlier pruner or of the checkpoint stay zero. A quantized weight may be zero by rounding: there
        only an earlier mask counts.

        weight_oi  the new values of the remaining weights (rounded to a quantized base's grid); None: unchanged
        """
        if self.dense is not None:
            before = self.matrix()
            keep_oi = keep_oi & (before != 0)
            self.set_dense(torch.where(keep_oi, before if weight_oi is None else weight_oi, 0))
        else:
            assert self.quantized is not None
            if self.mask_bits is not None:
                keep_oi = keep_oi & self.mask_rows(slice(None))
            moved = self.quantized if weight_oi is None else self.quantized.encode(weight_oi)
            self.set_quantized(moved.with_zeros(keep_oi))
        if self.start is not None:
            start = self.layout.matrix(self.start) if weight_oi is None else weight_oi.to(self.start.dtype)
            self.start = self.layout.native(torch.where(keep_oi, start, 0))
        self.mask_bits = pack_bits(keep_oi)
        self.forget()

    def mask_rows(self, rows: slice) -> Tensor:
        return self.mask_words(rows, torch.int8).bool()

    def mask_words(self, rows: slice, dtype: torch.dtype) -> Tensor:
        assert self.mask_bits is not None
        return unpack_bits(self.mask_bits[rows], self.shape[1], INTEGERS[dtype.itemsize])
