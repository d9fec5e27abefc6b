"""The maximum bytes of tensors alive at once, counted per operation: equal on any device, and on fake tensors.

The inputs and outputs of every operation are counted, each storage from its first use until it is freed. Memory that a
kernel allocates internally, and memory that the allocator holds back, is not counted; on a GPU, a run reports the
allocator's own count instead. This file needs torch alone, so that a benchmark can count a peer's memory with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
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
        self.live_nbytes = 0
        self.peak_nbytes = 0
        """The maximum of `live_nbytes` so far."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in roots:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, *kwargs.values())):
            self._see(tensor)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0  # there is no value: branches take the path of zero
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # the storage's Python object lives as long as the storage
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen[key] = weakref.ref(storage, partial(self._freed, key, nbytes))
        self.live_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)

    def _freed(self, key: int, nbytes: int, _: object) -> None:
        del self._seen[key]
        self.live_nbytes -= nbytes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
