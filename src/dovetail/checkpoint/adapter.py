"""Saving and loading what a chain learned, beside the base that it belongs to.

A directory with two files: `adapter.json` (chain, targets, seed, fingerprints, the quantizer's identity, the ranks of
elastic adapters) and `adapter.safetensors`:

    link/LAYER/PLACE/NAME    parameters of the differentiable links
    taken/LAYER/NAME         A and B of the low rank that was taken from a layer's weight before it was quantized
                             (`lora(init=loftq)`): with them, loading makes the same base again, bit for bit
    mask/LAYER               one bit per weight, where a pruner chose; loading runs the quantizer again and checks it
    base/LAYER/NAME          the bases and biases themselves, where they cannot be computed again: earlier stages were
                             merged into them, or gptq or sparsegpt fitted them to data (as large as the base)
    head/NAME                a classifier's head and pooler, and every other trained parameter

Loading needs the base model that the chain was applied to. An error names another base, quantizer or chain.
adapter.json also holds a digest of both files: an adapter that was changed since it was saved is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.assignment import Assignment, assign
from dovetail.chains.layer.applied import applied, carries_chain
from dovetail.chains.layer.attach import stock_in_place
from dovetail.chains.layer.bits import pack_bits, unpack_bits
from dovetail.chains.layer.elastic import check_saved, load_ranks, saved_ranks, shapes_at
from dovetail.chains.layer.fingerprint import base_fingerprint
from dovetail.chains.layer.held import guard_saving, held
from dovetail.chains.layer.linear import ChainLinear, chain_layers, packed_layers
from dovetail.chains.link import Adapter
from dovetail.chains.terms import LowRank
from dovetail.compression.apply import apply, restore
from dovetail.errors import ChainError, LoadError
from dovetail.files import atomic, open_tensors, read_json, write_whole
from dovetail.models.fingerprint import model_fingerprint, tensors_fingerprint
from dovetail.models.layouts import Layout, layout_of
from dovetail.models.targets import all_layers, new_heads
from dovetail.training.optimizer import cast_frozen

_KEY = re.compile(r"link/[^/]+/\d+/\w+|base/[^/]+/[\w.]+|taken/[^/]+/[AB]|(mask|head)/[^/]+")


class AdapterFile(pydantic.BaseModel, extra="forbid"):
    """What adapter.json holds.

    base_fingerprint   of the whole model before the chain
    chain_fingerprint  of the bases that the links sit on: after pruning, quantizing and merging earlier stages
    layers             pattern of layers -> their chain, where their links have other arguments
    quantizer          identity of the base's grid, or its dtype; of several, all
    dtype              of the weights: another one than the base was loaded in, where training rounded it (bf16)
    ranks              LAYER/PLACE -> the rank that an elastic adapter runs at
    extracted          whether elastic adapters were made plain ones of those ranks
    digest             of everything above and of the tensors; None in adapters of earlier versions
    """

    format: Literal["dovetail-adapter"] = "dovetail-adapter"
    version: Literal[1] = 1
    chain: str
    layers: dict[str, str] = {}
    targets: str | list[str]
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**64)]
    stage: Annotated[int, pydantic.Field(ge=0)]
    base_fingerprint: str
    chain_fingerprint: str
    quantizer: str
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    ranks: dict[str, int] = {}
    extracted: bool = False
    digest: str | None = None

    @property
    def chain_of_layers(self) -> str:
        """The chain, with that of the layers that have their own."""
        return ", ".join([self.chain, *(f"{pattern}: {text}" for pattern, text in self.layers.items())])

    def digest_of(self, tensors: Mapping[str, Tensor]) -> str:
        """Return the digest of an adapter of this description and these tensors."""
        without = {"digest"} if self.layers else {"digest", "layers"}  # as versions without `layers` wrote it
        text = f"{self.model_dump_json(exclude=without)}{tensors_fingerprint(tensors)}"
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def save_adapter(model: nn.Module, directory: str | Path) -> Path:
    """Write the chain's parameters (not the base) into a directory, created if needed; each file atomically.

    returns  the directory
    errors   ChainError when the model carries no chain, or is between two stages
    """
    record, directory = applied(model), Path(directory)
    links = record.stage.trained
    if any(len(layer.states) != len(links) for layer in record.layers.values()):
        raise ChainError(
            f"save_adapter of {record.chain}",
            found=f"stage {record.number + 1}, merged, and the next one not begun",
            rule="an adapter must be saved while its stage is current",
            fix="call dovetail.advance again, which failed before",
        )
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: parameter.detach() for key, parameter in parameters_of(model).items()}
    keeps_bases = _keeps_bases(record.assignment, record.number)
    for name, layer in record.layers.items():
        if keeps_bases:
            kept = {**layer.base.state_dict(), "start": layer.base.start, "bias": layer.bias}
            tensors |= {f"base/{name}/{key}": value for key, value in kept.items() if value is not None}
        elif any(link.kind == "pruner" for link in record.stage.applied):
            tensors[f"mask/{name}"] = _mask_bits(layer)
        if (taken := record.taken.get(name)) is not None:
            tensors |= {f"taken/{name}/A": taken.a_ri, f"taken/{name}/B": taken.b_or}
    tensors = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    file = describe(model)
    file.digest = file.digest_of(tensors)
    with atomic(directory / "adapter.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    write_whole(directory / "adapter.json", json.dumps(file.model_dump(), indent=2) + "\n")
    return directory


def describe(model: nn.Module) -> AdapterFile:
    """Return the adapter.json of the current stage. Hashes the bases."""
    record = applied(model)
    ranks, extracted = saved_ranks(model)
    base = next(iter(record.layers.values())).base
    return AdapterFile(
        chain=str(record.chain),
        layers=record.assignment.texts,
        targets=record.targets if isinstance(record.targets, str) else list(record.targets),
        seed=record.seed,
        stage=record.number,
        base_fingerprint=record.base_fingerprint,
        chain_fingerprint=base_fingerprint(record.layers),
        quantizer=_identity(record.layers),
        dtype=str(base.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        ranks=ranks,
        extracted=extracted,
    )


def _keeps_bases(assignment: Assignment, stage: int) -> bool:
    """Return whether the bases cannot be computed again from the model and its masks: trained or fitted to data."""
    applied_first = (link for links in assignment.chains for link in links.stages[0].applied)
    return stage > 0 or any(not link.remade_without_data for link in applied_first)


def _identity(layers: Mapping[str, ChainLinear]) -> str:
    """Return the identity of the grid or the dtype of the layers' bases; where they differ, each one once."""
    return ", ".join(dict.fromkeys(layer.base.identity for layer in layers.values()))


def load_adapter(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put a saved chain on its base model, in place.

    model    the base before the chain (it is pruned and quantized again in the same way), or a model that carries the
             same chain over the same base
    returns  the same model, bit-equal to the one that was saved
    errors   LoadError that names the mismatch (base, quantizer, chain, a layer, a shape); the model is unchanged then
    """
    directory = Path(directory)
    where, path = str(directory), directory / "adapter.safetensors"
    rule = "an adapter directory must contain adapter.json in the form that Dovetail writes"
    file = read_json(directory / "adapter.json", AdapterFile, rule=rule, fix="copy the folder again")
    with open_tensors(path, owner="an adapter directory") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a dict)
    for key in tensors:
        if not _KEY.fullmatch(key):
            rule = "names of tensors must begin with link/, mask/, taken/, base/ or head/"
            raise LoadError(str(path), found=f"a tensor {key[:80]!r}", rule=rule, fix="save the adapter again")
    _check_digest(where, file, tensors)
    before = Before(model)
    try:
        put_chain(model, file, tensors, where)
        check_saved(model, file.ranks, file.extracted, where)
        _fill(model, file, tensors, where)
        applied(model).seed = file.seed
    except BaseException:
        before.put_back()
        raise
    return model


def _check_digest(where: str, file: AdapterFile, tensors: Mapping[str, Tensor]) -> None:
    if file.digest is None:
        warnings.warn(f"{where}: no digest in adapter.json: changed bytes would not be noticed", stacklevel=3)
    elif (found := file.digest_of(tensors)) != file.digest:
        raise LoadError(
            where,
            found=f"an adapter with digest {found}",
            rule=f"adapter.json and adapter.safetensors must be as they were saved, with digest {file.digest}",
            fix="copy the folder again, or save the adapter again",
        )


def put_chain(model: nn.Module, file: AdapterFile, tensors: dict[str, Tensor], where: str) -> None:
    """Put an adapter's chain on its unchanged base, with initial values, or check a chain that is already there.

    tensors  of adapter.safetensors: the masks and bases that cannot be computed again
    errors   LoadError for another base, quantizer or chain, shared projections of another seed, and for masks and
             bases that are missing
    """
    if not carries_chain(model):
        found = model_fingerprint(model)
        if found != file.base_fingerprint:
            raise LoadError(
                where,
                found=f"a model with fingerprint {found}",
                rule=f"the base must be the one that the adapter was trained on, {file.base_fingerprint}",
                fix="load the checkpoint that it was trained on, in the same dtype",
            )
        _apply_again(model, file, tensors, where)
        _round_again(model, file, tensors)
    elif not same_chain(model, file):
        raise LoadError(
            where,
            found=f"a model that carries {applied(model).assignment}, stage {applied(model).number + 1}",
            rule=f"the model must carry the adapter's chain, {file.chain_of_layers}, stage {file.stage + 1}",
            fix="load the adapter onto the base model",
        )
    check_constants(model, file.seed, where)
    layers = chain_layers(model)
    identity = _identity(layers)
    if identity != file.quantizer:
        rule = f"the base must be the one that the adapter was trained over, {file.quantizer}"
        raise LoadError(where, found=f"a base on {identity}", rule=rule, fix="load the adapter onto that base")
    if base_fingerprint(layers) != file.chain_fingerprint:
        raise LoadError(
            where,
            found="bases that differ from those that it was trained on",
            rule="pruning and quantizing again must give the same bases, bit for bit",
            fix="load the adapter onto the unchanged base model",
        )


def same_chain(model: nn.Module, file: AdapterFile) -> bool:
    """Return whether the model carries the adapter's chain, with the same arguments on each layer, in its stage."""
    record = applied(model)
    return (str(record.chain), record.assignment.texts, record.number) == (file.chain, file.layers, file.stage)


def check_constants(model: nn.Module, seed: int, where: str) -> None:
    """Raise LoadError unless what all layers share, such as VeRA's projections, is what this seed draws."""
    here = applied(model).seed
    for state in next(iter(applied(model).layers.values())).states:
        if here == seed or not isinstance(state.link, Adapter):
            continue
        # Drawn for the smallest layer there is: other seeds give other first numbers.
        one, two = (state.link.constants((1, 1), each, torch.float32) for each in (here, seed))
        if any(not torch.equal(one[name], two[name]) for name in one):
            rule = f"{state.link.name}'s projections must be those of seed {seed}"
            raise LoadError(where, found=f"a model of seed {here}", rule=rule, fix=f"pass seed={seed} to apply")


def _apply_again(model: nn.Module, file: AdapterFile, tensors: dict[str, Tensor], where: str) -> None:
    assignment = assign(file.chain, file.layers, held(model))
    if file.stage >= (stages := len(assignment.chain.stages)):
        rule = f"{file.chain} has {stages} stages, numbered from 0"
        raise LoadError(where, found=f"stage={file.stage}", rule=rule, fix="copy the folder again")
    bases: dict[str, dict[str, Tensor]] = {}
    masks, packed = {}, packed_layers(model)
    with stock_in_place(model):
        stock = {layer.name: layer.module for layer in all_layers(model)}

    def device_of(name: str, module: nn.Module) -> torch.device:
        return packed[name].base.device if name in packed else module.get_parameter("weight").device

    taken: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name, *rest = key.split("/")
        if kind in ("base", "mask", "taken"):
            module = _module(stock, name)
            layout = layout_of(name, module)
            bits = (layout.out_features, -(-layout.in_features // 8))
            if kind == "mask":
                _expect(key, tensor, bits)
                kept = unpack_bits(tensor.to(torch.uint8), layout.in_features, torch.int8).bool()
                masks[name] = kept.to(device_of(name, module))
                continue
            if kind == "taken":
                _check_taken(key, tensor, layout)
                taken.setdefault(name, {})[rest[0]] = tensor.to(device_of(name, module))
                continue
            weight, what = module.get_parameter("weight"), rest[0]
            shapes = {"mask_bits": bits, "bias": bits[:1], "start": tuple(weight.shape)}
            if what in shapes:  # the rest is for load_state_dict to check
                _expect(key, tensor, shapes[what])
                tensor = tensor.to(torch.uint8 if what == "mask_bits" else weight.dtype)
            bases.setdefault(name, {})[what] = tensor
    low_ranks = {name: _low_rank(name, pair) for name, pair in taken.items()}
    try:
        if _keeps_bases(assignment, file.stage):
            restore(
                model, file.chain, layers=file.layers, targets=file.targets, seed=file.seed, stage=file.stage,
                bases=bases,
            )  # fmt: skip
            applied(model).taken = low_ranks
        else:
            apply(
                model, file.chain, layers=file.layers, targets=file.targets, seed=file.seed, masks=masks or None,
                taken=low_ranks,
            )  # fmt: skip
    except (KeyError, RuntimeError) as error:  # a layer that the file lacks, or another name or shape in a base
        raise LoadError(
            where,
            found=" ".join(str(error).split())[:300],
            rule="the file must contain the mask or base of each layer of the chain, in the form that the chain makes",
            fix="copy the folder again",
        ) from error


def _round_again(model: nn.Module, file: AdapterFile, tensors: Mapping[str, Tensor]) -> None:
    """Round the loaded base as training in bf16 rounds the frozen base, and its heads at the end."""
    dtype = None if file.dtype is None else getattr(torch, file.dtype)
    if dtype is None or next(iter(applied(model).layers.values())).base.dtype == dtype:
        return
    cast_frozen(model, dtype)
    for name, parameter in beside(model).items():
        if (stored := tensors.get(f"head/{name}")) is not None and stored.dtype == dtype:
            parameter.data = parameter.data.to(dtype)


def _fill(model: nn.Module, file: AdapterFile, tensors: dict[str, Tensor], where: str) -> None:
    """Copy parameters into the model; each parameter of the model must be present, in its shape."""
    wanted = {key: tuple(p.shape) for key, p in parameters_of(model).items()}
    if file.extracted:
        for place, shapes in shapes_at(model, file.ranks).items():
            wanted |= {f"link/{place}/{key}": shape for key, shape in shapes.items()}
    given = {key for key in tensors if key.startswith(("link/", "head/"))}
    for key in sorted(given ^ set(wanted)):
        raise LoadError(
            where,
            found=f"{key} " + ("in the file alone" if key in given else "missing from the file"),
            rule="the file must contain exactly the parameters of this chain on this model",
            fix="load the adapter onto the model that it was trained on",
        )
    for key, shape in wanted.items():
        _expect(key, tensors[key], shape)
        if not tensors[key].is_floating_point() or not bool(torch.isfinite(tensors[key]).all()):
            found, rule = f"{tensors[key].dtype}, or NaN or infinity", "parameters must be finite floats"
            raise LoadError(key, found=found, rule=rule, fix="train the adapter again")
    load_ranks(model, file.ranks, file.extracted)
    with torch.no_grad():
        for key, parameter in parameters_of(model).items():
            parameter.copy_(tensors[key])


def _mask_bits(layer: ChainLinear) -> Tensor:
    base = layer.base
    if base.mask_bits is not None:
        return base.mask_bits
    return pack_bits((base.matrix() if base.start is None else base.layout.matrix(base.start)) != 0)


def _module(stock: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name in stock:
        return stock[name]
    found, rule = "no such layer in the model", "the adapter must name layers of its base"
    raise LoadError(name, found=found, rule=rule, fix="load the adapter onto its base model")


def _check_taken(key: str, tensor: Tensor, layout: Layout) -> None:
    """Raise LoadError unless a tensor can be a factor of what was taken from the layer's weight."""
    side, width = (1, layout.in_features) if key.endswith("/A") else (0, layout.out_features)
    if tensor.ndim != 2 or tensor.shape[side] != width:
        found, rule = f"shape {tuple(tensor.shape)}", f"a factor of a low rank must have {width} as its width"
        raise LoadError(key, found=found, rule=rule, fix="load the adapter onto its base model")
    if tensor.dtype not in (torch.float32, torch.float64) or not bool(torch.isfinite(tensor).all()):
        found, rule = f"{tensor.dtype}, or NaN or infinity", "what was taken must be finite float32 or float64"
        raise LoadError(key, found=found, rule=rule, fix="save the adapter again")


def _low_rank(name: str, pair: Mapping[str, Tensor]) -> LowRank:
    shapes = {key: tuple(tensor.shape) for key, tensor in pair.items()}
    if shapes.keys() != {"A", "B"} or shapes["A"][0] != shapes["B"][1]:
        rule = "what was taken must be A and B of one rank"
        raise LoadError(f"taken/{name}", found=f"shapes {shapes}", rule=rule, fix="save the adapter again")
    return LowRank(pair["A"], pair["B"])


def _expect(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        found, rule = f"shape {tuple(tensor.shape)}", f"the shape must be the model's, {shape}"
        raise LoadError(key, found=found, rule=rule, fix="load the adapter onto its base model")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that an adapter file stores under link/ and head/, by their keys."""
    found: dict[str, Tensor] = {}
    for name, layer in chain_layers(model).items():
        for place, state in enumerate(layer.states):
            found |= {f"link/{name}/{place}/{key}": p for key, p in state.named_parameters(recurse=False)}
    return found | {f"head/{name}": parameter for name, parameter in beside(model).items()}


def beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters outside the chain that are saved with it, by name.

    These are the trained ones, and a classifier's head and pooler, which the base's fingerprint excludes.
    """
    inside = {id(p) for layer in chain_layers(model).values() for p in layer.parameters()}
    paths = tuple(f"{path}." for path in new_heads(model))
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and (parameter.requires_grad or name.startswith(paths))
    }


class Before:
    """A record of a model's modules, parameters and adapter values, from which the model can be restored.

    It keeps the weights that a chain releases.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = chain_layers(model)
        self._modules = [(parent, dict(parent._modules)) for parent in model.modules()]
        self._parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
        self._states = [(layer, layer.states, [state.rank for state in layer.states]) for layer in layers.values()]
        self._values = [(t, t.detach().clone()) for t in parameters_of(model).values()] if layers else []
        self._record = applied(model) if carries_chain(model) else None
        self._seed = self._record.seed if self._record is not None else 0

    def put_back(self) -> None:
        """Undo every chain put on the model since, and every adapter loaded into the chain that it carries."""
        for parent, children in self._modules:
            parent._modules.update(children)
        guard_saving(self._modules[0][0])
        for parameter, data, requires_grad in self._parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for layer, states, ranks in self._states:
            if layer.states is not states:
                layer.set_links(states, layer.path)
            for state, rank in zip(states, ranks, strict=True):
                if rank is not None:
                    state.use_rank(rank)
        for tensor, value in self._values:
            tensor.data.copy_(value)
        if self._record is not None:
            self._record.seed = self._seed
