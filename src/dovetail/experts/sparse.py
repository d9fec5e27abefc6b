"""Sparse task vectors: some values, as they are, and where they are. What pruning and DARE make of a task vector.

Positions are coded as an expert's (`codec`), so that sizes compare; a value then takes 16 or 32 bits, where an expert
has one for its sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dovetail.experts.codec.codec import Coded, code, counts_of, decode_indices
from dovetail.experts.merging import packed
from dovetail.experts.vectors import Origin


@dataclass(frozen=True)
class SparseVector:
    """Some values of a task vector.

    coded    where they are, by tensor; signs there are all plus
    values   what they are, by tensor, in row-major order of their positions and in the tensor's dtype; on the CPU
    density  the share that was to be kept
    origin   what the task vector is of
    """

    coded: Mapping[str, Coded] = field(repr=False)
    values: Mapping[str, Tensor] = field(repr=False)
    density: float
    origin: Origin

    @property
    def kept(self) -> int:
        """How many values there are."""
        return sum(values.numel() for values in self.values.values())

    @property
    def numel(self) -> int:
        return sum(coded.numel for coded in self.coded.values())

    @property
    def nbytes(self) -> int:
        """Positions, without the codec's sign bits (values have their own), and values."""
        signs = sum(int(-(-counts_of(coded.directory) // 8).sum()) for coded in self.coded.values())
        return sum(c.nbytes for c in self.coded.values()) - signs + sum(v.nbytes for v in self.values.values())

    def dense(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The task vector, 0 where nothing was kept; dtype: of all tensors; None: what each was."""
        result = {}
        for name, coded in self.coded.items():
            values = self.values[name] if dtype is None else self.values[name].to(dtype)
            result[name] = torch.zeros(coded.shape, dtype=values.dtype)
            result[name].view(-1)[torch.from_numpy(decode_indices(coded, name)[0])] = values
        return result


def sparse(tensors: Iterable[tuple[str, Tensor]], density: float, origin: Origin) -> SparseVector:
    """What isn't 0 of tensors on the CPU, which come one by one with their names."""
    coded, values = {}, {}
    for name, tensor in tensors:
        flat = tensor.reshape(-1)
        plus = packed(flat)
        coded[name] = code(np.stack([plus, np.zeros_like(plus)]), tuple(tensor.shape))
        values[name] = flat[flat != 0]
    return SparseVector(coded, values, density, origin)
