"""Pruning and quantization of a model's layers: block by block on their inputs, or layer by layer without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dovetail.chains.grid import refuse_not_finite
from dovetail.chains.layer.applied import Inputs
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Link, Pruner, Quantizer
from dovetail.chains.statistics import InputStatistics
from dovetail.compression.blocks import blocks_of, calibrate_blocks
from dovetail.compression.journal import Journal
from dovetail.compression.passes import Batch
from dovetail.links.prune.allocation import allocate, outlier_ratio
from dovetail.models.disk import Disk


@torch.no_grad()
def compress(
    model: nn.Module,
    layers: Mapping[str, ChainLinear],
    links: Mapping[str, Link],
    batches: Sequence[Batch] | None,
    *,
    inputs: Inputs,
    quantize: Callable[[str, Quantizer, InputStatistics | None], None],
    masks: Mapping[str, Tensor] | None,
    progress: bool,
    touch: Callable[[str], object],
    disk: Disk | None = None,
    place: int = 0,
) -> None:
    """Prune or quantize the bases of the layers, in place.

    links       layer name -> its pruner or quantizer, of one class
    batches     calibration data, where the links need statistics
    inputs      what a block is calibrated on (`dovetail.compression.blocks`)
    quantize    called with a layer's name, its quantizer and its statistics, to quantize its base
    masks       layer name -> (o, i) bool, which pruners use instead of data
    touch       called with a layer's name before it is changed
    disk        where weights stay on disk: each block is kept there once it is finished, and read from there where an
                earlier start has finished it
    place       of the links in their stage
    """
    journal = None if disk is None else Journal(disk, place, layers, touch, all_=inputs == "original")
    if journal is not None and journal.finished(list(layers)):
        journal.restore(list(layers))
        return
    first = next(iter(links.values()))
    if first.kind == "pruner" and masks is not None:
        for name, layer in layers.items():
            touch(name)
            layer.base.set_mask(masks[name])
        return
    for link in dict.fromkeys(links.values()):
        if isinstance(link, Pruner) and link.allocation == "outlier":
            own = {name: layers[name] for name in layers if links[name] == link}
            links = {**links, **allocated(model, own, link, batches, progress, disk)}

    def one(name: str, statistics: InputStatistics | None) -> None:
        touch(name)
        base, own = layers[name].base, links[name]
        if isinstance(own, Pruner):
            before = base.matrix()
            keep, weight = own.prune(before, statistics)
            base.set_mask(keep, None if weight is before else weight)
        elif isinstance(own, Quantizer):
            quantize(name, own, statistics)

    wanted = first.statistics
    if not wanted:
        for block, names in blocks_of(model, list(layers)).items():
            if journal is not None and journal.finished(names):
                journal.restore(names)
                continue
            for name in names:
                one(name, None)
            if journal is not None:
                journal.keep(block, names)
        return

    def some(found: dict[str, InputStatistics]) -> None:
        for name in sorted(found, key=lambda name: layers[name].in_features):  # the largest statistics last, alone
            statistics = found.pop(name)
            one(name, statistics)
            del statistics

    assert batches is not None
    calibrate_blocks(
        model,
        layers,
        batches,
        some,
        wanted=wanted,
        inputs=inputs,
        title=first.name,
        disk=disk,
        journal=journal,
        progress=progress,
    )


def allocated(
    model: nn.Module,
    layers: Mapping[str, ChainLinear],
    link: Pruner,
    batches: Sequence[Batch] | None,
    progress: bool,
    disk: Disk | None = None,
) -> dict[str, Link]:
    """Return the pruner of each layer, with the sparsity that its block gets for its outliers; nothing is changed.

    layers  all under the same pruner, whose allocation is "outlier"
    """
    ratios: dict[str, float] = {}

    def look(found: dict[str, InputStatistics]) -> None:
        for name, statistics in found.items():
            ratios[name] = outlier_ratio(link.scores(layers[name].base.matrix(), statistics))

    if link.statistics:
        assert batches is not None
        calibrate_blocks(
            model, layers, batches, look, wanted=("norm",), title=f"{link.name}: outliers", disk=disk, progress=progress
        )
    else:
        for name, layer in layers.items():
            ratios[name] = outlier_ratio(link.scores(layer.base.matrix(), None))
            if disk is not None:
                disk.drop()
    sizes = {name: layer.base.shape[0] * layer.base.shape[1] for name, layer in layers.items()}
    groups = {name: block for block, names in blocks_of(model, list(layers)).items() for name in names}
    sparsity = allocate(ratios, sizes, groups, link.sparsity)
    return {name: replace(link, sparsity=sparsity[name]) for name in layers}


def refuse_bad_weights(layers: Mapping[str, ChainLinear], disk: Disk | None = None) -> None:
    """Raise DovetailError for a layer with weights that are not finite, before any layer is changed."""
    for name, layer in layers.items():
        if (weight := layer.base.dense) is not None and not weight.is_meta:
            refuse_not_finite(name, weight)
            if disk is not None:
                disk.drop()
