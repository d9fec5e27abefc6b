"""Units: the layers that get their bits and ranks together.

block   an element of the model's list of blocks, as in QR-Adaptor
fused   of one attention or feed-forward part: query + key + value; gate + up; each other layer by itself. Serving
        engines fuse these layers, and refuse different bits within
layer   each layer by itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dovetail.compression.blocks import blocks_of
from dovetail.errors import SearchError
from dovetail.models.targets import Target

_FUSED = (frozenset({"query", "key", "value"}), frozenset({"gate", "up"}))


@dataclass(frozen=True)
class Unit:
    """Layers with the same arguments.

    name    of a block or layer, or the paths joined: "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    layers  paths, in module order
    """

    name: str
    layers: tuple[str, ...]


def units(model: nn.Module, targets: Sequence[Target], unit: Literal["block", "fused", "layer"]) -> list[Unit]:
    """Return the units of the targets, in module order.

    model   the targets are its layers, or were before a chain was put on it
    errors  SearchError for a layer without a role, of which nothing says what it is fused with
    """
    names = [target.name for target in targets]
    if unit == "layer":
        return [Unit(name, (name,)) for name in names]
    if unit == "block":
        return [Unit(block, tuple(layers)) for block, layers in blocks_of(model, names).items()]
    found: dict[tuple[str, frozenset[str]], list[str]] = {}
    for target in targets:
        if not target.roles:
            raise SearchError(
                f"search.unit at {target.name}",
                found="a layer without a role",
                rule="unit: fused needs the role of each target (query, up, ...)",
                fix="set unit: layer or block, or leave the layer out of the targets",
            )
        roles = next((part for part in _FUSED if part.issuperset(target.roles)), frozenset(target.roles))
        found.setdefault((target.name.rpartition(".")[0], roles), []).append(target.name)
    return [Unit(_joined(layers), tuple(layers)) for layers in found.values()]


def _joined(layers: Sequence[str]) -> str:
    first, *others = layers
    return "+".join([first, *(other.rpartition(".")[2] for other in others)])
