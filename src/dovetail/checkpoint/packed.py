"""Packed models on disk: packed codes, and for pruned layers a mask of one bit per weight and the nonzero values.

A folder with config.json, the tokenizer's files and `packed.safetensors` (`docs/packed.md`).
config.json's "dovetail" says the chain, and the fingerprint of what is in memory after loading. Nothing is unpickled,
and no tensor is read before its name, dtype and shape are known to be those that the config asks for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.attach import open_experts, replace_modules
from dovetail.chains.layer.base import Base, Scratch
from dovetail.chains.layer.bits import INTEGERS, join_zeros, split_zeros
from dovetail.chains.layer.fingerprint import packed_fingerprint
from dovetail.chains.layer.held import guard_saving
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.link import Quantizer, Site
from dovetail.chains.notation import chain
from dovetail.chains.packing import pack, packed_nbytes, unpack
from dovetail.errors import ChainError, DovetailError, LoadError
from dovetail.files import atomic, check_folder, open_tensors, parse_json
from dovetail.models.disk import Disk
from dovetail.models.dtypes import FLOATS, shape_of
from dovetail.models.layouts import layout_of
from dovetail.models.targets import all_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKED = "packed.safetensors"
HEADER = "dovetail"
_CHUNK = 1 << 20
"""Weights that are searched for zeros, or filled with them, at a time."""


class PackedLayer(pydantic.BaseModel, extra="forbid", frozen=True):
    """A layer's entry in the header.

    shape      (out, in) of its weight as a matrix
    dtype      of the weight, or the one that codes are dequantized to
    quantizer  identity of its grid; None for a dense layer
    nonzero    number of stored values, where zeros are bits; None where all codes or weights are stored
    """

    shape: tuple[int, int]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    quantizer: Annotated[str, pydantic.Field(max_length=200)] | None
    nonzero: pydantic.NonNegativeInt | None


class PackedHeader(pydantic.BaseModel, extra="forbid", frozen=True):
    """The header of a packed model: the model's class, and its packed layers by path."""

    format: Literal["dovetail-packed"] = "dovetail-packed"
    version: Literal[1] = 1
    architecture: str
    layers: dict[str, PackedLayer]


@dataclass(frozen=True)
class PackedSize:
    """The size of a packed model on disk; pruned layers take more in memory (`dovetail.footprint`).

    nbytes           of packed.safetensors, its header included
    bits_per_weight  stored bits of the packed layers' weights (codes or values, masks, scales, zero points) over their
                     number of weights, zeros counted
    """

    nbytes: int
    bits_per_weight: float


def packed_size(directory: str | Path) -> PackedSize:
    """Return the size of a packed model on disk, from its header. Raises LoadError where the folder has none."""
    path = Path(directory) / PACKED
    with open_tensors(path, owner="a packed model's folder") as file:
        header = read_header(str(path), file)
        weights = sum(layer.shape[0] * layer.shape[1] for layer in header.layers.values())
        bits = 0
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if key.rpartition(".base.")[0] in header.layers:
                shape, dtype = shape_of(str(path), file, key)
                bits += 8 * dtype.itemsize * shape.numel()
    return PackedSize(nbytes=path.stat().st_size, bits_per_weight=bits / max(weights, 1))


def read_header(where: str, file: Any) -> PackedHeader:
    """Read the header of an open file. Raises LoadError."""
    text = (file.metadata() or {}).get(HEADER)
    if text is None:
        rule = f'the metadata of {PACKED} must contain a header under "{HEADER}"'
        raise LoadError(where, found="a file that save_packed did not write", rule=rule, fix="save the model again")
    rule = "the header must have the form that Dovetail writes"
    return parse_json(where, text, PackedHeader, rule=rule, fix="copy the folder again")


def stored(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield parameters and persistent buffers, each once with all its names; it is stored under the first."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from found.values()


def whole(name: str, base: Base) -> str:
    """Return the name of the tensor that is stored without its zeros."""
    return f"{name}.base." + ("dense" if base.quantized is None else "quantized.codes")


def _chunks(base: Base) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of the matrix, each a multiple of 8 rows."""
    o, i = base.shape
    step = max(8, _CHUNK // i // 8 * 8)
    for first in range(0, o, step):
        yield first, min(first + step, o)


def _numbers(base: Base) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the base as integers, in chunks, and the integer of zero: codes by rows, or the bits of a dense weight."""
    i = base.shape[1]
    for first, last in _chunks(base):
        if base.quantized is not None:
            codes, zero = base.quantized.codes_of(first, last)
            assert zero is not None
            yield codes.view(-1), zero.reshape(-1)
        else:
            assert base.dense is not None
            flat = base.dense.detach().reshape(-1)[first * i : last * i].view(INTEGERS[base.dtype.itemsize])
            yield flat, flat.new_zeros(1)


def has_zero(base: Base) -> bool:
    """Return whether zeros can be stored as bits: a grid may have none."""
    return base.quantized is None or base.quantized.zero_codes(*next(_chunks(base))) is not None


def split(base: Base) -> tuple[Tensor, Tensor, int]:
    """Return the mask, the stored values and their number; the base must have a zero."""
    mask, values = split_zeros(_numbers(base))
    stored = values.view(base.dtype) if base.quantized is None else pack(values, base.quantized.bits)
    return mask, stored, values.numel()


def join(base: Base, mask: Tensor, stored: Tensor, count: int) -> None:
    """Put a mask and stored values into the base, whose grid is set already; the reverse of `split`."""
    if base.quantized is not None:
        zeros = (_zero_codes(base.quantized, first, last) for first, last in _chunks(base))
        codes = join_zeros(mask, unpack(stored, base.quantized.bits, 0, count), zeros)
        base.set_quantized(base.quantized.with_codes(codes.view(base.shape)))
    else:
        assert base.dense is not None
        whole, i = INTEGERS[base.dtype.itemsize], base.shape[1]
        zeros = (torch.zeros((last - first) * i, dtype=whole) for first, last in _chunks(base))
        flat = join_zeros(mask, stored.view(whole), zeros).view(stored.dtype)
        base.dense = nn.Parameter(flat.view(base.dense.shape), requires_grad=False)


def _zero_codes(quantized: QuantizedWeight, first: int, last: int) -> Tensor:
    """Return the code of zero of each weight in these rows, (n * i,). ValueError where the grid has none."""
    zero = quantized.zero_codes(first, last)
    if zero is None:
        raise ValueError("a grid without a zero")
    return zero.expand(last - first, quantized.shape[1]).reshape(-1)


@torch.no_grad()
def save_packed(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    disk: Disk | None = None,
) -> PackedSize:
    """Write a packed model to a new or empty folder, atomically.

    model      a Hugging Face model merged with `merge(model, packed=True)`
    tokenizer  saved beside it; `dovetail.load` needs one
    disk       of the weights that stay on disk; it also takes the stored values until they are written
    returns    what it takes on disk
    errors     ChainError for a model that is not packed, DovetailError where the folder is not empty
    """
    from transformers import PreTrainedModel

    layers, directory = chain_layers(model), Path(directory).absolute()
    if not isinstance(model, PreTrainedModel) or not layers or any(m.record is not None for m in layers.values()):
        raise ChainError(
            f"save_packed of a {type(model).__name__}",
            found="a chain that is not merged" if layers else "no packed layer",
            rule="the model must be a Hugging Face model, merged and packed",
            fix="call dovetail.merge(model, packed=True)",
        )
    check_folder(directory)
    tensors, said = {names[0]: tensor.detach() for names, tensor in stored(model)}, {}
    for name, layer in layers.items():
        base, key, nonzero = layer.base, whole(name, layer.base), None
        if has_zero(base):
            mask, values, count = split(base)
            if mask.nbytes + values.nbytes < tensors[key].nbytes:
                del tensors[key]
                parts, nonzero = {f"{key}.mask": mask, f"{key}.values": values}, count
                tensors |= parts if disk is None else disk.store(f"packed-{len(said)}", parts)
            if disk is not None:
                disk.drop()
        said[name] = PackedLayer(
            shape=base.shape,
            dtype=str(base.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            quantizer=None if base.quantized is None else base.identity,
            nonzero=nonzero,
        )
    header = PackedHeader(architecture=type(model).__name__, layers=said)
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    config.dovetail = config.dovetail | {"packed_fingerprint": packed_fingerprint(model, disk)}
    with atomic(directory) as part:
        part.mkdir(parents=True)
        metadata = {HEADER: header.model_dump_json()}
        if disk is None:
            save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, part / PACKED, metadata=metadata)
        else:
            disk.write(part / PACKED, tensors, metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if model.can_generate():
            model.generation_config.save_pretrained(part)
        config.save_pretrained(part)
    return packed_size(directory)


@torch.no_grad()
def load_packed(folder: Path, config: PreTrainedConfig, auto: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """Load the model of a folder that `save_packed` wrote, on the CPU, packed, in eval mode, for `dovetail.load`.

    config  of the folder
    auto    the auto class that makes the model
    dtype   what the weights are cast to; None: as stored. Codes and scales always stay as stored
    errors  LoadError that names what is missing, unexpected, of another shape, not finite, or changed since it was
            saved; OSError and others for a file that cannot be read
    """
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    where, made = f"packed model {folder}", config.dtype or torch.float32
    with safe_open(folder / PACKED, framework="pt") as file:
        header = read_header(where, file)
        with torch.device("meta"):  # nothing is allocated before the file is known to hold what the config asks for
            _check(where, file, header, _cover(where, auto.from_config(config, dtype=made), header))
        with init_empty_weights(include_buffers=False):  # buffers that are not stored are made from the config
            model: PreTrainedModel = auto.from_config(config, dtype=made)
        model.tie_weights()
        with torch.device("meta"):
            _cover(where, model, header)
        _fill(where, file, header, model)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name, layer in chain_layers(model).items():
        if not bool(torch.isfinite(layer.base.matrix()).all()):
            found = f"{name}: weights that are NaN or infinite"
            rule = "weights, and scales times codes, must be finite"
            raise LoadError(where, found=found, rule=rule, fix="copy the folder again")
    note, found = getattr(config, "dovetail", None), packed_fingerprint(model)
    said = note.get("packed_fingerprint") if isinstance(note, dict) else None
    if found != said:
        rule = f"the fingerprint must be that of config.json: {said}"
        raise LoadError(where, found=f"tensors with fingerprint {found}", rule=rule, fix="copy the folder again")
    if dtype is not None:
        for layer in chain_layers(model).values():
            layer.to(dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    guard_saving(model)
    return model.requires_grad_(False).eval()


def _cover(where: str, model: PreTrainedModel, header: PackedHeader) -> PreTrainedModel:
    """Put packed layers without storage where the header names them."""
    if type(model).__name__ != header.architecture:
        rule, fix = "a packed model must load as the class that was saved", "pass the task_kind of the saved model"
        raise LoadError(where, found=f"{header.architecture}, not {type(model).__name__}", rule=rule, fix=fix)
    scratch = Scratch()
    open_experts(model, [layer for layer in all_layers(model) if layer.name in header.layers])
    covered = []
    for name, said in header.layers.items():
        try:
            module = model.get_submodule(name)
            layer = _layer(name, module, said, scratch)
        except (AttributeError, ValueError, DovetailError) as error:
            found, rule = str(error), "the header must name layers of the model, with their grids"
            if isinstance(error, DovetailError):
                found, rule = error.found, error.rule
            raise LoadError(where, found=f"{name[:200]}: {found}", rule=rule, fix="copy the folder again") from None
        covered.append((module, layer))
    replace_modules(model, covered)
    return model


def _layer(name: str, module: nn.Module, said: PackedLayer, scratch: Scratch) -> ChainLinear:
    layout = layout_of(name, module)
    site = Site(name, layout.out_features, layout.in_features, getattr(module, "bias", None) is not None)
    if said.shape != (layout.out_features, layout.in_features):
        rule = f"the layer must have {layout.out_features} x {layout.in_features} weights, by the config"
        raise LoadError(name, found=f"a layer of {said.shape[0]} x {said.shape[1]}", rule=rule)
    base = Base(layout, module.get_parameter("weight").detach().to(FLOATS[said.dtype]), scratch)
    if said.quantizer is not None:
        (link,) = chain(said.quantizer)
        if not isinstance(link, Quantizer):
            raise LoadError(name, found=said.quantizer, rule="the grid of a layer must be that of a quantizer")
        link.check(site)
        base.set_quantized(link.empty(base.shape))
    return ChainLinear(site, base, module.get_parameter("bias").detach() if site.has_bias else None)


def _check(where: str, file: Any, header: PackedHeader, model: PreTrainedModel) -> None:
    """Raise LoadError unless the file has the tensors of the model, by name, shape and dtype."""
    wanted = {names[0]: (tensor.shape, [tensor.dtype]) for names, tensor in stored(model)}
    of_layers = tuple(f"{name}.base." for name in header.layers)
    for key, (_, dtypes) in wanted.items():
        if dtypes[0].is_floating_point and not key.startswith(of_layers):
            dtypes += FLOATS.values()  # a model may keep some of its tensors in another precision
    for name, layer in chain_layers(model).items():
        count, key, base = header.layers[name].nonzero, whole(name, layer.base), layer.base
        if count is not None:
            shape, dtypes = wanted.pop(key)
            wanted[f"{key}.mask"] = (torch.Size([-(-base.shape[0] * base.shape[1] // 8)]), [torch.uint8])
            if base.quantized is not None:
                count, dtypes = packed_nbytes(count, base.quantized.bits), [torch.uint8]
            wanted[f"{key}.values"] = (torch.Size([count]), dtypes)
    given = set(file.keys())
    for key in sorted(given ^ set(wanted)):
        found = f"{key[:200]} " + ("in the file alone" if key in given else "missing from the file")
        rule = "the file must contain exactly the tensors of this model"
        raise LoadError(where, found=found, rule=rule, fix="copy the folder again")
    for key, (shape, dtypes) in wanted.items():
        found, dtype = shape_of(where, file, key)
        if found != shape or dtype not in dtypes:
            found, rule = f"{key} of shape {list(found)}, {dtype}", f"it must be {list(shape)}, {dtypes[0]}"
            raise LoadError(where, found=found, rule=rule, fix="copy the folder again")


def _fill(where: str, file: Any, header: PackedHeader, model: PreTrainedModel) -> None:
    """Read the tensors into the model, one after the other."""
    given = set(file.keys())
    for names, tensor in list(stored(model)):
        held = torch.empty(tensor.shape, dtype=tensor.dtype)  # for what is made below, of mask and values
        if names[0] in given:
            held = file.get_tensor(names[0]).clone()  # not a view of the file, which may change
        if isinstance(tensor, nn.Parameter):
            held = nn.Parameter(held, requires_grad=False)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, held)
    for name, layer in chain_layers(model).items():
        if (count := header.layers[name].nonzero) is not None:
            key = whole(name, layer.base)
            try:
                join(layer.base, file.get_tensor(f"{key}.mask"), file.get_tensor(f"{key}.values"), count)
            except ValueError as error:
                rule = "a mask must have one bit set for each stored value"
                raise LoadError(where, found=f"{key}: {error}", rule=rule, fix="copy the folder again") from None
