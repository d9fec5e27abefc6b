"""Experts in live models: values are written in place into the existing tensors, and removed again.

A tensor then holds, computed in its own dtype:

    initial value + value        for an adapter with known initial values (`Origin.initial` "chain", "peft"), where a
                                 tensor of the adapter that the expert lacks gets the value without effect
    value                        for an adapter whose values are the parameters ("zero")
    previous value + value       for a fully fine-tuned model ("base"), only at kept positions

A switch costs a decode and, with initial values, an addition. What undoes it is saved: initial values once per model,
or the previous values at an expert's positions.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import AppliedChain, applied
from dovetail.chains.layer.elastic import load_ranks, saved_ranks
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import DataError
from dovetail.experts.expert import Expert, verify
from dovetail.experts.live.placement import (
    adapter_file,
    base_tensors,
    check_fingerprint,
    check_origin,
    check_scales,
    initial_values,
    live_fingerprint,
    peft_adapter,
    rest,
    slots,
)
from dovetail.experts.vectors import Origin, Spec, origin_of, specs_of

Content = Expert | Mapping[str, Tensor]


@dataclass
class Whole:
    """All previous values of a tensor."""

    values: Tensor

    def put_back(self, tensor: Tensor) -> bool:
        """Restore the live tensor in place. Return True."""
        tensor.copy_(self.values)
        return True


@dataclass
class Places:
    """The previous values at some positions (flat, row-major), and the values that replaced them."""

    values: Tensor
    at: Tensor
    written: Tensor

    def put_back(self, tensor: Tensor) -> bool:
        """Restore the live tensor in place.

        Return False and change nothing if other code has written to the tensor since, such as a load of new weights.
        """
        flat, at = tensor.reshape(-1), self.at.to(tensor.device, torch.int64)  # a copy if it is not contiguous
        if not torch.equal(flat[at], self.written.to(tensor)):
            return False
        flat[at] = self.values.to(tensor)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))
        return True


Undo = Whole | Places


@dataclass
class _Active:
    """The active content of a model.

    content  an expert, or the tensors of a task vector
    shapes   by name, of all tensors that are written: the content's, and the rest of an adapter
    initial  initial values by name
    saved    what restores the tensors, by name
    ranks    "LAYER/PLACE" -> previous rank of elastic adapters
    record   of the chain on the model; a later chain with the same text has another record
    lost     whether other code has overwritten it
    """

    content: Content
    shapes: dict[str, tuple[int, ...]]
    origin: Origin
    initial: dict[str, Tensor]
    record: AppliedChain | None
    saved: dict[str, Undo] = field(default_factory=dict)
    ranks: dict[str, int] | None = None
    lost: bool = False


class _State:
    """The state of a model, for its lifetime."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: dict[str, _Active] = {}
        self.initial: tuple[str, dict[str, Tensor]] = ("", {})
        self.marks: list[tuple[int, int]] = []
        self.fingerprint = ""


_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def _state(model: nn.Module) -> _State:
    with _STATES_LOCK:
        return _STATES.setdefault(model, _State())


def activate(model: nn.Module, expert: Expert, *, verified: bool = False) -> None:
    """Put an expert into a live model in place of the active one, without replacing or allocating a tensor.

    model     with a chain, a stock peft model, or any model with the expert's names (`placement`)
    verified  whether the blocks have been checked since reading, as by a `Store`; otherwise the expert is decoded twice
    errors    LoadError for a wrong base, chain, name or shape, and for changed bytes, before any value is written.
              After any other error, the previous expert is restored
    """
    if not verified:
        verify(expert)
    dtypes = expert.dtypes
    _switch(model, expert, {name: Spec(shape, dtypes[name]) for name, shape in expert.shapes.items()}, expert.origin)


def put(model: nn.Module, vector: Mapping[str, Tensor], origin: Origin | None = None) -> None:
    """Put an uncompressed or merged task vector into a live model, like `activate`.

    vector  by name, any float dtypes; read tensor by tensor. Referenced, not copied, while it is active
    origin  of the vector; None: that of a `TaskVector`, or initial values of zero
    errors  as `activate`; DataError for NaN or infinity, also in the live tensor's dtype
    """
    _switch(model, vector, specs_of(vector), origin or origin_of(vector))


def deactivate(model: nn.Module) -> None:
    """Remove the active expert and restore the previous values bit for bit.

    These are the base weights, or the values of an adapter's tensors before the first activation. A chain's links get
    their initial values. Without an active expert, nothing changes.
    """
    state = _state(model)
    with state.lock, torch.no_grad():
        active = state.active.pop(_part(model), None)
        if active is not None:
            _undo(model, active)


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Forget what is put on the model in this context. The caller must restore the tensors (`Before`)."""
    state = _state(model)
    with state.lock:
        active = dict(state.active)
        try:
            yield
        finally:
            state.active = active


def _part(model: nn.Module) -> str:
    """Return a key of the adapter that names currently refer to, of several that a model may carry."""
    adapter = peft_adapter(model)
    if adapter is not None:
        return f"peft {adapter}"
    if chain_layers(model):
        record = applied(model)
        return f"chain {id(record)}, stage {record.number}"  # `_Active` holds the record, so its id is unique
    return ""


@torch.no_grad()
def _switch(model: nn.Module, content: Content, specs: Mapping[str, Spec], origin: Origin) -> None:
    shapes = {name: spec.shape for name, spec in specs.items()}
    state = _state(model)
    with state.lock:
        part, live = _part(model), slots(model, shapes, origin)
        expected = check_origin(model, origin, shapes)
        others = rest(model, shapes, origin)
        if isinstance(content, Expert):
            check_scales(content.scales, live)
        if expected is not None:
            check_fingerprint(_fingerprint(model, state, part), expected)
        record = applied(model) if part.startswith("chain") else None
        initial = _initial_values(model, state, origin, live, others)
        if others:
            live = slots(model, shapes | {name: tuple(tensor.shape) for name, tensor in others.items()}, origin)
        active = _Active(content, {name: tuple(t.shape) for name, t in live.items()}, origin, initial, record)
        previous = state.active.pop(part, None)
        try:
            if previous is not None:
                _carry_over(model, previous, active, live)
            _write(model, active, live)
        except BaseException:
            _undo(model, active)
            if previous is not None and not previous.lost:
                _write_again(model, previous)
                state.active[part] = previous
            raise
        if record is not None:  # those of earlier chains and stages are merged or removed
            state.active = {key: each for key, each in state.active.items() if not key.startswith("chain")}
        state.active[part] = active


def _fingerprint(model: nn.Module, state: _State, part: str) -> str:
    """Return the fingerprint of the base, hashed again only if other code has replaced or changed its tensors.

    This module writes without changing torch's version counters.
    """
    marks = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in base_tensors(model).values()]
    if not state.fingerprint or marks != state.marks:
        active = state.active.get(part)
        in_base = active if active is not None and active.origin.initial == "base" else None
        if in_base is not None:
            _undo(model, in_base)
        try:
            state.fingerprint, state.marks = live_fingerprint(model), marks
        finally:
            if in_base is not None and in_base.lost:
                del state.active[part]
            elif in_base is not None:
                _write_again(model, in_base)
    return state.fingerprint


def _initial_values(
    model: nn.Module, state: _State, origin: Origin, live: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return initial values, computed once for all experts that share them."""
    if origin.initial not in ("chain", "peft") and not others:
        return {}
    file = adapter_file(origin)
    kinds = [[(name, str(t.dtype), str(t.device)) for name, t in part.items()] for part in (live, others)]
    seed = None if file is None else file.seed
    key = json.dumps([_part(model), origin.initial, seed, origin.peft, kinds, state.fingerprint])
    if state.initial[0] != key:
        state.initial = (key, initial_values(model, origin, live, others))
    return state.initial[1]


def _carry_over(model: nn.Module, previous: _Active, active: _Active, live: Mapping[str, Tensor]) -> None:
    """Undo what `active` will not overwrite, and pass on the saved values of the rest."""
    if "base" in (previous.origin.initial, active.origin.initial):
        _undo(model, previous)
        return
    shared = {name: saved for name, saved in previous.saved.items() if name in live}
    _undo(model, previous, leave=shared)
    for name, saved in shared.items():
        active.saved[name] = Whole(saved.values.to(live[name].device, live[name].dtype))
    active.ranks = previous.ranks


def _write(model: nn.Module, active: _Active, live: Mapping[str, Tensor]) -> None:
    """Write values into the model, and save those that they replace unless they are saved already."""
    if active.origin.initial == "base":
        scales = active.content.scales if isinstance(active.content, Expert) else {}
        for name, tensor in live.items():
            _add(active, name, tensor.data, scales.get(name, 0.0))
        return
    for name, tensor in live.items():
        if active.origin.initial == "chain" and name in active.initial:
            active.saved[name] = Whole(active.initial[name])
        elif name not in active.saved:
            active.saved[name] = Whole(tensor.detach().clone())
    named = active.content.coded if isinstance(active.content, Expert) else active.content
    if isinstance(active.content, Expert):
        active.content.dense(into={name: live[name].data for name in named})
    for name, tensor in live.items():
        if name not in named:
            tensor.data.zero_()
        elif not isinstance(active.content, Expert):
            tensor.data.copy_(_finite(name, active.content[name], tensor.dtype))
    for name, start in active.initial.items():
        live[name].data.add_(start)
    file = adapter_file(active.origin)
    if file is not None and file.ranks and not file.extracted:
        active.ranks = active.ranks or saved_ranks(model)[0]
        load_ranks(model, file.ranks, False)


def _add(active: _Active, name: str, tensor: Tensor, scale: float) -> None:
    """Add the nonzero values to a tensor, and save the previous ones."""
    flat = tensor.reshape(-1)  # a copy if it is not contiguous
    if isinstance(active.content, Expert):
        at, signs = (each.to(tensor.device) for each in active.content.indices(name))
        added = signs.to(tensor.dtype) * torch.tensor(scale, dtype=torch.float64).to(tensor)
    else:
        delta = _finite(name, active.content[name], tensor.dtype).to(tensor).reshape(-1)
        at = delta.nonzero().reshape(-1)
        added = delta[at]
    narrow = torch.int32 if flat.numel() < 2**31 else torch.int64
    before = flat[at]
    active.saved[name] = Places(before, at.to(narrow), before + added)
    flat[at] = before + added
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))


def _finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(f"task vector at {name}", found=f"NaN or infinity in {dtype}", rule="all values must be finite")
    return tensor


def _write_again(model: nn.Module, active: _Active) -> None:
    """Write again after an interruption; undo first, so that no value is added twice."""
    _undo(model, active)
    active.lost = False
    _write(model, active, slots(model, active.shapes, active.origin))


def _undo(model: nn.Module, active: _Active, leave: Mapping[str, Undo] | None = None) -> None:
    """Restore the saved values, except for the names in `leave`."""
    saved = {name: each for name, each in active.saved.items() if name not in (leave or {})}
    shapes = {name: shape for name, shape in active.shapes.items() if name in saved}
    for name, tensor in (slots(model, shapes, active.origin) if saved else {}).items():
        active.lost |= not saved[name].put_back(tensor.data)
    if active.ranks is not None and leave is None:
        load_ranks(model, active.ranks, False)
