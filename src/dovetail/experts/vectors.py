"""Task vectors: fine-tuned minus initial parameters, τ = θ_ft - θ_init, and their origin.

`sources.py` makes them from adapters and checkpoints, `ternary.py` compresses them, `merging.py` merges them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import pydantic
import torch
from torch import Tensor

Initial = Literal["zero", "chain", "peft", "base"]


@dataclass(frozen=True)
class Origin:
    """The origin of a task vector.

    initial  θ_init: "zero" (the values are the parameters themselves), "chain" (initial values of `adapter`, drawn from
             its seed), "peft" (`peft_initial`) or "base" (the base model's weights)
    base     fingerprint of the base model (`dovetail.fingerprint`)
    chain    of a Dovetail adapter, as text
    adapter  adapter.json of a Dovetail adapter
    peft     adapter_config.json of a peft adapter
    """

    initial: Initial = "zero"
    base: str | None = None
    chain: str | None = None
    adapter: dict[str, pydantic.JsonValue] | None = field(default=None, repr=False)
    peft: dict[str, pydantic.JsonValue] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class TaskVector(Mapping[str, Tensor]):
    """Tensors by name, and their origin.

    tensors  a mapping that may compute a tensor at each access: a checkpoint's difference is read tensor by tensor
    origin   of the task vector
    specs    shape and dtype of every tensor, known without computing it; None: taken from the tensors
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    origin: Origin = Origin()
    specs: Mapping[str, Spec] | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def origin_of(vector: Mapping[str, Tensor]) -> Origin:
    """Return the origin of a task vector; of other tensors, one with initial values of zero."""
    return vector.origin if isinstance(vector, TaskVector) else Origin()


def groups_of(names: Iterable[str], origin: Origin) -> list[list[str]]:
    """Return the tensors that share one scale: all parameters of an adapter, and each of the base's own tensors.

    A head, an embedding or a bias that was trained beside an adapter changes by amounts of another size.
    """
    names, whole = list(names), frozenset()
    if origin.initial == "chain":
        whole = frozenset(name for name in names if name.startswith("head/"))
    elif origin.initial == "peft":
        from dovetail.experts.peft_adapters import of_the_base  # imports transformers, which takes seconds

        whole = of_the_base(origin.peft or {}, names)
    parameters = [name for name in names if name not in whole]
    return [parameters, *([name] for name in sorted(whole))] if parameters else [names]


def specs_of(vector: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Return shape and dtype of every tensor, in the sorted order of their names."""
    known = vector.specs if isinstance(vector, TaskVector) else None
    if known is None:
        known = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in vector.items()}
    return {name: known[name] for name in sorted(known)}
