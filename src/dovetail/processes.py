"""Several processes of one run, started by torchrun or accelerate launch: they train together, and the first writes.

A run is the same run on any number of processes: each takes a part of every batch, and what is not computed together
(calibrated weights, scores, results) is the first one's. Without a launcher there is one process, and nothing waits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from dovetail.errors import DovetailError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_LONGEST = timedelta(days=7)
"""How long a process waits for the others: while the first one scores and merges."""


def count() -> int:
    """Return the number of processes of this run, from the launcher's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def first() -> bool:
    """Return whether this process is the one that writes, scores and prints."""
    return rank() == 0


def refuse(where: str, kind: type[DovetailError]) -> None:
    """Raise an error of this kind where the run has several processes."""
    if count() > 1:
        raise kind(
            where,
            found=f"WORLD_SIZE={count()}: one of several processes",
            rule="torchrun and accelerate launch start several processes of `dovetail run` or dovetail.train only",
            fix="start it without a launcher; `dovetail study --jobs` runs several trainings at a time",
        )


def start() -> None:
    """Connect the processes, once: over gloo on processors, and over nccl too on GPUs."""
    import torch
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_LONGEST)


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def from_first(make: Callable[[], T]) -> T:
    """Return what the first process makes, which JSON must be able to hold; the others wait for it."""
    if count() == 1:
        return make()
    import torch
    import torch.distributed as dist

    made = make() if first() else None
    text = json.dumps(made).encode() if first() else b""
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    data = (
        torch.frombuffer(bytearray(text), dtype=torch.uint8) if first() else torch.empty(int(size), dtype=torch.uint8)
    )
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))  # on the first one too, so that all have the same


def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values of these tensors, in place; shapes and dtypes are equal."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for tensor in tensors:
            if tensor.numel():
                values = tensor.detach().contiguous()
                dist.broadcast(values.view(-1).view(torch.uint8), 0)  # gloo does not know every dtype
                if values.data_ptr() != tensor.data_ptr():
                    tensor.detach().copy_(values)


def total(number: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if count() > 1:
        import torch.distributed as dist

        number = number.clone()
        dist.all_reduce(number)
    return number
