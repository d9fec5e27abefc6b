"""MoE experts that a model keeps in three-dimensional parameters, opened to one linear layer per expert and back.

transformers 5 stores the experts of a layer as `gate_up_proj` (E, 2 m, h) and `down_proj` (E, h, m), or transposed
(gpt-oss, Llama 4), and runs them by one of several implementations (`config._experts_implementation`). An opened module
holds the same numbers as E linear layers under the parameter's name, `experts.gate_up_proj.3`, each a view of the
three-dimensional parameter. It computes what the stock module computes, in the order of operations of transformers'
"eager" or "grouped_mm" implementation, so that outputs are equal bit for bit before and after a merge. `close` writes
the matrices back into a stock module.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dovetail.errors import DataError
from dovetail.models.layouts import Layout, LinearLayout, TransposedLayout

_UP, _GATED, _DOWN = "up_proj", "gate_up_proj", "down_proj"


class Experts(nn.Module, ABC):
    """The experts of one MoE layer as linear layers; biases and norms stay beside them, under the stock names.

    stock        the stock module it stands for, with parameters without storage
    num_experts  E
    """

    transposed: bool
    """Whether a matrix is stored as (in, out)."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        shell = copy.copy(stock)
        shell._parameters = {
            name: None if p is None else nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for name, p in stock._parameters.items()
        }
        self._stock = (shell,)  # in a tuple, so that it is no submodule
        self._rows: tuple[Tensor, ...] | None = None
        self.transposed = self.is_transposed(stock)
        for name, child in stock.named_children():
            self.add_module(name, child)
        self.num_experts = 0
        for name, parameter in stock.named_parameters(recurse=False):
            if parameter.ndim == 3:
                self.num_experts = len(parameter)
                layers = nn.ModuleList(map(self._layer, parameter.detach().unbind(0)))
                self.add_module(name, layers.requires_grad_(parameter.requires_grad))
            else:
                self.register_parameter(name, parameter)
        self.train(stock.training)

    @staticmethod
    @abstractmethod
    def fits(stock: nn.Module) -> bool:
        """Return whether this class computes what the stock module computes."""

    @staticmethod
    @abstractmethod
    def is_transposed(stock: nn.Module) -> bool:
        """Return whether the stock module stores a matrix as (in, out)."""

    @property
    def stock(self) -> Any:
        return self._stock[0]

    def matrices(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the experts' layers by their names in this module, such as "gate_up_proj.3"."""
        for name, child in self.named_children():
            if isinstance(child, nn.ModuleList) and name in self.stock._parameters:
                yield from ((f"{name}.{number}", layer) for number, layer in enumerate(child))

    def counted(self, name: str, padding: Tensor | None) -> Tensor | None:
        """Return which rows of an expert's current input count for its calibration; None: all of them.

        name     of the layer, as in `matrices`; asked while the layer is called
        padding  (b, t) bool, False where a token is padding; None where none is
        returns  (n,) bool
        """
        if self._rows is None or padding is None:
            return None
        return padding.flatten()[self._rows[int(name.rpartition(".")[2])]]

    def close(self) -> nn.Module:
        """Return a stock module with the matrices of the experts, all of which must be stock layers."""
        stock = copy.copy(self.stock)
        stock._parameters = dict(self._parameters)
        stock._modules = {name: child for name, child in self._modules.items() if name not in self.stock._parameters}
        for name in self.stock._parameters:
            if name not in stock._parameters:
                weights: list[Tensor] = [layer.get_parameter("weight") for layer in self._each(name)]
                trained = any(weight.requires_grad for weight in weights)
                with torch.no_grad():
                    stock._parameters[name] = nn.Parameter(torch.stack(weights), trained)
        stock._parameters = {name: stock._parameters[name] for name in self.stock._parameters}
        return stock.train(self.training)

    def _layer(self, weight: Tensor) -> nn.Module:
        out_features, in_features = reversed(weight.shape) if self.transposed else weight.shape
        layout: Layout = (TransposedLayout if self.transposed else LinearLayout)(out_features, in_features)
        return layout.build(weight, None)

    def _each(self, name: str) -> nn.ModuleList:
        found = self.get_submodule(name)
        assert isinstance(found, nn.ModuleList)
        return found

    def _counts(self, expert_n: Tensor) -> list[int]:
        """Return the number of rows of each expert; tensors without values are spread evenly.

        expert_n  (n,) the expert of each row, sorted
        """
        experts, n = self.num_experts, len(expert_n)
        if expert_n.is_meta or isinstance(expert_n, FakeTensor):
            return [n // experts + (number < n % experts) for number in range(experts)]
        return torch.bincount(expert_n, minlength=experts).tolist()


class RoutedExperts(Experts):
    """Experts of transformers' `use_experts_implementation`: each gets the tokens that were routed to it."""

    @staticmethod
    def fits(stock: nn.Module) -> bool:
        known = {_GATED, _UP, _DOWN, f"{_GATED}_bias", f"{_UP}_bias", f"{_DOWN}_bias"}
        # What transformers' decorator puts on an instance.
        decorated = {"has_gate", "has_bias", "is_transposed", "has_post_expert_norm"} <= vars(stock).keys()
        plain = all(p is None or p.dtype.is_floating_point for p in stock._parameters.values())
        return decorated and plain and stock._parameters.keys() <= known and not stock._buffers

    @staticmethod
    def is_transposed(stock: Any) -> bool:
        return bool(stock.is_transposed)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts: hidden_states (n, h), top_k_index and top_k_weights (n, k) -> (n, h)."""
        try:
            if self.stock.config._experts_implementation == "eager":
                return self._eager(hidden_states, top_k_index, top_k_weights)
            return self._grouped(hidden_states, top_k_index, top_k_weights)
        finally:
            self._rows = None

    def _grouped(self, hidden_nh: Tensor, index_nk: Tensor, weight_nk: Tensor) -> Tensor:
        n, k = index_nk.shape
        expert, order = torch.sort(index_nk.reshape(-1))
        counts = self._counts(expert)
        self._rows = (order // k).split(counts)
        inner = self._products(self._up, hidden_nh[order // k], expert, counts)
        outer = self._products(_DOWN, self._activated(inner), expert, counts)
        weighted = self._normed(outer) * weight_nk.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return weighted[inverse].view(n, k, -1).sum(dim=1).to(hidden_nh.dtype)

    def _eager(self, hidden_nh: Tensor, index_nk: Tensor, weight_nk: Tensor) -> Tensor:
        n = len(index_nk)
        expert, order = torch.sort(index_nk.t().reshape(-1), stable=True)
        counts = self._counts(expert)[: self.num_experts]  # without rows that no expert gets
        orders = order[: sum(counts)].split(counts)
        self._rows = tuple(each % n for each in orders)
        weight, out_nh = weight_nk.t().reshape(-1), torch.zeros_like(hidden_nh)
        for number, (tokens, each) in enumerate(zip(self._rows, orders, strict=True)):
            if len(tokens):
                inner = self._product(self._up, number, hidden_nh[tokens])
                outer = self._normed(self._product(_DOWN, number, self._activated(inner)))
                out_nh.index_add_(0, tokens, (outer * weight[each, None]).to(out_nh.dtype))
        return out_nh

    @property
    def _up(self) -> str:
        return _GATED if self.stock.has_gate else _UP

    def _product(self, name: str, number: int, x: Tensor) -> Tensor:
        y = self._each(name)[number](x)
        return y + self.get_parameter(f"{name}_bias")[number] if self.stock.has_bias else y

    def _products(self, name: str, x: Tensor, expert: Tensor, counts: list[int]) -> Tensor:
        layers = self._each(name)
        y = torch.cat([layers[number](part) for number, part in enumerate(x.split(counts)) if len(part)])
        return y + self.get_parameter(f"{name}_bias")[expert] if self.stock.has_bias else y

    def _activated(self, y: Tensor) -> Tensor:
        return self.stock._apply_gate(y) if self.stock.has_gate else self.stock.act_fn(y)

    def _normed(self, y: Tensor) -> Tensor:
        return self.get_submodule("post_expert_norm")(y) if self.stock.has_post_expert_norm else y


class Llama4Experts(Experts):
    """Llama 4's experts: each gets every token, scaled by its score, which is 0 for a token of another expert."""

    @staticmethod
    def fits(stock: nn.Module) -> bool:
        return type(stock).__name__ == "Llama4TextExperts"

    @staticmethod
    def is_transposed(stock: nn.Module) -> bool:
        return True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the experts: hidden_states (E · n, h), first the n tokens as the first expert gets them -> (E · n, h)."""
        x_enh = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        self._rows = x_enh.detach().ne(0).any(-1).unbind(0)
        parts = []
        for x_nh, up, down in zip(x_enh, self._each(_GATED), self._each(_DOWN), strict=True):
            gate, y = up(x_nh).chunk(2, dim=-1)
            parts.append(down(y * self.stock.act_fn(gate)))
        self._rows = None
        return torch.cat(parts)

    def counted(self, name: str, padding: Tensor | None) -> Tensor | None:
        if self._rows is None:
            return None
        routed = self._rows[int(name.rpartition(".")[2])]
        return routed if padding is None else routed & padding.flatten()


class SortedExperts(Experts):
    """JetMoE's experts: one matrix each, called with rows sorted by expert and the number of rows of each."""

    @staticmethod
    def fits(stock: nn.Module) -> bool:
        return type(stock).__name__ == "JetMoeParallelExperts"

    @staticmethod
    def is_transposed(stock: nn.Module) -> bool:
        return False

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """Run the experts: inputs (n, i), expert_size the rows of each expert -> (n, o)."""
        parts = zip(self._each("weight"), inputs.split(expert_size), strict=True)
        return torch.cat([layer(part) for layer, part in parts if len(part)])

    def counted(self, name: str, padding: Tensor | None) -> Tensor | None:
        if padding is not None:
            raise DataError(
                f"calibration of {name} in {type(self.stock).__name__}",
                found="a batch with padding",
                rule="these experts get rows without their positions, so padding cannot be left out",
                fix="calibrate on batches without padding, or leave the experts out of the targets",
            )
        return None


_KINDS: tuple[type[Experts], ...] = (RoutedExperts, Llama4Experts, SortedExperts)


def can_open(stock: nn.Module) -> bool:
    """Return whether a module is a stock experts module of a known form."""
    return any(kind.fits(stock) for kind in _KINDS)


def opened(stock: nn.Module) -> Experts | None:
    """Return the opened form of a stock experts module, with views of its parameters; None for any other module."""
    kind = next((kind for kind in _KINDS if kind.fits(stock)), None)
    return None if kind is None else kind(stock)


def expert_layers(model: nn.Module) -> dict[str, tuple[Experts, str]]:
    """Return path of an expert's layer in a model with opened experts -> its `Experts`, and its name in there."""
    return {
        f"{path}.{name}".removeprefix("."): (module, name)
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.matrices()
    }


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """While entered, run the experts of a model in transformers' "eager" implementation, which any device computes.

    Opened and stock experts then use the same operations, so that their outputs can be compared bit for bit.
    """
    modules = [module.stock if isinstance(module, Experts) else module for module in model.modules()]
    configs: dict[int, Any] = {id(each.config): each.config for each in modules if RoutedExperts.fits(each)}
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
