"""The maximum bytes of tensors alive at once, counted per operation: equal on any device, and on fake tensors.

The inputs and outputs of every operation are counted, each storage from its first use until it is freed. Memory that a
kernel allocates internally, and memory that the allocator holds back, is not counted; on a GPU, a run reports the
allocator's own count instead. This file needs torch alone, so that a benchmark can count a peer's memory with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """A context manager that counts the bytes of live storages.

    roots   tensors that exist before, such as parameters and buffers
    """

    def __init__(self, roots: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak_nbytes = 0
        """The maximum of `live_nbytes` so far."""
        self._live_nbytes = 0
        self._seen: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        # Freed storages, not subtracted yet. A callback in Python cannot raise: Ctrl-C in it would be lost.
        self._freed: list[weakref.KeyedRef[int, torch.UntypedStorage]] = []
        for tensor in roots:
            self._see(tensor)

    @property
    def live_nbytes(self) -> int:
        """The bytes of the storages that are alive now."""
        self._count_freed()
        return self._live_nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # `tensor.device` makes no tensor, and most calls of a dry run are this one
        kwargs = kwargs or {}
        for tensor in _tensors((args, *kwargs.values())):
            self._see(tensor)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0  # there is no value: branches take the path of zero
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            result = _grouped_product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs"))
        else:
            result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor)
        return result

    def alive(self) -> dict[int, int]:
        """Return the bytes of each live storage, by a key that another one may get once it is freed."""
        self._count_freed()
        return {key: nbytes for key, (_, nbytes) in self._seen.items()}

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        self._count_freed()  # first: a new storage may have the key of a freed one
        key = id(storage)  # the storage's Python object lives as long as the storage
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen[key] = weakref.KeyedRef(storage, self._freed.append, key), nbytes
        self._live_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self._live_nbytes)

    def _count_freed(self) -> None:
        while self._freed:
            _, nbytes = self._seen.pop(self._freed.pop().key)
            self._live_nbytes -= nbytes


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Return what torch's grouped product makes, without values: its own version for fake tensors takes bfloat16 only.

    a, b   (t, k) or (groups, t, k), and (k, n) or (groups, k, n)
    ends   (groups,) where each group ends, in the rows or columns of a matrix that has no axis of groups
    """
    groups = ends.shape[0] if a.dim() == b.dim() == 2 and ends is not None else a.shape[0]
    return a.new_empty((groups,) * (a.dim() == b.dim()) + (a.shape[-2], b.shape[-1]))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
