"""The layers of a published checkpoint that the quantized layers of a model are; of MoE experts, rows of a matrix.

A published checkpoint has a linear layer for each matrix of an expert ("mlp.experts.3.gate_proj"). transformers 5 loads
them into three-dimensional parameters ("mlp.experts.gate_up_proj"), as `transformers.conversion_mapping` says for each
family, and saves them again by the reverse. The reverse is run here on numbers of rows: what becomes of them says which
rows of which expert a layer of the checkpoint is, without a table of families.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.held import grids
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import ExportError
from dovetail.models.experts import Experts, opened
from dovetail.models.layouts import layout_of
from dovetail.models.targets import routers


@dataclass(frozen=True)
class Part:
    """What a layer of the checkpoint is in the model.

    layer    path of the layer, as targets name it: "model.layers.0.mlp.experts.gate_up_proj.3"
    rows     its rows that the layer of the checkpoint has
    experts  path of the module of MoE experts that the layer belongs to; None for any other layer
    """

    layer: str
    rows: range
    experts: str | None = None


def quantized_paths(model: nn.Module) -> set[str]:
    """Return the paths of the layers of a merged model, packed or stock, that are on a grid."""
    packed = {name for name, layer in chain_layers(model).items() if layer.base.quantized is not None}
    return packed | grids(model).keys()


def quantized_experts(model: nn.Module) -> dict[str, Experts]:
    """Return path -> opened form of the modules of MoE experts that have a quantized layer."""
    modules, found = dict(model.named_modules()), {}
    for name in sorted(quantized_paths(model)):
        path = name.rsplit(".", 2)[0] if name.count(".") > 1 else ""
        if path in modules and path not in found:
            module = modules[path]
            experts = module if isinstance(module, Experts) else opened(module)
            if experts is not None:
                found[path] = experts
    return found


def published_parts(model: nn.Module) -> dict[str, Part]:
    """Return path in the checkpoint -> its part of the model, of the quantized layers of a merged model.

    Without quantized MoE experts, each layer is itself.

    Raises ExportError where only some of the matrices of a module of experts are quantized, and for experts that the
    checkpoint of their family does not keep as rows of linear layers.
    """
    paths, modules = quantized_paths(model), quantized_experts(model)
    for path, module in model.named_modules():
        if isinstance(module, Experts) and path not in modules:
            rule = "packed experts must be on a grid"
            raise ExportError(
                f"export of {path}", found="experts without a grid", rule=rule, fix="merge with packed=False"
            )
    if not modules:
        shapes = _shapes(model, paths)
        return {name: Part(name, range(rows)) for name, rows in shapes.items()}
    owners = {f"{path}.{name}": path for path, experts in modules.items() for name, _ in experts.matrices()}
    if missing := sorted(owners.keys() - paths):
        rule = "all matrices of the experts of a module must be on a grid, or none"
        raise _refused(missing[0], f"{len(missing)} matrices of experts without a grid", rule)
    numbers, probes = _Numbers(), dict[str, Tensor]()
    for name, rows in _shapes(model, paths - owners.keys()).items():
        probes[f"{name}.weight"] = numbers.of([name], rows)[0]
    for path, experts in modules.items():
        if experts.transposed:
            found = f"experts of {type(experts.stock).__name__}, stored as (in, out)"
            raise _refused(path, found, "the matrices of experts must be stored as (out, in)")
        matrices: dict[str, list[str]] = {}
        for name, _ in experts.matrices():
            matrices.setdefault(name.rpartition(".")[0], []).append(f"{path}.{name}")
        for name, layers in matrices.items():
            probes[f"{path}.{name}"] = numbers.of(layers, experts.stock._parameters[name].shape[1])
    found = {name: numbers.part(name, probe, owners) for name, probe in published(model, probes).items()}
    return {name.removesuffix(".weight"): part for name, part in found.items()}


def published(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names of the checkpoint, as `save_pretrained` names and cuts them."""
    from transformers.core_model_loading import revert_weight_conversion

    run: Any = model
    return revert_weight_conversion(run, dict(tensors))


def published_paths(model: nn.Module, paths: Collection[str]) -> list[str]:
    """Return the paths that linear layers and routers have in the checkpoint."""
    probes = {f"{path}.weight": torch.zeros(1, 1, device="cpu") for path in paths}
    return [name.removesuffix(".weight") for name in published(model, probes)]


def router_paths(model: nn.Module) -> list[str]:
    """Return the paths of the modules that choose experts by a matrix, which engines take for linear layers."""
    found = []
    for path in routers(model):
        weight = dict(model.get_submodule(path).named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 2:
            found.append(path)
    return found


class _Numbers:
    """Matrices (rows, 2) that hold their rows' numbers, all different."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.starts: list[int] = []
        self.end = 0

    def of(self, layers: list[str], rows: int) -> Tensor:
        """Return the matrices of these layers, int64 (layers, rows, 2)."""
        for layer in layers:
            self.layers.append(layer)
            self.starts.append(self.end)
            self.end += rows
        start = self.end - rows * len(layers)
        return torch.arange(2 * start, 2 * self.end, device="cpu").view(len(layers), rows, 2)

    def part(self, name: str, found: Tensor, owners: Mapping[str, str]) -> Part:
        """Return what a tensor of the checkpoint is. Raises ExportError where it is not rows of one matrix."""
        first = int(found.flatten()[0]) // 2
        at = bisect_right(self.starts, first) - 1
        layer, start = self.layers[at], self.starts[at]
        end = self.starts[at + 1] if at + 1 < len(self.starts) else self.end
        rows = range(first - start, first - start + found.shape[0])
        expected = torch.arange(2 * first, 2 * (first + len(rows)), device="cpu").view(-1, 2)
        if not torch.equal(found, expected) or start + rows.stop > end or not name.endswith(".weight"):
            shown = f"{name}, a tensor of {list(found.shape[:-1])} rows"
            raise _refused(
                layer, shown, "a checkpoint of the family must keep an expert as linear layers of whole rows"
            )
        return Part(layer, rows, owners.get(layer))


def _shapes(model: nn.Module, paths: Collection[str]) -> dict[str, int]:
    """Return path -> rows of its matrix, of layers that are modules, in the order of the model."""
    packed, found = chain_layers(model), {}
    for name, module in model.named_modules():
        if name in paths:
            layer = packed.get(name)
            found[name] = layer.base.shape[0] if layer is not None else layout_of(name, module).out_features
    return found


def _refused(where: str, found: str, rule: str) -> ExportError:
    return ExportError(f"export of {where}"[:300], found=found, rule=rule, fix='exclude the experts with "!*experts*"')
