"""The layer that owns base and chain, and the definition of the effective weight.

    W', b' = fold of the chain's links over the base        `ChainLinear.effective_weight`

Forward, merge, footprint and packing all read that definition; what runs is the planner's fast path, equal to it.
Whatever layer it stands for (`models/layouts.py`), the chain sees a matrix (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.base import Base
from dovetail.chains.layer.execute import lists_gradient, materialise, run_closed, run_open, run_recomputed, run_step
from dovetail.chains.layer.operators import Numbered
from dovetail.chains.layer.planner import Path, choose_path, compose
from dovetail.chains.link import Adapter, Constraint, Link, OutputAdapter, Site
from dovetail.chains.terms import Form, Term
from dovetail.tasks.holding import Holder


class Shared:
    """Frozen tensors that all layers share (VeRA's projections), held once per device and dtype."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self._leading: dict[int, Shared] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors on that device, in that dtype."""
        if not self._tensors:
            return {}
        if (device, dtype) not in self._placed:
            with torch.inference_mode(False), torch.no_grad():
                self._placed[device, dtype] = {k: t.to(device, dtype) for k, t in self._tensors.items()}
        return self._placed[device, dtype]

    def leading(self, link: Adapter, rank: int) -> Shared:
        """Return the part that an elastic link uses at this rank: the same object each time, shared by its layers."""
        if not self._tensors:
            return self
        if rank not in self._leading:
            self._leading[rank] = Shared(link.at_rank(self._tensors, rank))
        return self._leading[rank]


class LinkState(nn.Module):
    """One link on one layer: its spec and its parameters.

    rank       of an elastic adapter, the rank that it runs at; None for every other link
    reference  the rank that it runs at unless told: the median of its ranks (SQFT §3.1), of two in the middle the lower
    running    the link that runs: the plain one of that rank, or the spec itself
    """

    def __init__(self, link: Link, site: Site, parameters: Mapping[str, Tensor], shared: Shared) -> None:
        super().__init__()
        self.link = link
        self.site = site
        self.shared = shared
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.reference = median_low(link.ranks) if isinstance(link, Adapter) and link.ranks else None
        self.use_rank(self.reference)

    def use_rank(self, rank: int | None) -> None:
        """Run an elastic adapter at this rank from now on."""
        self.rank = rank
        self.running = self.link if rank is None or not isinstance(self.link, Adapter) else self.link.plain(rank)

    def values(self) -> dict[str, Tensor]:
        """Name -> tensor: the trainable parameters and this layer's part of the shared constants, at its rank."""
        return self._at(self.rank)

    def terms(self, *, whole: bool = False) -> list[Term]:
        """Return what it does to the weight as terms of the planner's algebra; `whole`: at its full rank."""
        link, rank = (self.link, None) if whole else (self.running, self.rank)
        return link.lower(self._at(rank)) if isinstance(link, Adapter) else []

    def _at(self, rank: int | None) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {name: p for name, p in self._parameters.items() if p is not None}
        if not isinstance(self.link, Adapter) or not own:
            return own
        some = next(iter(own.values()))
        shared = self.shared.on(some.device, some.dtype)
        if rank is not None:
            # Contiguous as the parameters of a plain adapter are: what is extracted then gives the same bits.
            own = {name: t.contiguous() for name, t in self.link.at_rank(own, rank).items()}
            shared = self.link.at_rank(shared, rank)
        return {**own, **self.link.local(shared, self.site)}

    def extracted(self) -> LinkState:
        """Return the running sub-adapter as a plain link with its own parameters; itself where it is not elastic."""
        if self.rank is None:
            return self
        assert isinstance(self.link, Adapter)
        mine = {name: value.detach().clone() for name, value in self.values().items() if name in self._parameters}
        plain = LinkState(self.running, self.site, mine, self.shared.leading(self.link, self.rank))
        trained = all(p.requires_grad for p in self.parameters())
        return plain.requires_grad_(trained).train(self.training)

    def extra_repr(self) -> str:
        return str(self.link)


@dataclass(frozen=True)
class NoWeight:
    """What a model may ask of the weight of a quantized layer, which is no tensor: HunYuan casts to its dtype.

    dtype   that the codes are dequantized to
    """

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, int]
    ndim = 2

    @property
    def is_meta(self) -> bool:
        """Whether it has no values."""
        return self.device.type == "meta"


class ChainLinear(Numbered, Holder):
    """A layer whose weight is a base plus a chain of links.

    base     dense or quantized weight (`chains/layer/base.py`), frozen
    bias     (o,) frozen, or None
    links    the differentiable links of the current stage, in order
    record   what the model remembers of its chain (`dovetail.chains.layer.applied`), the same object in every layer
    """

    def __init__(self, site: Site, base: Base, bias: Tensor | None, record: object = None) -> None:
        super().__init__()
        self.record = record
        self.site = site
        self.layout = base.layout
        self.in_features, self.out_features = site.in_features, site.out_features
        self.nf = site.out_features  # what transformers' Conv1D calls it
        self.base = base
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.links = nn.ModuleList()
        self._held: tuple[Tensor, Tensor | None] | None = None
        self.set_links([])

    @property
    def weight(self) -> Tensor | NoWeight:
        """The frozen dense weight in the layer's own layout; of a quantized one what a model may ask of it."""
        if self.base.dense is not None:
            return self.base.dense
        assert self.base.quantized is not None
        return NoWeight(self.base.dtype, self.base.quantized.codes.device, self.base.shape)

    def set_links(self, states: Iterable[LinkState], path: Path | None = None) -> None:
        """Put a stage's links on the layer and choose how they run, elastic ones at their full rank.

        states  the links with their parameters; sorted by kind here, not in every forward pass
        path    how they run, where it is chosen already
        """
        self.states = list(states)
        self.links = nn.ModuleList(self.states)
        self.adapters = [
            s for s in self.states if isinstance(s.link, Adapter) and not isinstance(s.link, OutputAdapter)
        ]
        self.constraints = [s.link for s in self.states if isinstance(s.link, Constraint)]
        self._on_output: list[tuple[OutputAdapter, LinkState]] = [
            (s.link, s) for s in self.states if isinstance(s.link, OutputAdapter)
        ]
        # Whether the chain starts from the quantized weight rather than from the one before quantizing.
        self.from_codes = all(constraint.from_codes for constraint in self.constraints)
        closes = [s.link.kind == "constraint" for s in self.states if not isinstance(s.link, OutputAdapter)]
        # A moved grid has its own numbers, rounded as they are stored: the weight is that of the definition.
        moves = any(s.link.moves is not None for s in self.states if isinstance(s.link, Adapter))
        self.path: Path = path or ("recomputed" if moves else choose_path(closes, self._terms(whole=True), self.layout))
        self.base.forget()

    @property
    def keeps(self) -> bool:
        """Whether the weight can be kept between forward and backward passes (`Base.keep`)."""
        return self.path == "closed" and lists_gradient(self.constraints)

    def key(self, dtype: torch.dtype) -> Hashable:
        """Return what the weight of a closed chain is made from, by identity and version; None: it is not kept.

        The identity is that of the storage too, which `parameter.data = other` replaces without another version. A weak
        reference holds it, as ids and addresses of tensors that are gone are used again.
        """
        if self.base.kept is None or self.base.kept.dtype != dtype or not self.keeps:
            return None
        parameters = self.parameters_of_weight()
        if any(parameter.is_inference() for parameter in parameters):
            return None  # these have no version
        found = tuple((id(p), p._version, StorageWeakRef(p.untyped_storage()), p.data_ptr()) for p in parameters)
        return found, tuple(state.rank for state in self.adapters)

    def extract(self) -> None:
        """Replace elastic adapters, in place, by plain ones of their current ranks; W' is unchanged bit for bit."""
        self.set_links([state.extracted() for state in self.states], self.path)

    def effective_weight(self) -> tuple[Tensor, Tensor | None]:
        """Return the definition (W', b') of the whole chain by ordinary autograd: (o, i) and (o,), in the base's dtype.

        Computed in float32 (float64 for a float64 base), also where the model was cast after `apply`, and rounded once.
        """
        weight, bias = self._fold()
        return weight.to(self.base.dtype), None if bias is None else bias.to(self.base.dtype)

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        wide = adapter_dtype(self.base.dtype)
        weight = self.base.start_weight(self.from_codes, wide).to(wide)
        if self.base.dense is None:
            weight = weight.clone()  # out of the shared buffer
        bias: Tensor | None = self.bias
        for state in self.states:
            link = state.running
            if isinstance(link, Constraint):
                weight = link.project(weight, self.base)
            elif isinstance(link, Adapter) and not isinstance(link, OutputAdapter):
                values = {name: value.to(wide) for name, value in state.values().items()}
                weight, bias = link.fold(weight, bias, values)
                if link.moves is not None:
                    weight = _Stored.apply(weight, self._moved(link, values))
        return weight, bias

    @torch.no_grad()
    def _moved(self, link: Adapter, values: Mapping[str, Tensor]) -> QuantizedWeight:
        assert self.base.quantized is not None
        change = link.grid_change(values).detach().reshape(-1)
        if link.moves == "scales":
            return self.base.quantized.moved(factor_b=change)
        return self.base.quantized.moved(offset_b=change)

    def grid(self) -> QuantizedWeight | None:
        """Return the base's codes on the grid that they merge on: the base's, or as a link moved it."""
        for state in self.adapters:
            if isinstance(state.running, Adapter) and state.running.moves is not None:
                wide = adapter_dtype(self.base.dtype)
                values = {name: value.to(wide) for name, value in state.values().items()}
                return self._moved(state.running, values)
        return self.base.quantized

    def parameters_of_weight(self) -> list[Tensor]:
        """Return the parameters that W' and b' are made from."""
        return [parameter for state in self.adapters for parameter in state.parameters()]

    def native_fold(self) -> tuple[Tensor, Tensor | None]:
        """Return (W' in the layer's own layout, b') by the links' definitions, in ordinary autograd."""
        weight, bias = self._fold()
        return self.layout.native(weight.to(self.base.dtype)), bias

    def form(self) -> Form:
        """Return the chain's adapters as one form of the planner's algebra."""
        return compose(self._terms(), self.base, self.bias, self.training, self.from_codes)

    def _terms(self, *, whole: bool = False) -> list[Term]:
        return [term for state in self.adapters for term in state.terms(whole=whole)]

    @torch.no_grad()
    def frozen_weight(self) -> tuple[Tensor, Tensor | None]:
        """(W', b') as the forward pass uses them: W' in the layer's own layout, a new tensor; what merging stores."""
        if self.path == "closed":
            form = self.form()
            bias = None if form.bias_o is None else form.bias_o.to(self.base.dtype)
            return materialise(form, self.base, self.constraints, self.from_codes, self.base.dtype).clone(), bias
        weight, bias = self.native_fold()
        return weight.to(self.base.dtype).clone(), None if bias is None else bias.to(self.base.dtype)

    @torch.no_grad()
    def used_weight(self, frozen: Tensor | None = None) -> Tensor:
        """W' (o, i) as the forward pass uses it, unrounded where it never makes it: float32 on the open path.

        frozen  what `frozen_weight` returned, where it is at hand
        """
        if self.path == "open" and self.adapters:
            return self._fold()[0]
        return self.layout.matrix(self.frozen_weight()[0] if frozen is None else frozen)

    @torch.no_grad()
    def absorb(self, weight: Tensor, bias: Tensor | None) -> None:
        """Merge the current stage into the base: a dense base stays dense, a quantized one stays on its grid.

        weight, bias  what `frozen_weight` returned, or a projection of that weight
        """
        matrix = self.layout.matrix(weight)
        if self.base.quantized is not None:
            grid = self.grid()
            assert grid is not None
            self.base.set_quantized(grid.encode(matrix) if grid is self.base.quantized else grid)
        else:
            self.base.set_dense(matrix)
        self.base.start = None
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.set_links([])

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), as the layer it stands for; under autocast in autocast's dtype."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return self._forward(x)
        return self._forward(x)

    @property
    def held_nbytes(self) -> int:
        if (self.path == "open" and self.base.quantized is None) or self.key(self.base.dtype) is not None:
            return 0
        return math.prod(self.base.shape) * self.base.dtype.itemsize

    @torch.no_grad()
    def hold(self) -> None:
        if self.path == "open":
            self.base.hold()
        else:
            self._held = self.frozen_weight()

    def release(self) -> None:
        self._held = None
        self.base.release()

    def _forward(self, x: Tensor) -> Tensor:
        if self._held is not None and x.dtype == self.base.dtype:
            y = self.layout.call(x, *self._held)
        elif self.path == "open":
            form = self.form()
            stepping = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            y = run_step(x, form, self.base) if stepping else None
            if y is None:
                y = run_open(x, form, self.base)
        elif self.path == "closed":
            y = run_closed(x, self.form(), self)
        else:
            y = run_recomputed(x, self)
        for link, state in self._on_output:
            axis = self.layout.out_axis
            y = link.output(y.movedim(axis, -1), state.values()).movedim(-1, axis)
        return y

    def extra_repr(self) -> str:
        return f"{self.site.name}, {self.out_features} x {self.in_features}, path={self.path}"


class _Stored(torch.autograd.Function):
    """The weight of a moved grid in the place of the weight that its link computes; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight_oi: Tensor, grid: QuantizedWeight) -> Tensor:
        return grid.dequantize(torch.empty_like(weight_oi, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def chain_layers(model: nn.Module) -> dict[str, ChainLinear]:
    """Return module path -> layer for every layer of the model that carries a chain, each once.

    Where none carries one, they are the packed layers (merged, or kept on the grid of a file). Packed layers beside
    the targets of a chain are not returned: `packed_layers` returns them.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ChainLinear)}
    return {name: layer for name, layer in layers.items() if layer.record is not None} or layers


def packed_layers(model: nn.Module) -> dict[str, ChainLinear]:
    """Return module path -> layer for every layer that runs from its base without a chain, each once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ChainLinear)}
    return {name: layer for name, layer in layers.items() if layer.record is None}


def adapter_dtype(base_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of adapters over a base: float32 over half precision, float64 over float64."""
    return torch.promote_types(base_dtype, torch.float32)
