"""Weights that a layer makes in every forward pass are made once while a model is only read.

A layer under a chain keeps codes and small factors, and makes its weight from them when it runs. Scoring and generation
run it many times with the same factors: generation once for each token, where making the weight costs far more than
multiplying by it. While `holding(model)` is entered, such layers keep the weight instead, in the dtype of the model, if
half of the free memory is enough for all of them. Outputs are the same bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

_CGROUP = Path("/sys/fs/cgroup")


class Holder(nn.Module):
    """A layer that can hold the weight that it makes in every forward pass."""

    @property
    @abstractmethod
    def held_nbytes(self) -> int:
        """Bytes that holding would take; 0: the layer makes no weight."""

    @abstractmethod
    def hold(self) -> None:
        """Make the weight and keep it; nothing that it is made of may change before `release`."""

    @abstractmethod
    def release(self) -> None:
        """Give the weight up."""


@contextmanager
def holding(model: nn.Module) -> Iterator[None]:
    """Hold the weights that layers make, if half of the free memory is enough, while entered."""
    layers = [module for module in model.modules() if isinstance(module, Holder) and module.held_nbytes]
    needed = sum(layer.held_nbytes for layer in layers)
    try:
        if layers and needed <= free_memory(next(model.parameters()).device) // 2:
            for layer in layers:
                layer.hold()
        yield
    finally:
        for layer in layers:
            layer.release()


def free_memory(device: torch.device) -> int:
    """Return the free bytes of an accelerator, or of this machine within the limit of its control group (version 2).

    Pages of files that the control group could give back count as free.
    """
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.get_memory_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no control group, or one without a limit ("max")
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(stat["inactive_file"])))
    return free
