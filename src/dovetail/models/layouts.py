"""Layers that a chain can sit on, each seen as a matrix (out, in): how to view its weight, call it and build it again.

A chain uses `weight_oi` only. This module contains what differs between `nn.Linear`, GPT-2's `Conv1D` (stored in x
out), an expert stored so (`TransposedLinear`) and convolutions (kernel flattened into `in`). `call` runs the layer's
own operation on a weight in its own layout, so a merged layer gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dovetail.errors import TargetError


@dataclass(frozen=True)
class Layout(ABC):
    """How one layer stores and uses its weight."""

    out_features: int
    in_features: int

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """Return a view (o, i) of a weight in the layer's own layout."""

    @abstractmethod
    def native(self, weight_oi: Tensor) -> Tensor:
        """Return a matrix (o, i) as a contiguous weight in the layer's own layout; a view where possible."""

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized weight in the layer's own layout."""
        return self.native(torch.empty(self.out_features, self.in_features, dtype=dtype, device=device))

    @abstractmethod
    def call(self, x: Tensor, weight: Tensor, bias_o: Tensor | None) -> Tensor:
        """Run the layer's own forward on a weight in its own layout."""

    @abstractmethod
    def build(self, weight: Tensor, bias_o: Tensor | None) -> nn.Module:
        """Return a stock module with this weight (in its own layout, not copied) and bias."""

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the vectors (n, i) that the rows of the matrix are multiplied with when the layer is called with x."""
        return x.reshape(-1, self.in_features)

    linear: bool = True
    """y = x Wᵀ + b over the last axis; False for convolutions."""

    @property
    def out_axis(self) -> int:
        """The axis of the layer's output that has out_features entries."""
        return -1


@dataclass(frozen=True)
class LinearLayout(Layout):
    """nn.Linear: weight (o, i). kind: the class itself, or one derived from it that computes the same."""

    kind: type[nn.Linear] = nn.Linear

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def native(self, weight_oi: Tensor) -> Tensor:
        return weight_oi.contiguous()

    def call(self, x: Tensor, weight: Tensor, bias_o: Tensor | None) -> Tensor:
        fixed = weight.is_inference() and not torch.is_inference_mode_enabled()  # it can take no gradient
        if x.ndim > 2 and not x.is_contiguous() and not weight.requires_grad and not fixed:
            # Of an x that cannot be flattened without a copy, torch makes one product or several, which differ in the
            # last digits, by whether the weight takes a gradient. That of a stock layer does.
            weight = weight.detach().requires_grad_()
        return functional.linear(x, weight, bias_o)

    def build(self, weight: Tensor, bias_o: Tensor | None) -> nn.Module:
        module = nn.Linear(self.in_features, self.out_features, bias=bias_o is not None, device="meta")
        module.__class__ = self.kind
        return _fill(module, weight, bias_o)


@dataclass(frozen=True)
class _InOutLayout(Layout):
    """A weight that is stored as (i, o)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def native(self, weight_oi: Tensor) -> Tensor:
        return weight_oi.t().contiguous()

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(self.in_features, self.out_features, dtype=dtype, device=device)


@dataclass(frozen=True)
class Conv1DLayout(_InOutLayout):
    """transformers' Conv1D (GPT-2): weight (i, o)."""

    def call(self, x: Tensor, weight: Tensor, bias_o: Tensor | None) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = flat @ weight if bias_o is None else torch.addmm(bias_o, flat, weight)
        return y.view(*x.shape[:-1], self.out_features)

    def build(self, weight: Tensor, bias_o: Tensor | None) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            module = Conv1D(self.out_features, self.in_features)
        if bias_o is None:  # Conv1D always has a bias
            bias_o = weight.new_zeros(self.out_features)
        return _fill(module, weight, bias_o)


class TransposedLinear(nn.Module):
    """A linear layer without bias whose weight is (i, o), as gpt-oss and Llama 4 store one expert's matrix."""

    def __init__(self, weight_io: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = weight_io.shape
        self.weight = nn.Parameter(weight_io)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., i) -> (..., o)."""
        return x @ self.weight


@dataclass(frozen=True)
class TransposedLayout(_InOutLayout):
    """`TransposedLinear`: weight (i, o), no bias."""

    def call(self, x: Tensor, weight: Tensor, bias_o: Tensor | None) -> Tensor:
        return x @ weight if bias_o is None else x @ weight + bias_o

    def build(self, weight: Tensor, bias_o: Tensor | None) -> nn.Module:
        assert bias_o is None, "the bias of an expert is no part of its layer"
        return TransposedLinear(weight)


@dataclass(frozen=True)
class ConvLayout(Layout):
    """nn.Conv1d and nn.Conv2d: weight (o, i / groups, *kernel), flattened after the first axis."""

    linear: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def out_axis(self) -> int:
        return -1 - len(self.kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def native(self, weight_oi: Tensor) -> Tensor:
        return weight_oi.contiguous().view(self.out_features, -1, *self.kernel)

    def call(self, x: Tensor, weight: Tensor, bias_o: Tensor | None) -> Tensor:
        conv = functional.conv1d if len(self.kernel) == 1 else functional.conv2d
        return conv(x, weight, bias_o, self.stride, self.padding, self.dilation, self.groups)

    def input_rows(self, x: Tensor) -> Tensor:
        """Return the windows that the kernel is applied to, (b · positions · groups, i).

        An output channel belongs to one of the groups; the windows of all groups are given together.
        """
        if isinstance(self.padding, str):
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            sides = [(n // 2, n - n // 2) if self.padding == "same" else (0, 0) for n in total]
        else:
            sides = [(p, p) for p in self.padding]
        if x.dim() == len(self.kernel) + 1:
            x = x[None]
        x = nn.functional.pad(x, [n for side in reversed(sides) for n in side])
        kernel, stride, dilation = self.kernel, self.stride, self.dilation
        if len(kernel) == 1:
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        columns = nn.functional.unfold(x, kernel, dilation=dilation, stride=stride)  # (b, c·k, positions)
        return columns.unflatten(1, (self.groups, -1)).movedim(2, 3).flatten(0, 2)

    def build(self, weight: Tensor, bias_o: Tensor | None) -> nn.Module:
        conv: Any = nn.Conv1d if len(self.kernel) == 1 else nn.Conv2d
        channels = weight.shape[1] * self.groups
        module = conv(
            channels,
            self.out_features,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,  # type: ignore[arg-type]
            bias=bias_o is not None,
            device="meta",
        )
        return _fill(module, weight, bias_o)


def layout_of(name: str, module: nn.Module) -> Layout:
    """Return the layout of a layer; raise TargetError for a layer of another class.

    Its weight must be a plain parameter: other libraries' quantized layers are subclasses of nn.Linear that use theirs
    otherwise.
    """
    if isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter and is_plain(type(module)):
        return LinearLayout(module.out_features, module.in_features, kind=type(module))
    if type(module) is TransposedLinear:
        return TransposedLayout(module.out_features, module.in_features)
    from transformers.pytorch_utils import Conv1D

    if type(module) is Conv1D:
        in_features, out_features = module.weight.shape
        return Conv1DLayout(out_features, in_features)
    if type(module) in (nn.Conv1d, nn.Conv2d):
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        if module.padding_mode != "zeros":
            found, rule = f"padding_mode={module.padding_mode!r}", "a convolution under a chain must pad with zeros"
            raise TargetError(name, found=found, rule=rule, fix="leave this layer out of the targets")
        out_features = module.out_channels
        return ConvLayout(
            out_features,
            module.weight[0].numel(),
            False,
            tuple(module.kernel_size),
            tuple(module.stride),
            module.padding if isinstance(module.padding, str) else tuple(module.padding),
            tuple(module.dilation),
            module.groups,
        )
    raise TargetError(
        name,
        found=f"a {type(module).__module__}.{type(module).__qualname__}",
        rule="a layer under a chain must be nn.Linear, transformers' Conv1D, nn.Conv1d or nn.Conv2d",
        fix="leave this layer out of the targets, or load the model without other quantization or adapters",
    )


def is_plain(cls: type[nn.Linear]) -> bool:
    """Return whether a linear layer computes x Wᵀ + b: its forward is nn.Linear's or Falcon's equal one."""
    return cls.forward is nn.Linear.forward or cls.__name__ == "FalconLinear"


def _fill(module: nn.Module, weight: Tensor, bias_o: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight)
    if bias_o is not None:
        module.bias = nn.Parameter(bias_o)
    return module
