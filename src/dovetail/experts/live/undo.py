"""What a live tensor held before an expert came, so that it can be put back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Whole:
    """All of it."""

    values: Tensor

    def put_back(self, tensor: Tensor) -> bool:
        """Into the live tensor, in place."""
        tensor.copy_(self.values)
        return True


@dataclass
class Places:
    """What was at positions (flat, row-major), and what was written there instead."""

    values: Tensor
    at: Tensor
    written: Tensor

    def put_back(self, tensor: Tensor) -> bool:
        """Into the live tensor, in place. False, and nothing is done, where others wrote to it since: new weights were
        loaded, and what was held before would spoil them."""
        flat, at = tensor.reshape(-1), self.at.to(tensor.device, torch.int64)  # a copy where it isn't contiguous
        if not torch.equal(flat[at], self.written.to(tensor)):
            return False
        flat[at] = self.values.to(tensor)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))
        return True


Kept = Whole | Places
