"""Block-wise calibration: each block is compressed on the outputs of the compressed blocks before it.

The model's own forward pass runs once for each batch, in a thread of its own; only one thread runs at a time. A forward
pass that reaches a block waits until all have reached it. Then the block's statistics are computed, the block is
compressed, and all passes continue with its outputs. So calibration depends on no model family: masks, position biases,
encoders and decoders are computed by the model. Of the activations, only the inputs between two blocks are kept.

Source: the drivers of GPTQ and SparseGPT (Frantar et al. 2022, §4; 2023, §3.4), which are written for each family.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import Inputs
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.statistics import InputStatistics, Statistic, padding_mask
from dovetail.compression.journal import Journal
from dovetail.compression.passes import (
    LOOK,
    Batch,
    Pass,
    Passes,
    Stop,
    input_rows,
    quick,
    read_by_decoder,
    split,
    watching,
    without_cache,
)
from dovetail.errors import CalibrationWarning, DataError
from dovetail.models.disk import Disk
from dovetail.models.experts import Experts, expert_layers
from dovetail.progress import Bar
from dovetail.tasks.finite import not_finite

Compress = Callable[[dict[str, InputStatistics]], None]
Seen = dict[str, tuple["weakref.ref[Tensor]", int]]
"""Layer whose statistics count an input -> that input and its version."""

LEAST_TOKENS = 8
"""The least number of tokens for a Gram matrix."""


def blocks_of(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the model's blocks and the layers in each: block path -> layer paths, in the order of `names`.

    A block is an element of the outermost nn.ModuleList that a layer lies in; a layer outside of any is its own block.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts, block = name.split("."), name
        for depth in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
                block = ".".join(parts[: depth + 1])
                break
        found.setdefault(block, []).append(name)
    return found


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    layers: Mapping[str, ChainLinear],
    batches: Sequence[Batch],
    compress: Compress,
    *,
    wanted: Collection[Statistic],
    inputs: Inputs = "compressed",
    title: str = "calibrating",
    disk: Disk | None = None,
    journal: Journal | None = None,
    progress: bool = False,
) -> None:
    """Collect the statistics of each block's layers in turn, and call `compress` to change them.

    layers    the layers to watch, all inside the model
    batches   keyword arguments of the model's forward; `attention_mask` (b, t), where there is one, tells padding apart
    compress  called once for each block, with layer name -> statistics; may take entries out to free them
    wanted    the statistics that the link declares
    inputs    what a block is fed: the outputs of the "compressed" blocks before it, or of the "original" ones
    disk      of the weights that stay on disk: the memory of a block's is given back when the block is finished
    journal   the blocks that an earlier start has finished, which are restored, and to which each block is added
    errors    DataError, with the layer's name, for NaN activations, for a layer that no input reaches, for too few
              tokens. An error that the first rows show is raised before `compress` is called
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    try:
        with without_cache(model), quick(layers.values()):
            batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
            left, once = _look_ahead(model, layers, split(model, batches, LOOK), disk)
            pieces = split(model, batches)
            decoded = read_by_decoder(model, layers)
            experts, without_data = expert_layers(model), list[str]()
            with Bar(title, len(left), shown=progress) as bar, Passes(model, list(left), pieces) as passes:
                while left and (here := passes.waiting()):
                    block = str(here[0].block)
                    names = left.pop(block, [])
                    if not names:  # a block that is used again
                        passes.go_on(here)
                        continue
                    done = journal is not None and journal.finished(names)
                    statistics: dict[str, InputStatistics] | None = None
                    if not done:
                        watch = partial(
                            _watch, passes, here, {name: layers[name] for name in names}, wanted, once, decoded, experts
                        )
                        statistics = watch(share=True) or watch(share=False)
                        assert statistics is not None
                        without_data += _finish(statistics, layers, wanted, experts)
                    if left and inputs == "original":
                        passes.go_on(here)
                    if statistics is not None:
                        compress(statistics)
                    if journal is not None:
                        journal.restore(names) if done else journal.keep(block, names)
                    if left and inputs == "compressed":
                        passes.go_on(here)
                    if disk is not None:
                        disk.drop()
                    bar.advance()
            for names in left.values():
                raise unreached(names[0])
            if without_data:
                warnings.warn(_few_tokens(without_data, wanted), CalibrationWarning, stacklevel=2)
    finally:
        for module, training in modes.items():
            module.training = training


def _finish(
    found: dict[str, InputStatistics],
    layers: Mapping[str, ChainLinear],
    wanted: Collection[Statistic],
    experts: Mapping[str, tuple[Experts, str]],
) -> list[str]:
    """Finish the statistics of a block's layers; raise DataError for a layer that cannot be compressed by them.

    An expert with too few tokens gets uniform statistics instead: with them, its method works as one without data.

    returns  the names of such experts
    """
    without_data = []
    for name, statistics in found.items():
        layer, enough = layers[name], statistics.tokens >= (LEAST_TOKENS if "gram" in wanted else 1)
        if name in experts and not (enough and _any(statistics)):
            found[name] = InputStatistics.uniform(
                layer.in_features, wanted, dtype=layer.base.dtype, device=layer.base.device
            )
            without_data.append(name)
            continue
        if not statistics.tokens:
            raise unreached(name)
        statistics.finish()
        if not bool(torch.isfinite(statistics.square_i).all()):
            raise _not_finite(name)
        if not bool(statistics.square_i.any()):
            raise unreached(name)
        if not enough:
            raise DataError(
                f"calibration of {name}",
                found=f"{statistics.tokens} tokens",
                rule=f"a Gram matrix must be estimated from {LEAST_TOKENS} tokens or more; tens of thousands are usual",
                fix="add calibration data",
            )
    return without_data


def _any(statistics: InputStatistics) -> bool:
    """Return whether any input was not zero; before `finish`."""
    seen = statistics.square_i if statistics.gram_ii is None else statistics.gram_ii.diagonal()
    return bool(seen.any())


def _few_tokens(names: Sequence[str], wanted: Collection[Statistic]) -> str:
    """Return the warning for experts that were compressed without data, by parameter and number."""
    numbers: dict[str, list[str]] = {}
    for name in names:
        parameter, _, number = name.rpartition(".")
        numbers.setdefault(parameter, []).append(number)
    told = "; ".join(f"{parameter} {', '.join(those)}" for parameter, those in numbers.items())
    least = f"fewer than {LEAST_TOKENS} calibration tokens" if "gram" in wanted else "no calibration token"
    return (
        f"{len(names)} experts get {least} and are compressed as without data (all inputs independent and of equal "
        f"norm): {told}. Add calibration data to reach them"
    )


def _watch(
    passes: Passes,
    here: list[Pass],
    layers: Mapping[str, ChainLinear],
    wanted: Collection[Statistic],
    once: set[str],
    decoded: set[str],
    experts: Mapping[str, tuple[Experts, str]],
    *,
    share: bool,
) -> dict[str, InputStatistics] | None:
    """Run the block for every pass, and return the statistics of its layers' inputs.

    None is returned where two layers share their input in some batches only.

    once     the layers that a forward pass calls just once
    decoded  the layers that read the decoder's tokens
    experts  the layers that read the tokens routed to them
    share    layers that are fed the very same tensor (query, key and value) share one object
    """
    found: dict[str, InputStatistics] = {}
    leader: dict[str, str] = {}
    consistent = True
    for one in here:
        # Weak: an input lives no longer than the block itself needs it.
        seen: Seen = {}
        left = set(layers) if once.issuperset(layers) else None

        def see(name: str, x: Tensor, one: Pass = one, seen: Seen = seen) -> None:
            nonlocal consistent
            layer = layers[name]
            same = (k for k, (other, version) in seen.items() if other() is x and version == x._version)
            first = next(same, name) if share else name
            consistent &= leader.setdefault(name, first) == first
            if first == name:
                if name not in found:
                    found[name] = InputStatistics(layer.in_features, wanted, dtype=x.dtype, device=x.device)
                seen[name] = (weakref.ref(x), x._version)
                mask = one.decoder_mask if name in decoded else one.mask
                found[name].add(input_rows(x, layer.layout, mask, experts.get(name)))

        passes.feed(one, layers, see, left)
        if not consistent:
            return None
    for name, layer in layers.items():
        if name not in leader:
            found[name] = InputStatistics(layer.in_features, (), dtype=layer.base.dtype, device=layer.base.device)
    return {name: found[leader.get(name, name)] for name in layers}


def _look_ahead(
    model: nn.Module, layers: Mapping[str, ChainLinear], pieces: Sequence[Batch], disk: Disk | None = None
) -> tuple[dict[str, list[str]], set[str]]:
    """Run the model on the first piece, and on more pieces only to find a layer that it does not reach.

    returns  the blocks with the layers that are called in each (`blocks_of`, unless a block calls a layer from
             elsewhere, or a layer is called outside of its own), and the layers that a forward pass calls just once
    errors   DataError for NaN activations and for layers that no input reaches, while the model is unchanged
    """
    experts, calls = expert_layers(model), dict.fromkeys(layers, 0)
    blocks = blocks_of(model, list(layers))
    inside: list[str] = []
    bad: list[str] = []
    called_in: dict[str, str] = {}
    decoded = read_by_decoder(model, layers)
    masks: dict[bool, Tensor | None] = {}

    def see(name: str, x: Tensor) -> None:
        calls[name] += 1
        called_in.setdefault(name, inside[0] if inside else name)
        if not bool(
            torch.isfinite(input_rows(x, layers[name].layout, masks[name in decoded], experts.get(name))).all()
        ):
            bad.append(name)
            raise Stop

    def run(piece: Batch) -> None:
        with suppress(Stop):
            model(**piece)

    def enter(block: str) -> Any:
        return lambda module, args: inside.append(block)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside.pop()

    handles = []
    for block in blocks.keys() - layers.keys():
        module = model.get_submodule(block)
        handles += [module.register_forward_pre_hook(enter(block)), module.register_forward_hook(leave)]
    once: set[str] | None = None
    try:
        with watching(layers, see), nullcontext() if disk is None else disk.dropping(model):
            for piece in pieces:
                masks = {False: padding_mask(piece), True: padding_mask(piece, "decoder_attention_mask")}
                run(piece)
                if bad:
                    raise not_finite(f"calibration of {bad[0]}", model, partial(run, piece))
                once = {name for name, count in calls.items() if count == 1} if once is None else once
                if all(calls[name] for name in calls.keys() - experts.keys()):
                    break
            else:
                raise unreached(next(name for name, count in calls.items() if not count and name not in experts))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[str]] = {}
    for block, names in blocks.items():
        for name in names:
            found.setdefault(called_in.get(name, block), []).append(name)  # an expert may not be called
    return found, once


def _not_finite(name: str) -> DataError:
    return DataError(
        f"calibration of {name}",
        found="NaN or infinite activations",
        rule="activations must be finite",
        fix="check the layers before it, or calibrate in float32",
    )


def unreached(name: str) -> DataError:
    """Return the error for a layer that is compressed by its inputs and gets none."""
    # An expert that no token was sent to: every weight would score the same.
    return DataError(
        f"calibration of {name}",
        found="no input, or nothing but zeros",
        rule="calibration data must reach every layer that is compressed by its inputs",
        fix="add calibration data, leave the layer out of the targets, or compress it without data",
    )
