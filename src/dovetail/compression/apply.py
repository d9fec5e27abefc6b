"""Application of a chain: target layers become `ChainLinear`, and the first stage's pruners and quantizers run.

In a chain of several stages, `advance` merges the current stage into the base and starts the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dovetail.chains.assignment import Layers, assign
from dovetail.chains.layer.applied import AppliedChain, Inputs, applied
from dovetail.chains.layer.attach import attach, close_experts, replace_modules
from dovetail.chains.layer.coverage import coverage
from dovetail.chains.layer.held import guard_saving, held
from dovetail.chains.layer.linear import ChainLinear, LinkState, Shared, adapter_dtype
from dovetail.chains.link import Adapter, Chain, Link, Quantizer, arguments
from dovetail.chains.stages import Stage
from dovetail.chains.statistics import InputStatistics
from dovetail.chains.terms import LowRank
from dovetail.compression.calibration import Batch, checked
from dovetail.compression.compress import compress, refuse_bad_weights
from dovetail.compression.decomposition import decompose, make_base
from dovetail.compression.journal import begin
from dovetail.errors import ChainError, DataError
from dovetail.models.coverage import described
from dovetail.models.disk import Disk
from dovetail.models.fingerprint import tensors_fingerprint
from dovetail.models.targets import task_heads
from dovetail.progress import note


@torch.inference_mode(mode=False)  # or training could not use what was made under a caller's inference mode
def apply(
    model: nn.Module,
    chain_: str | Chain | Link,
    *,
    layers: Layers | None = None,
    targets: str | Sequence[str] = "all-linear",
    calibration: Iterable[Batch] | None = None,
    seed: int = 0,
    calibration_inputs: Inputs = "compressed",
    masks: Mapping[str, Tensor] | None = None,
    taken: Mapping[str, LowRank] | None = None,
    bases: Mapping[str, Mapping[str, Tensor]] | None = None,
    on_link: Callable[[Link], None] | None = None,
    disk: Disk | None = None,
    progress: bool = False,
) -> nn.Module:
    """Put a chain on the model, in place, and apply its first stage's pruners and quantizers.

    Layers are compressed one after the other, and their original weights are freed: no second copy of the model is
    held.

    chain_       the notation, a Chain or a link
    layers       pattern of layers, as in `targets` -> the same links with other arguments; of several patterns that fit
                 a layer, the last decides (`dovetail.chains.assignment`)
    targets      labels, globs or "all-linear" (`dovetail.models.targets`)
    calibration  batches of the model's keyword arguments; needed by links that use activations
    calibration_inputs  the inputs that a block is calibrated on: outputs of the "compressed" blocks before it, which it
                 gets in use, or of the "original" ones
    seed         seed of the initial values
    masks        layer name -> (o, i) bool, which pruners of the first stage use instead of data
    taken        layer name -> what an adapter of the first stage took from the weight (`Adapter.decompose`), nothing
                 for other layers; its parameters are zeros then, to be loaded. None: it chooses both
    bases        layer name -> what `quantized_state` returned after the same quantizer was applied to the same model,
                 where it is all that the first stage applies; None: it is applied
    on_link      called after each pruner and quantizer that was applied, in later stages too, and with the last of a
                 stage's trained links when `advance` has merged them; the model is usable then
    disk         where the model's weights stay on disk (`dovetail.load` with the same one): each block is written there
                 when a link has compressed it, and read from there from then on. Where a stopped start with the same
                 model, chain, calibration and seed has finished blocks, they are not compressed again. The chain must
                 have one stage, whose adapters do not change the base
    progress     show bars, and a line with the share of the parameters under the chain and what is left out
    returns      the same model; everything is frozen except the adapters and a newly initialised task head
    errors       ChainError, TargetError, DataError: nearly always before anything is changed. An error after a layer
                 is compressed (a bad later batch, a kill) leaves a model that every further use refuses: load it again
    """
    assignment = assign(chain_, layers, held(model))
    if calibration_inputs not in get_args(Inputs):
        found, rule = f"calibration_inputs={calibration_inputs!r}", f"it must be {' or '.join(get_args(Inputs))}"
        raise ChainError("apply", found=found, rule=rule, fix="leave calibration_inputs out")
    stages = assignment.chain.stages
    if disk is not None and (refused := stages[0].decomposing or next((s.applied[0] for s in stages[1:]), None)):
        rule = "on weights that stay on disk a chain must have one stage, whose adapters do not change the base"
        raise ChainError(str(assignment.chain), found=str(refused), rule=rule, fix="load the model without disk")
    given = masks is not None or bases is not None
    batches = None if given else _calibration(model, assignment.chain.stages[0], calibration)
    record, replaced = attach(model, assignment, targets, seed, disk)
    record.on_link, record.calibration_inputs = on_link, calibration_inputs
    untouched = {target.name: target.module for target in replaced}
    del replaced  # or the original weights would be held until the end
    try:
        if disk is not None:
            begin(disk, _identity(record, batches))
        _start(model, record, batches, masks, progress, untouched, taken, bases, disk)
    except BaseException:
        if len(untouched) == len(record.layers):
            replace_modules(model, [(record.layers[name], module) for name, module in untouched.items()])
            close_experts(model)
            guard_saving(model)
        else:
            record.broken = True
        raise
    freeze(model, record)
    note(described(*coverage(model)), shown=progress)
    return model


def restore(
    model: nn.Module,
    chain_: str | Chain | Link,
    *,
    layers: Layers | None,
    targets: str | Sequence[str],
    seed: int,
    stage: int,
    bases: Mapping[str, Mapping[str, Tensor]],
) -> nn.Module:
    """Put a chain on the model at a later stage, with the bases that earlier stages trained."""
    record, _ = attach(model, assign(chain_, layers, held(model)), targets, seed)
    record.number = stage
    for name, layer in record.layers.items():
        state = dict(bases[name])
        bias = state.pop("bias", None)
        layer.base.restore(record.assignment.at(name).quantizer_at(stage), state)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(layer.base.device), requires_grad=False)
    start_links(record)
    freeze(model, record)
    return model


def apply_on_meta(
    model: nn.Module,
    chain_: str | Chain | Link,
    targets: str | Sequence[str] = "all-linear",
    stage: int = 0,
    layers: Layers | None = None,
) -> nn.Module:
    """Put a chain in one of its stages on a model without storage, in place: every check, no computation.

    model   on the meta device, such as `dovetail.checkpoint.config.empty_model` returns
    errors  those that `apply` raises before it changes anything
    """
    with torch.device("meta"):
        record, _ = attach(model, assign(chain_, layers, held(model)), targets, 0)
        record.number = stage
        for name, layer in record.layers.items():
            here, quantizer = record.stage_at(name), record.assignment.at(name).quantizer_at(stage)
            layer.base.allocate(quantizer, mask=here.keep_mask, start=here.keep_start)
        start_links(record)
    freeze(model, record)
    return model


@torch.inference_mode(mode=False)
def advance(
    model: nn.Module, *, calibration: Iterable[Batch] | None = None, seed: int | None = None, progress: bool = False
) -> nn.Module:
    """Merge the current stage into the base, exactly, and apply the pruners and quantizers of the next one.

    A quantized base stays quantized. Raises ChainError when no stage is left. If calibration fails, the current stage
    is merged and the next one has not begun: `advance` can be called again, unless a layer was compressed.
    """
    record = applied(model)
    if not record.stages_left:
        raise ChainError(
            str(record.chain),
            found=f"stage {record.number + 1} of {len(record.chain.stages)}, the last one",
            rule="the chain must have another stage",
            fix="merge the model",
        )
    batches = _calibration(model, record.chain.stages[record.number + 1], calibration)
    for layer in record.layers.values():
        layer.absorb(*layer.frozen_weight())
    if record.on_link is not None and (merged := record.stage.trained):
        record.on_link(merged[-1])
    record.number += 1
    if seed is not None:
        record.seed = seed
    untouched = dict.fromkeys(record.layers)
    try:
        _start(model, record, batches, None, progress, untouched)
    except BaseException:
        record.number -= 1  # or `merge` would take the stage for done
        record.broken = len(untouched) < len(record.layers)
        raise
    return model


def _calibration(model: nn.Module, stage: Stage, calibration: Iterable[Batch] | None) -> list[Batch] | None:
    """Return the batches, checked; raise ChainError or DataError where the stage needs them and there are none."""
    batches = None if calibration is None else checked(calibration, model)
    link = next((link for link in stage.applied if link.statistics), None)
    if link is None or batches:
        return batches
    fix = "pass calibration=[{'input_ids': …}, …]"
    if batches is not None:
        rule = "calibration needs at least one batch"
        raise DataError(f"calibration of {link.name}", found="no batch", rule=rule, fix=fix)
    raise ChainError(
        f"{link.name} in {stage}",
        found="no calibration data",
        rule=f"{link.name} needs the activations of calibration data",
        fix=f"{fix}, or use magnitude, which needs none",
    )


def quantized_state(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return layer name -> its codes and scales, and the weight before quantizing where it is kept, for `apply`."""
    found = {}
    for name, layer in applied(model).layers.items():
        found[name] = dict(layer.base.state_dict())
        if layer.base.start is not None:
            found[name]["start"] = layer.base.start
    return found


def freeze(model: nn.Module, record: AppliedChain) -> None:
    """Freeze everything except adapters and task heads, which start untrained; poolers in the body stay frozen."""
    new = {id(p) for path in task_heads(model) for p in model.get_submodule(path).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in new)
    for layer in record.layers.values():
        layer.links.requires_grad_(True)


def _identity(record: AppliedChain, batches: list[Batch] | None) -> dict[str, str]:
    """Return what a stopped compression must share with its start."""
    return {
        "chain": str(record.assignment),
        "targets": str(record.targets),
        "model": record.base_fingerprint,
        "inputs": record.calibration_inputs,
        "calibration": " ".join(tensors_fingerprint(batch) for batch in batches or []),
        "seed": str(record.seed),
    }


def _start(
    model: nn.Module,
    record: AppliedChain,
    batches: list[Batch] | None,
    masks: Mapping[str, Tensor] | None,
    progress: bool,
    untouched: dict[str, Any],
    taken: Mapping[str, LowRank] | None = None,
    bases: Mapping[str, Mapping[str, Tensor]] | None = None,
    disk: Disk | None = None,
) -> None:
    """Apply the current stage's pruners and quantizers, then put its differentiable links on the layers.

    untouched  layer name -> the owner of its original weight; entries are removed as layers are compressed
    taken, bases, disk  see `apply`
    """
    layers = record.layers
    stages = {name: record.stage_at(name) for name in layers}
    record.taken = {} if taken is None else dict(taken)
    chosen: dict[str, dict[str, Tensor]] = {}

    def quantize(name: str, quantizer: Quantizer | None, statistics: InputStatistics | None) -> None:
        stage, base = stages[name], layers[name].base
        if (link := stage.decomposing) is None:
            assert quantizer is not None
            base.quantize(quantizer, statistics, stage.keep_start)
            return
        if taken is None:
            part, chosen[name] = decompose(base, link, quantizer, statistics, pruned=stage.pruned)
            record.taken |= {} if part is None else {name: part}
        part = record.taken.get(name)
        make_base(base, part, quantizer, statistics, pruned=stage.pruned, keep_start=stage.keep_start)
        if taken is None and quantizer is not None and quantizer.statistics:
            # The blocks behind are calibrated on outputs of this one, whose base is not the weight by itself.
            layers[name].set_links([LinkState(link, layers[name].site, chosen[name], Shared({}))])

    decomposing = any(stage.decomposing is not None for stage in stages.values())
    if record.stage.applied or decomposing:
        refuse_bad_weights(layers, disk)
    for place, link in enumerate(record.stage.applied):
        if bases is not None:
            for name, layer in layers.items():
                untouched.pop(name, None)
                layer.base.restore(stages[name].quantizer, bases[name])
        else:
            compress(
                model, layers, {name: stage.applied[place] for name, stage in stages.items()}, batches,
                inputs=record.calibration_inputs, masks=masks, progress=progress,
                quantize=quantize,
                touch=lambda name: untouched.pop(name, None), disk=disk, place=place,
            )  # fmt: skip
        for name, layer in layers.items():
            if not stages[name].keep_mask:
                layer.base.mask_bits = None
        if record.on_link is not None:
            record.on_link(link)
    for name, stage in stages.items():
        if stage.decomposing is not None and stage.quantizer is None:
            untouched.pop(name, None)
            quantize(name, None, None)
    start_links(record, chosen)


def start_links(record: AppliedChain, chosen: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
    """Put the current stage's differentiable links on the layers, with their initial values.

    chosen  layer name -> parameters of the adapter that chose them together with the base; without an entry they are
            zeros, to be loaded
    """
    layers = record.layers
    shapes = [layer.base.shape for layer in layers.values()]
    widest = max(o for o, _ in shapes), max(i for _, i in shapes)
    shared: dict[tuple[int, Link], Shared] = {}
    for name, layer in layers.items():
        states = []
        for place, link in enumerate(record.stage_at(name).trained):
            if (place, link) not in shared:
                constants = link.constants(widest, record.seed, torch.float32) if isinstance(link, Adapter) else {}
                shared[place, link] = Shared(constants)
            if isinstance(link, Adapter) and link.starts != "identity":
                given = (chosen or {}).get(name)
                values = dict(given) if given is not None else _zeros(layer, link)
            else:
                values = _initial(layer, record, place, record.seed)
            states.append(LinkState(link, layer.site, values, shared[place, link]).train(layer.training))
        layer.set_links(states)


@torch.inference_mode(mode=False)
def initial_values(model: nn.Module, seed: int | None = None) -> dict[str, Tensor]:
    """Draw the initial values of the current stage's adapters again: "LAYER/PLACE/NAME" -> tensor.

    The keys are those of a saved adapter behind "link/".

    model    a model under a chain; it is unchanged
    seed     the seed that they were drawn with; None: the model's own
    returns  new tensors on the layers' devices, in the dtype of adapters (float32 or wider); of extracted elastic
             adapters the part at their rank. Values that depend on the base's weights (DoRA's magnitudes) depend on
             the current base
    errors   ChainError when the model carries no chain, and for an adapter whose initial values are not drawn
    """
    record = applied(model)
    if (link := next((s.decomposing for s in map(record.stage_at, record.layers) if s.decomposing), None)) is not None:
        raise ChainError(
            f"initial values of {record.chain}",
            found=f"{link}, which starts from a decomposition of the weights",
            rule="a task vector is the difference to initial values that are drawn again from a seed",
            fix="save the adapter with save_adapter, or merge the chain and take the difference of the checkpoints",
        )
    found = {}
    for name, layer in record.layers.items():
        for place, (link, state) in enumerate(zip(record.stage_at(name).trained, layer.states, strict=True)):
            values = _initial(layer, record, place, record.seed if seed is None else seed)
            if isinstance(link, Adapter) and link.ranks and state.rank is None:
                values = {key: value.clone() for key, value in link.at_rank(values, arguments(state.link)["r"]).items()}
            found |= {f"{name}/{place}/{key}": value for key, value in values.items()}
    return found


def _zeros(layer: ChainLinear, link: Adapter) -> dict[str, Tensor]:
    dtype, device = adapter_dtype(layer.base.dtype), layer.base.device
    return {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, shape in link.parameter_shapes(layer.site).items()
    }


@torch.no_grad()
def _initial(layer: ChainLinear, record: AppliedChain, place: int, seed: int) -> dict[str, Tensor]:
    """Return the initial values of the link at `place`; they depend on its arguments and the layer's base alone."""
    stage = record.stage_at(layer.site.name)
    link = stage.trained[place]
    if not isinstance(link, Adapter):
        return {}
    weight = layer.base.start_weight(stage.from_codes[place])
    text = f"{seed}/{record.number}/{place}/{layer.site.name}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    dtype = adapter_dtype(layer.base.dtype)
    values = link.init(layer.site, weight.to(dtype), generator)
    return {name: value.to(layer.base.device, dtype) for name, value in values.items()}
