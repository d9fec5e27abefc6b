"""Merging: the effective weight becomes the weight of a stock layer, exactly, or `CannotMerge`.

What is stored is what the forward pass used (`ChainLinear.frozen_weight`): a closed chain (remask, regrid) trains on
the very tensor that merging writes, so nothing is lost. An open chain (plain LoRA on a dense model) is folded in
float32 and rounded once to the model's dtype; the report says how far that is from what trained.

A merged model is packed or stock. Packed: its layers stay `ChainLinear` with an empty chain, and run from the codes, at
the size that the footprint counts. Stock: transformers' own modules, the values written out. Both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.check import check_merge
from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.attach import close_experts, replace_modules
from dovetail.chains.layer.fingerprint import packed_fingerprint
from dovetail.chains.layer.held import Grid, grids, guard_saving, held_by_layers, put_grid
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.link import Constraint
from dovetail.chains.stages import CheckedChain
from dovetail.checkpoint.footprint import Footprint, footprint
from dovetail.compression.calibration import Batch
from dovetail.compression.journal import keep_on_disk
from dovetail.errors import CannotMerge, ChainError, DovetailError
from dovetail.models.disk import Disk
from dovetail.models.experts import one_by_one
from dovetail.models.fingerprint import fingerprint
from dovetail.models.probe import probe_batch
from dovetail.tasks.scoring import in_evaluation


@dataclass(frozen=True)
class MergeReport:
    """The effect of a merge.

    exact                 the merged weights are those that the forward pass used: none lost its zero or its grid
                          value, not that of an earlier round either, and rounding to the model's dtype changed none;
                          and the outputs on the probe are the same: bit for bit, or up to the order of summation where
                          a chain is open
    max_abs_weight_diff   largest |merged - effective weight|, the effective weight in float32 (float64)
    max_abs_logit_diff    largest difference of the model's output before and after, on a probe batch; None where no
                          probe was given and none could be made
    sparsity_before, sparsity_after   fraction of zeros in the weights that the chain used before (in its base, where
                          the merge is lossy or the chain gave up zeros), in the merged weights after
    off_grid              merged weights that are not on the quantizer's grid (0 without a quantizer)
    relative_weight_error ‖merged - effective‖ / ‖effective‖ over all target layers
    footprint             of the packed model, adapters gone: what the merged weights take on their grid
    given_up              what the layers had from an earlier round and the chain did not keep: "zeros", "grid"
    """

    exact: bool
    max_abs_weight_diff: float
    max_abs_logit_diff: float | None
    sparsity_before: float
    sparsity_after: float
    off_grid: int
    relative_weight_error: float
    footprint: Footprint
    given_up: tuple[str, ...] = ()


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    lossy: bool = False,
    probe: Batch | None = None,
    packed: bool = False,
    disk: Disk | None = None,
) -> MergeReport:
    """Merge the chain into the weights, in place, back to stock modules.

    lossy    merge also where zeros or grid would be lost: the base's zeros and grid are re-imposed, and the error
             measured
    probe    a batch of the model's keyword arguments to compare outputs on; when not given, made from a Hugging Face
             model's configuration (`dovetail.models.probe`)
    packed   stop before the stock modules: an inference model at its packed size, for `save_packed`; `to_stock` goes on
    disk     of the weights that stay on disk; such a model must stay packed
    errors   CannotMerge naming the links to add, or the layer whose merged weight is not finite, before anything is
             changed; ChainError when stages are still to come

    A Hugging Face model's config says what was merged, under "dovetail": the chain, the quantizer's identity, and the
    fingerprints of the base and of the merged (or packed) weights, which `dovetail.load` checks.
    """
    from transformers import PreTrainedModel

    record = applied(model)
    if left := record.stages_left:
        raise ChainError(
            str(record.chain),
            found=f"{left} stage(s) not yet run",
            rule="all stages must run before the merge",
            fix="run all stages with dovetail.train, or the next one with dovetail.advance",
        )
    try:
        check_merge(record.chain)
    except CannotMerge:
        if not lossy or any(not link.mergeable for link in record.chain):
            raise
    layers = record.layers
    for name, layer in layers.items():
        _require_finite(name, "adapter parameters", *layer.links.parameters())  # a grid would round infinity to its end
        _require_finite(name, "merged weights", *layer.frozen_weight())
        if disk is not None:
            disk.drop()
    made = None
    if probe is None and isinstance(model, PreTrainedModel):
        probe = made = probe_batch(model)
    try:
        before = None if probe is None else _outputs(model, probe, disk)
        if before is not None:
            _require_finite(str(record.chain), "outputs of the model before the merge", _unmasked(before))
    except Exception as error:  # a probe for another model, or outputs that are not finite: nothing is merged yet
        if made is None or isinstance(error, DovetailError):
            raise
        raise CannotMerge(
            type(model).__name__,
            found=f"no outputs on a batch of {', '.join(made)} made from its configuration: {error}",
            rule="the model must give outputs, which are compared before and after the merge",
            fix="pass probe=a batch of the model's keyword arguments",
        ) from error
    base = next(iter(layers.values())).base
    others = next((grid.identity for grid in grids(model).values()), base.identity)  # layers outside the chain
    note: dict[str, Any] = {
        "chain": str(record.chain),
        **_from_now(record.chain, others if base.quantized is None else base.identity),
        "base_fingerprint": record.base_fingerprint,
        **_source(model),
    }
    now = {name: _from_now(record.assignment.at(name), layer.base.identity) for name, layer in layers.items()}
    earlier = {name: had for name, had in held_by_layers(model).items() if name not in layers}
    if own := earlier | {name: has for name, has in now.items() if not has.items() <= note.items()}:
        note["layers"] = own
    tally, slack = _Tally(), _rounding_of_open_layers(layers.values())
    with in_evaluation(model):
        for number, (name, layer) in enumerate(layers.items()):
            changed = bool(layer.states or record.stage.missing)
            _absorb(layer, record.stage.missing, tally, of_base="zeros" in record.given_up)
            if disk is not None and changed:
                keep_on_disk(disk, f"merged-{number}", {name: layer.base})
            elif disk is not None:  # the base is on disk already
                disk.drop()
            layer.record = None  # merged: no chain to train, save or merge any more
    layers.clear()  # or codes and values of all layers would be held together in `to_stock`
    summary = footprint(model, disk)
    model.requires_grad_(False)
    if isinstance(model, PreTrainedModel):
        model.config.dovetail = note | ({"packed_fingerprint": packed_fingerprint(model, disk)} if packed else {})
    if not packed:
        to_stock(model)
    logit_diff, same = None, True
    if probe is not None and before is not None:
        logit_diff = logit_difference(_outputs(model, probe, disk), before)
        same = logit_diff <= slack * float(_unmasked(before).abs().max())  # False where the difference is NaN
    return MergeReport(
        exact=same and tally.max_abs == 0 and tally.off_grid == 0 and not record.given_up,
        max_abs_weight_diff=tally.max_abs,
        max_abs_logit_diff=logit_diff,
        sparsity_before=tally.zeros_before / tally.weights,
        sparsity_after=tally.zeros_after / tally.weights,
        off_grid=tally.off_grid,
        relative_weight_error=(tally.error_square / max(tally.square, 1e-300)) ** 0.5,
        footprint=summary,
        given_up=record.given_up,
    )


@torch.no_grad()
def to_stock(model: nn.Module) -> nn.Module:
    """Turn a packed model into stock modules, in place; the outputs are the same, bit for bit.

    model    merged with packed=True, or loaded from a folder that `save_packed` wrote; a stock model is unchanged
    returns  the same model, nothing frozen, as `from_pretrained` gives it
    errors   ChainError where the chain is not merged yet
    """
    from transformers import PreTrainedModel

    layers = chain_layers(model)
    if layers and all(layer.record is not None for layer in layers.values()):
        raise ChainError(
            f"to_stock of a model under {applied(model).chain}",
            found="a chain that is not merged",
            rule="the chain must be merged before its layers become stock layers",
            fix="call dovetail.merge(model)",
        )
    if not layers:
        return model

    def stock_layers() -> Iterator[tuple[nn.Module, nn.Module]]:
        while layers:  # so that codes and values of all layers are never held together
            _, layer = layers.popitem()
            stock = _stock(layer)
            if layer.base.quantized is not None:
                put_grid(stock, Grid.of(layer.base.quantized))
            yield layer, stock

    replace_modules(model, stock_layers())
    close_experts(model)
    guard_saving(model)
    model.requires_grad_(True)
    if isinstance(model, PreTrainedModel):
        note = {key: value for key, value in model.config.dovetail.items() if key != "packed_fingerprint"}
        model.config.dovetail = note | {"merged_fingerprint": fingerprint(model)}
    return model


def _from_now(links: CheckedChain, identity: str) -> dict[str, str | None]:
    """Return what a merged layer holds for a later round (`dovetail.chains.layer.held`), as config.json names it."""
    return {"pruner": None if links.pruner is None else str(links.pruner), "quantizer": identity}


def _source(model: nn.Module) -> dict[str, str]:
    """Return the file whose grid the model keeps, as its config names it."""
    said = getattr(getattr(model, "config", None), "dovetail", None)
    source = said.get("source") if isinstance(said, dict) else None
    return {"source": source} if isinstance(source, str) else {}


def _require_finite(where: str, what: str, *tensors: Tensor | None) -> None:
    if not all(tensor is None or bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise CannotMerge(
            where,
            found=f"NaN or infinite {what}",
            rule="the weights and outputs of a merged model must be finite",
            fix="check the base model, train again with a smaller lr_scale, or use a wider dtype",
        )


def _rounding_of_open_layers(layers: Iterable[ChainLinear]) -> float:
    """Bound the relative difference of the outputs that comes from the order of summation alone.

    An open layer sums x W and the adapters' products apart, a merged one sums them together: √in roundings a layer,
    which add up over the layers. All other layers multiply by the tensor that is stored: 0.
    """
    open_ = [layer for layer in layers if layer.path == "open" and layer.adapters]
    return sum(torch.finfo(layer.base.dtype).eps * layer.in_features**0.5 for layer in open_)


@dataclass
class _Tally:
    max_abs: float = 0.0
    zeros_before: int = 0
    zeros_after: int = 0
    weights: int = 0
    off_grid: int = 0
    error_square: float = 0.0
    square: float = 0.0


def _absorb(layer: ChainLinear, restore: Sequence[Constraint], tally: _Tally, *, of_base: bool) -> None:
    """Merge one layer into its base and count the effect; `of_base`: the zeros before are those of the base."""
    base = layer.base
    tally.weights += base.shape[0] * base.shape[1]
    wide = torch.promote_types(base.dtype, torch.float32)
    frozen, bias = layer.frozen_weight()
    used = layer.used_weight(frozen).to(wide)
    # Of the weight that merging writes down; where the chain fills zeros, of the base whose zeros are to be restored.
    tally.zeros_before += _zeros(base.matrix() if restore or of_base else used)
    if restore:
        weight = used.clone()
        for link in restore:
            if link.restores == "grid" or base.mask_bits is not None:
                weight = link.project(weight, base)
            else:
                weight = torch.where(base.matrix() == 0, 0, weight)
        frozen = layer.layout.native(weight.to(base.dtype))
    if restore or layer.states:  # else the base is the merged weight, on its grid and with its codes
        layer.absorb(frozen, bias)
    base.mask_bits = None  # the zeros are in the weights now
    merged = base.matrix()
    if base.quantized is not None:
        tally.off_grid += base.quantized.off_grid(merged)
    tally.zeros_after += _zeros(merged)
    difference = merged.to(wide) - used
    largest = float(difference.abs().max())
    tally.max_abs = largest if math.isnan(largest) else max(tally.max_abs, largest)
    tally.error_square += float(difference.square().sum(dtype=torch.float64))
    tally.square += float(used.square().sum(dtype=torch.float64))


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


def _stock(layer: ChainLinear) -> nn.Module:
    weight = layer.base.native(layer.base.dtype)
    if layer.base.dense is None:
        weight = weight.clone()  # out of the shared buffer
    stock = layer.layout.build(weight, None if layer.bias is None else layer.bias.detach())
    return stock.train(layer.training)


def logit_difference(one: Tensor, two: Tensor) -> float:
    """Return the largest difference of two outputs, computed in float64; 0 where both are minus infinity."""
    # Row by row: in float64 the logits of a large vocabulary take as much memory as the model.
    rows = zip(one, two, strict=True)
    return float(torch.stack([(a.double() - b.double()).masked_fill(a == b, 0).abs().max() for a, b in rows]).max())


def _unmasked(outputs: Tensor) -> Tensor:
    """Return the outputs with 0 for minus infinity, which is how a model writes masked ones."""
    return outputs.masked_fill(outputs == -math.inf, 0)


def _outputs(model: nn.Module, probe: Batch, disk: Disk | None) -> Tensor:
    """Return the model's logits on a batch, in evaluation mode."""
    device = next(model.parameters()).device
    with in_evaluation(model), one_by_one(model), nullcontext() if disk is None else disk.dropping(model):
        found: Any = model(**{name: tensor.to(device) for name, tensor in probe.items()})
    if not isinstance(found, Tensor):
        found = found.logits if "logits" in found else found[0]
    return found.detach().clone()
