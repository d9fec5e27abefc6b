"""Several processes of one run, started by torchrun or accelerate launch: they train together, and the first writes.

A run is the same run on any number of processes: each trains on a part of every batch and scores a part of the batches,
and what is not computed together (calibrated weights, results) is the first one's. Without a launcher there is one
process, and nothing waits.
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

_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM",
            "ACCELERATE_USE_PARALLELISM_CONFIG")  # fmt: skip
"""How `accelerate launch` says that the processes share one model."""
_LONGEST = timedelta(days=7)
"""How long a process waits for the others: while the first one scores and merges."""


def count() -> int:
    """Return the number of processes of this run, from the launcher's WORLD_SIZE; DovetailError if it is none."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) == 0:
        rule, fix = "it must be the number of processes of this run", "unset WORLD_SIZE, or start it with torchrun"
        raise DovetailError("processes", found=f"WORLD_SIZE={said!r}", rule=rule, fix=fix)
    return int(said)


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def refuse(where: str, kind: type[DovetailError]) -> None:
    """Raise an error of this kind where the run has several processes."""
    if count() > 1:
        raise kind(
            where,
            found=f"WORLD_SIZE={count()}: one of several processes",
            rule="torchrun and accelerate launch start several processes of `dovetail run`, `dovetail evaluate` of "
            "Dovetail's own tasks, and dovetail.train only",
            fix="start it without a launcher; `dovetail study --jobs` runs several trainings at a time",
        )


def check_launcher() -> None:
    """Raise DovetailError where a launcher asks for what would change a run without a word: sharding, a precision."""
    for name in _SHARDED:
        if os.environ.get(name, "false").lower() in ("true", "1", "yes", "y", "t", "on"):
            raise DovetailError(
                "processes",
                found=f"{name}={os.environ[name]}",
                rule="the processes of a run train by DistributedDataParallel: each one holds the whole model",
                fix="start it with torchrun, or configure accelerate for several processes without sharding",
            )
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise DovetailError(
            "processes",
            found=f"ACCELERATE_MIXED_PRECISION={precision}",
            rule="the settings of a training say its precision, so that its report does",
            fix="set bf16 in the recipe's train part, and mixed_precision to no in accelerate",
        )


def start() -> None:
    """Connect the processes, once: over gloo on processors, and over nccl too on GPUs."""
    check_launcher()
    import torch
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise DovetailError(
            "processes",
            found=f"WORLD_SIZE={count()} without {' and '.join(missing)}",
            rule="the launcher of several processes says which one this is, and where the first one is",
            fix="start it with torchrun or accelerate launch, or unset WORLD_SIZE",
        )
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
    """Return what the first process makes, which JSON must be able to hold; the others wait for it.

    Where it cannot make it, it raises its error, and the others raise a DovetailError: they would wait for days where
    the first one goes on after an error.
    """
    if count() == 1:
        return make()
    import torch
    import torch.distributed as dist

    text = b""
    try:
        if first():
            text = json.dumps(make()).encode()
    except BaseException:
        dist.broadcast(torch.tensor([-1]), 0)
        raise
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    if size < 0:
        fix = "see the error of the first process"
        raise DovetailError(f"process {rank()} of {count()}", found="an error in the first process", fix=fix)
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


def of_all(own: T) -> list[T]:
    """Return what each process gives, in the order of their numbers; JSON must be able to hold it."""
    if count() == 1:
        return [own]
    import torch
    import torch.distributed as dist

    text = json.dumps(own).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    data = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    mine = torch.zeros_like(data[0])
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.all_gather(data, mine)
    return [json.loads(bytes(each[: int(size)].tolist())) for each, size in zip(data, sizes, strict=True)]


def total(number: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if count() > 1:
        import torch.distributed as dist

        number = number.clone()
        dist.all_reduce(number)
    return number
