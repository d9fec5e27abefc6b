"""Puts a chain on a model: target layers become `ChainLinear`, and the first stage's pruners and quantizers run.

A chain of several stages is walked by `advance`: it merges the stage in hand into the base and starts the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dovetail.chains.check import check
from dovetail.chains.layer.applied import AppliedChain, Inputs, applied, stages_left
from dovetail.chains.layer.attach import attach, replace_module
from dovetail.chains.layer.linear import ChainLinear, LinkState, Shared, adapter_dtype, chain_layers
from dovetail.chains.link import Adapter, Chain, Constraint, Link, Quantizer, arguments
from dovetail.chains.notation import chain
from dovetail.chains.stages import Stage, stages
from dovetail.compression.calibration import Batch, checked
from dovetail.compression.compress import compress, refuse_bad_weights
from dovetail.errors import ChainError, DataError

__all__ = ["AppliedChain", "advance", "applied", "apply", "chain_layers", "stages_left"]


@torch.inference_mode(mode=False)  # or training could not use what was made under a caller's inference mode
def apply(
    model: nn.Module,
    chain_: str | Chain | Link,
    *,
    targets: str | Sequence[str] = "all-linear",
    calibration: Iterable[Batch] | None = None,
    seed: int = 0,
    calibration_inputs: Inputs = "compressed",
    masks: Mapping[str, Tensor] | None = None,
    on_link: Callable[[Link], None] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Puts a chain on the model, in place, up to the end of its first stage's pruners and quantizers.

    Layers are compressed one after the other, and what they were is let go: no second copy of the model is held.

    chain_       the notation, a Chain or a link
    targets      labels, globs or "all-linear" (`dovetail.targets`)
    calibration  batches of the model's keyword arguments; needed by links that look at activations
    calibration_inputs  what a block is calibrated on: the outputs of the "compressed" blocks before it, as it will be
                 fed, or of the "original" ones
    seed         of initial values
    masks        layer name -> (o, i) bool, chosen earlier: pruners of the first stage take these and look at no data
    on_link      called after each pruner and quantizer that was applied, in later stages too, and with the last of a
                 stage's trained links when `advance` has merged them; the model works as it stands then
    returns      the same model; everything frozen but the adapters and a newly made task head
    errors       ChainError, TargetError, DataError: nearly always before anything is changed. What shows only when a
                 layer is compressed already (calibration data of which a later batch is bad, a kill) leaves a model
                 that every further use refuses: load it again
    """
    the_chain = chain(chain_)
    check(the_chain)
    if calibration_inputs not in get_args(Inputs):
        known = " or ".join(get_args(Inputs))
        raise ChainError("apply", found=f"calibration_inputs={calibration_inputs!r}", rule=f"it is {known}")
    first = stages(the_chain)[0]
    batches = _calibration(first, calibration) if masks is None else None
    record, layers, found = attach(model, the_chain, targets, seed)
    record.on_link, record.calibration_inputs = on_link, calibration_inputs
    untouched = {target.name: target.module for target in found}
    del found  # or the weights as they were would live until the end
    try:
        _start(model, layers, first, record, batches, masks, progress, untouched)
    except BaseException:
        if len(untouched) == len(layers):
            for name, module in untouched.items():
                replace_module(model, layers[name], module)
        else:
            record.broken = True
        raise
    _freeze(model, layers)
    return model


def restore(
    model: nn.Module,
    chain_: str | Chain | Link,
    *,
    targets: str | Sequence[str],
    seed: int,
    stage: int,
    bases: Mapping[str, Mapping[str, Tensor]],
) -> nn.Module:
    """Puts a chain on the model at a later stage, with the bases that earlier stages trained."""
    the_chain = chain(chain_)
    check(the_chain)
    parts = stages(the_chain)[: stage + 1]
    record, layers, _ = attach(model, the_chain, targets, seed)
    record.stage = stage
    quantizers = [link for part in parts for link in part.applied if isinstance(link, Quantizer)]
    for name, layer in layers.items():
        kept = dict(bases[name])
        bias = kept.pop("bias", None)
        layer.base.restore(quantizers[0] if quantizers else None, kept)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.base.device), requires_grad=False)
    start_links(layers, parts[stage], record)
    _freeze(model, layers)
    return model


@torch.inference_mode(mode=False)
def advance(
    model: nn.Module, *, calibration: Iterable[Batch] | None = None, seed: int | None = None, progress: bool = False
) -> nn.Module:
    """Merges the stage in hand into the base, exactly, and starts the next: its pruners and quantizers run.

    A quantized base stays quantized. ChainError when no stage is left. Where calibration fails, the stage in hand is
    merged already, but the next one isn't begun: `advance` can be called again, unless a layer was compressed.
    """
    record = applied(model)
    parts = stages(record.chain)
    if record.stage + 1 >= len(parts):
        raise ChainError(
            str(record.chain),
            found=f"stage {record.stage + 1} of {len(parts)} in hand",
            rule="advance needs a next stage",
            fix="merge the model",
        )
    following = parts[record.stage + 1]
    batches = _calibration(following, calibration)
    layers = chain_layers(model)
    for layer in layers.values():
        layer.absorb()
    if record.on_link is not None and (merged := parts[record.stage].trained):
        record.on_link(merged[-1])
    record.stage += 1
    if seed is not None:
        record.seed = seed
    untouched = dict.fromkeys(layers)
    try:
        _start(model, layers, following, record, batches, None, progress, untouched)
    except BaseException:
        record.stage -= 1  # or `merge` would take the stage for done
        record.broken = len(untouched) < len(layers)
        raise
    return model


def _calibration(stage: Stage, calibration: Iterable[Batch] | None) -> list[Batch] | None:
    needing = [link for link in stage.applied if link.calibrated]
    if needing and calibration is None:
        raise ChainError(
            f"{needing[0].name} in {stage}",
            found="no calibration data",
            rule=f"{needing[0].name} looks at the activations of some text",
            fix="apply(…, calibration=[{'input_ids': …}, …]); magnitude needs none",
        )
    batches = None if calibration is None else checked(calibration)
    if needing and not batches:
        raise DataError(
            f"calibration of {needing[0].name}",
            found="no batch",
            rule="pruning by activations needs at least one batch",
            fix="pass calibration=[{'input_ids': …}, …]",
        )
    return batches


def _freeze(model: nn.Module, layers: Mapping[str, ChainLinear]) -> None:
    """Freezes everything but adapters and a sequence classifier's own head, which starts untrained."""
    new: set[int] = set()
    if type(model).__name__.endswith("ForSequenceClassification"):
        body = getattr(model, "base_model", model)
        inside = {id(p) for p in body.parameters()}
        new = {id(p) for p in model.parameters() if id(p) not in inside}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in new)
    for layer in layers.values():
        layer.links.requires_grad_(True)


def _start(
    model: nn.Module,
    layers: Mapping[str, ChainLinear],
    stage: Stage,
    record: AppliedChain,
    batches: list[Batch] | None,
    masks: Mapping[str, Tensor] | None,
    progress: bool,
    untouched: dict[str, Any],
) -> None:
    """Runs the stage's pruners and quantizers on the bases, then puts its differentiable links on the layers.

    untouched  layer name -> what holds its weight as it was; let go as layers are compressed
    """
    later = [link for part in stages(record.chain)[record.stage :] for link in part.trained]
    keep_mask = any(isinstance(link, Constraint) and link.restores == "zeros" for link in later)
    keep_start = any(isinstance(link, Constraint) and not link.from_codes for link in stage.trained)
    if stage.applied:
        refuse_bad_weights(layers)
    for link in stage.applied:
        compress(
            model, layers, link, batches, inputs=record.calibration_inputs, keep_start=keep_start, masks=masks,
            progress=progress, touch=lambda name: untouched.pop(name, None),
        )  # fmt: skip
        if not keep_mask:
            for layer in layers.values():
                layer.base.mask_bits = None
        if record.on_link is not None:
            record.on_link(link)
    start_links(layers, stage, record)


def start_links(layers: Mapping[str, ChainLinear], stage: Stage, record: AppliedChain) -> None:
    """Puts a stage's differentiable links on the layers, with their initial values."""
    shared = [
        Shared(
            link.constants(_widest(layers.values()), record.seed, torch.float32) if isinstance(link, Adapter) else {}
        )
        for link in stage.trained
    ]
    from_codes = _from_codes(stage)
    for layer in layers.values():
        layer.set_links(
            _state(link, layer, shared[place], record, place, from_codes[place])
            for place, link in enumerate(stage.trained)
        )


def _from_codes(stage: Stage) -> list[bool]:
    """Of each trained link, whether the weight that it receives is the quantized one."""
    on_codes = all(link.from_codes for link in stage.trained if isinstance(link, Constraint))
    found = []
    for link in stage.trained:
        found.append(on_codes)
        on_codes = on_codes or (isinstance(link, Constraint) and link.restores == "grid")
    return found


@torch.inference_mode(mode=False)
def initial_values(model: nn.Module, seed: int | None = None) -> dict[str, Tensor]:
    """What the adapters of the stage in hand started with, drawn again: "LAYER/PLACE/NAME" -> tensor, as in a saved
    adapter's link/ keys.

    model    under a chain; it isn't changed
    seed     that they were drawn with; None: the model's own
    returns  new tensors on the layers' devices, in the dtype of adapters (float32 or wider); of extracted elastic
             adapters the part at their rank. What starts from the base's weights (DoRA's magnitudes) starts from the
             base in hand
    errors   ChainError when the model carries no chain
    """
    record = applied(model)
    stage, seed = stages(record.chain)[record.stage], record.seed if seed is None else seed
    from_codes, found = _from_codes(stage), {}
    for name, layer in chain_layers(model).items():
        for place, state in enumerate(layer.states):
            link = stage.trained[place]
            values = _initial(link, layer, seed, record.stage, place, from_codes[place])
            if isinstance(link, Adapter) and link.ranks and state.rank is None:
                values = {key: value.clone() for key, value in link.at_rank(values, arguments(state.link)["r"]).items()}
            found |= {f"{name}/{place}/{key}": value for key, value in values.items()}
    return found


def _widest(layers: Iterable[ChainLinear]) -> tuple[int, int]:
    shapes = [layer.base.shape for layer in layers]
    return max(o for o, _ in shapes), max(i for _, i in shapes)


def _state(
    link: Link, layer: ChainLinear, shared: Shared, record: AppliedChain, place: int, from_codes: bool
) -> LinkState:
    values = _initial(link, layer, record.seed, record.stage, place, from_codes)
    return LinkState(link, layer.site, values, shared).train(layer.training)


@torch.no_grad()
def _initial(link: Link, layer: ChainLinear, seed: int, stage: int, place: int, from_codes: bool) -> dict[str, Tensor]:
    """A link's initial values; they depend on nothing else than the arguments and the layer's base."""
    if not isinstance(link, Adapter):
        return {}
    weight = layer.base.start_weight(from_codes)
    text = f"{seed}/{stage}/{place}/{layer.site.name}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    dtype = adapter_dtype(layer.base.dtype)
    values = link.init(layer.site, weight.to(dtype), generator)
    return {name: value.to(layer.base.device, dtype) for name, value in values.items()}
