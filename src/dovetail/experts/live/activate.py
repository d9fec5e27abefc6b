"""Experts in live models: values are written into the tensors that are there, in place, and taken out again.

What a tensor holds afterwards, computed in its own dtype:

    initial value + value        of an adapter whose initial values are known (`Origin.initial` "chain", "peft")
    value                        of one whose values stand for themselves ("zero")
    what it held + value         of a fully fine-tuned model ("base"), at kept positions; nothing else is touched

A switch costs a decode and, where there are initial values, an addition. What is needed to undo it is kept: initial
values once a model, or the old values at an expert's positions.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import AppliedChain, applied
from dovetail.chains.layer.elastic import load_ranks, saved_ranks
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import DataError
from dovetail.experts.codec.codec import decode_masks, word_count
from dovetail.experts.expert import Expert
from dovetail.experts.live.names import check_scales, peft_adapter, slots
from dovetail.experts.live.origins import (
    adapter_file,
    base_tensors,
    check_fingerprint,
    check_origin,
    live_fingerprint,
    starts,
)
from dovetail.experts.live.undo import Kept, Places, Whole
from dovetail.experts.vectors import Origin, Spec, TaskVector, specs_of

Content = Expert | Mapping[str, Tensor]


@dataclass
class _Active:
    """What is in a model.

    content  an expert, or a task vector's tensors; shapes: by name
    starts   what its values were added to, by name
    saved    what undoing it puts back, by name
    ranks    "LAYER/PLACE" -> rank that elastic adapters ran at before
    record   of the chain that it was put on: a later one of the same text is another
    lost     others wrote over it
    """

    content: Content
    shapes: dict[str, tuple[int, ...]]
    origin: Origin
    starts: dict[str, Tensor]
    record: AppliedChain | None
    saved: dict[str, Kept] = field(default_factory=dict)
    ranks: dict[str, int] | None = None
    lost: bool = False


class _State:
    """What is remembered of a model, for as long as it lives."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: dict[str, _Active] = {}
        self.starts: tuple[str, dict[str, Tensor]] = ("", {})
        self.marks: list[tuple[int, int]] = []
        self.fingerprint = ""


_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def _state(model: nn.Module) -> _State:
    with _STATES_LOCK:
        return _STATES.setdefault(model, _State())


def activate(model: nn.Module, expert: Expert, *, verified: bool = False) -> None:
    """Puts an expert into a live model, in place of the one that is there: no tensor is replaced, none is made anew.

    model     under a chain, a stock peft model, or any model that has the expert's names (`slots.py`)
    verified  its blocks were checked since it was read, as a `Store` does; otherwise it is decoded twice
    errors    LoadError for a wrong base, chain, name or shape, and for changed bytes: before anything is written.
              Whatever else goes wrong, what was active before is put back
    """
    if not verified:
        verify(expert)
    dtypes = expert.dtypes
    _switch(model, expert, {name: Spec(shape, dtypes[name]) for name, shape in expert.shapes.items()}, expert.origin)


def put(model: nn.Module, vector: Mapping[str, Tensor], origin: Origin | None = None) -> None:
    """The same for a task vector that isn't compressed, or merged.

    vector  by name, any floats; made tensor by tensor where it is a `TaskVector` that does so. Kept, not copied, for
            as long as it is active
    origin  what it is of; None: as a `TaskVector` says, or else values that stand for themselves
    errors  as `activate`; DataError for NaN or infinity, in the live tensor's dtype too
    """
    if origin is None:
        origin = vector.origin if isinstance(vector, TaskVector) else Origin()
    _switch(model, vector, specs_of(vector), origin)


def deactivate(model: nn.Module) -> None:
    """Takes out what is active, bit for bit: base weights, and what an adapter's tensors held before the first
    activation; a chain's links get their initial values. Nothing happens where nothing is active."""
    state = _state(model)
    with state.lock, torch.no_grad():
        active = state.active.pop(_part(model), None)
        if active is not None:
            _undo(model, active)


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """What is put on the model meanwhile isn't remembered; who borrows it puts its tensors back (`Before`)."""
    state = _state(model)
    with state.lock:
        active = dict(state.active)
        try:
            yield
        finally:
            state.active = active


def verify(expert: Expert, *, threads: int | None = None) -> None:
    """LoadError unless every block has its CRC-32C and decodes. Costs less than decoding: two bits a value are written,
    each tensor over the one before.

    threads  None: torch's number of threads
    """
    most = max((word_count(coded.numel) for coded in expert.coded.values()), default=0)
    scratch = np.empty((2, most), np.uint64)
    for name, coded in expert.coded.items():
        decode_masks(coded, scratch, 0, name, threads or torch.get_num_threads())


def _part(model: nn.Module) -> str:
    """Which of the adapters that a model may carry, one after the other or beside each other, names mean now."""
    adapter = peft_adapter(model)
    if adapter is not None:
        return f"peft {adapter}"
    if chain_layers(model):
        record = applied(model)
        return f"chain {id(record)}, stage {record.stage}"  # `_Active` holds the record, so that no other has its id
    return ""


@torch.no_grad()
def _switch(model: nn.Module, content: Content, specs: Mapping[str, Spec], origin: Origin) -> None:
    shapes = {name: spec.shape for name, spec in specs.items()}
    state = _state(model)
    with state.lock:
        part, live = _part(model), slots(model, shapes, origin)
        expected = check_origin(model, origin, shapes)
        if isinstance(content, Expert):
            check_scales(content.scales, live)
        if expected is not None:
            check_fingerprint(_fingerprint(model, state, part), expected)
        record = applied(model) if part.startswith("chain") else None
        active = _Active(content, shapes, origin, _starts(model, state, origin, live), record)
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
        if record is not None:  # those of earlier chains and stages are merged, or gone
            state.active = {key: each for key, each in state.active.items() if not key.startswith("chain")}
        state.active[part] = active


def _fingerprint(model: nn.Module, state: _State, part: str) -> str:
    """Of the base, hashed once and again only when its tensors were replaced or changed, by others than this module
    (which writes past torch's version counters)."""
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


def _starts(model: nn.Module, state: _State, origin: Origin, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Initial values, made once for all experts that have the same."""
    if origin.initial not in ("chain", "peft"):
        return {}
    file = adapter_file(origin)
    kinds = [(name, str(t.dtype), str(t.device)) for name, t in live.items()]
    seed = None if file is None else file.seed
    key = json.dumps([_part(model), origin.initial, seed, origin.peft, kinds, state.fingerprint])
    if state.starts[0] != key:
        state.starts = (key, starts(model, origin, live))
    return state.starts[1]


def _carry_over(model: nn.Module, previous: _Active, active: _Active, live: Mapping[str, Tensor]) -> None:
    """Takes out of the model what `active` won't write over; for the rest, passes on what was saved."""
    if "base" in (previous.origin.initial, active.origin.initial):
        _undo(model, previous)
        return
    shared = {name: saved for name, saved in previous.saved.items() if name in live}
    _undo(model, previous, leave=shared)
    for name, saved in shared.items():
        active.saved[name] = Whole(saved.values.to(live[name].device, live[name].dtype))
    active.ranks = previous.ranks


def _write(model: nn.Module, active: _Active, live: Mapping[str, Tensor]) -> None:
    """Values into the model; what they replace goes to `active.saved`, unless it is there."""
    if active.origin.initial == "base":
        scales = active.content.scales if isinstance(active.content, Expert) else {}
        for name, tensor in live.items():
            _add(active, name, tensor.data, scales.get(name, 0.0))
        return
    for name, tensor in live.items():
        if active.origin.initial == "chain" and name in active.starts:
            active.saved[name] = Whole(active.starts[name])
        elif name not in active.saved:
            active.saved[name] = Whole(tensor.detach().clone())
    if isinstance(active.content, Expert):
        active.content.dense(into={name: tensor.data for name, tensor in live.items()})
    else:
        for name, tensor in live.items():
            tensor.data.copy_(_finite(name, active.content[name], tensor.dtype))
    for name, start in active.starts.items():
        live[name].data.add_(start)
    file = adapter_file(active.origin)
    if file is not None and file.ranks and not file.extracted:
        active.ranks = active.ranks or saved_ranks(model)[0]
        load_ranks(model, file.ranks, False)


def _add(active: _Active, name: str, tensor: Tensor, scale: float) -> None:
    """Adds values to a tensor where they aren't zero, having saved what was there."""
    flat = tensor.reshape(-1)  # a copy where it isn't contiguous
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
        raise DataError(f"task vector at {name}", found=f"NaN or infinity in {dtype}", rule="values are finite")
    return tensor


def _write_again(model: nn.Module, active: _Active) -> None:
    """After an interruption: undone first, whatever was of it, so that nothing is added twice."""
    _undo(model, active)
    active.lost = False
    _write(model, active, slots(model, active.shapes, active.origin))


def _undo(model: nn.Module, active: _Active, leave: Mapping[str, Kept] | None = None) -> None:
    """Puts back what was saved, except of names to leave."""
    saved = {name: each for name, each in active.saved.items() if name not in (leave or {})}
    shapes = {name: shape for name, shape in active.shapes.items() if name in saved}
    for name, tensor in (slots(model, shapes, active.origin) if saved else {}).items():
        active.lost |= not saved[name].put_back(tensor.data)
    if active.ranks is not None and leave is None:
        load_ranks(model, active.ranks, False)
