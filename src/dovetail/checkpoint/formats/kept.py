"""A quantized Hugging Face folder as a model whose layers keep their own grid (`dovetail.load(..., grid="keep")`).

Formats that `dovetail export` writes are read: compressed-tensors, bitsandbytes, GPTQ, AWQ and MLX. A layer becomes a
packed layer with the codes, scales and zero points of the file, without a copy in floats. It is the layer of a
quantizer: `int(bits=4, group=128)` or `nf4(double=true)`. What is read is written again in memory and compared with the
file: a grid that Dovetail does not hold exactly is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.layer.attach import replace_modules
from dovetail.chains.layer.base import Base, Scratch
from dovetail.chains.layer.held import guard_saving
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Quantizer, Site, identity_of
from dovetail.checkpoint.formats.awq import AWQ
from dovetail.checkpoint.formats.bitsandbytes import BitsAndBytes
from dovetail.checkpoint.formats.compressed_tensors import CompressedTensors
from dovetail.checkpoint.formats.contract import Format
from dovetail.checkpoint.formats.gptq import GPTQFormat
from dovetail.checkpoint.formats.mlx import MLX
from dovetail.errors import LoadError
from dovetail.files import open_tensors
from dovetail.models.dtypes import FLOATS, STORED_FLOATS
from dovetail.models.layouts import LinearLayout, layout_of
from dovetail.models.targets import all_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_DTYPES = STORED_FLOATS | {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "U32": torch.uint32,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
"""Name of a dtype in a safetensors file -> dtype, of all that these formats store."""


def format_of(where: str, said: Any) -> Format | None:
    """Return the format of a config.json by its "quantization_config", None without one. Raises LoadError."""
    if not isinstance(said, dict):
        return None
    method = said.get("quant_method")
    if method == "compressed-tensors":
        _check_compressed_tensors(where, said)
        return CompressedTensors()
    if method == "bitsandbytes" and said.get("load_in_4bit", said.get("_load_in_4bit")):
        return BitsAndBytes()
    if method == "gptq":
        version = said.get("checkpoint_format") or said.get("format")
        if version in ("gptq", "gptq_v2", None):
            return GPTQFormat(2 if version == "gptq_v2" else 1)
        method = f"gptq, {version}"
    if method == "awq":
        if said.get("version", "gemm") == "gemm" and said.get("bits", 4) == 4:
            return AWQ()
        method = f"awq, {said.get('version')}"
    if method is None and {"bits", "group_size"} <= said.keys():
        return MLX()
    found, rule = (
        f"quant_method {method!r}"[:200],
        "grid=keep reads compressed-tensors, bitsandbytes in 4 bits, gptq, awq (gemm) and mlx",
    )
    raise LoadError(where, found=found, rule=rule, fix="load it without grid")


def _check_compressed_tensors(where: str, said: dict[str, Any]) -> None:
    """Raise LoadError where more than the weights is quantized, or where their codes have another width than stored."""
    groups = said.get("config_groups")
    schemes: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    found = ""
    if any(not isinstance(scheme, dict) for scheme in schemes):
        found = "a preset in config_groups, which may quantize activations"
    elif any(scheme.get("input_activations") or scheme.get("output_activations") for scheme in schemes):
        found = "quantized activations"
    elif other := [key for key in ("kv_cache_scheme", "sparsity_config", "transform_config") if said.get(key)]:
        found = other[0]
    else:
        weights = [scheme.get("weights") for scheme in schemes]
        bits = {each.get("num_bits") for each in weights if isinstance(each, dict)}
        if unread := bits - {2, 4, 8}:  # words of 5 codes of 6 bits, or of 4 of 7 bits, look like those of other widths
            found = f"num_bits {next(iter(unread))}"[:60]
    if found:
        rule = "only the weights must be quantized, to 2, 4 or 8 bits, without sparsity and transforms"
        raise LoadError(where, found=found, rule=rule, fix="load it without grid")


def forget_format(config: PreTrainedConfig) -> None:
    """Remove what a config says of the format: its layers are those of Dovetail, or stock ones."""
    for key in ("quantization_config", "quantization"):
        vars(config).pop(key, None)


class _Tensors:
    """The tensors of a checkpoint's files by name, read on demand."""

    def __init__(self, where: str, files: Mapping[Path, Any]) -> None:
        self.where = where
        self.owner = {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118 (not a dict)

    def get(self, key: str) -> Tensor:
        return self.owner[key].get_tensor(key)

    def parts(self, layer: str) -> dict[str, Tensor]:
        """Return the tensors below a layer's path, except its bias, without values."""
        found = {}
        for key, file in self.owner.items():
            if key.startswith(f"{layer}.") and key != f"{layer}.bias":
                one = file.get_slice(key)
                if (dtype := _DTYPES.get(one.get_dtype())) is None:
                    found_, rule = f"{key} of {one.get_dtype()}", "tensors must have dtypes of these formats"
                    raise LoadError(self.where, found=found_, rule=rule, fix="load it without grid")
                found[key.removeprefix(f"{layer}.")] = torch.empty(one.get_shape(), dtype=dtype, device="meta")
        return found


@contextmanager
def _opened(where: str, files: Sequence[Path]) -> Iterator[_Tensors]:
    with ExitStack() as stack:
        opened = {path: stack.enter_context(open_tensors(path, owner="a quantized model's folder")) for path in files}
        yield _Tensors(where, opened)


def _grids(form: Format, stored: _Tensors, model: nn.Module) -> dict[str, Quantizer]:
    """Return path of a layer -> its quantizer, of the quantized layers of a model."""
    found = {}
    for layer in all_layers(model):
        parts = stored.parts(layer.name)
        if set(parts) <= {"weight"} and all(part.is_floating_point() and part.itemsize > 1 for part in parts.values()):
            continue
        layout = layout_of(layer.name, layer.module)
        if not isinstance(layout, LinearLayout):
            rule = "only layers of nn.Linear can keep the grid of these formats"
            raise LoadError(f"{stored.where}: {layer.name}", found="another kind of layer", rule=rule)
        shape = (layout.out_features, layout.in_features)
        with _named(f"{stored.where}: {layer.name}"):
            link = form.grid(parts, lambda part, name=layer.name: stored.get(f"{name}.{part}"), shape)
        if link is not None:
            link.check(Site(layer.name, *shape, False))
            found[layer.name] = link
    if not found:
        rule, fix = f"a model in {form.name} must have quantized layers", "load it without grid"
        raise LoadError(stored.where, found="no layer with a grid", rule=rule, fix=fix)
    return found


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Name the layer in the errors of a format."""
    try:
        yield
    except LoadError as error:
        raise LoadError(where, found=error.found, rule=error.rule, fix=error.fix) from None
    except (RuntimeError, ValueError, KeyError, TypeError, OverflowError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rule, fix = "the tensors of a layer must have the forms of the format", "download the files again"
        raise LoadError(where, found=found, rule=rule, fix=fix) from None


def _note(source: Path, grids: Mapping[str, Quantizer], model: nn.Module) -> dict[str, Any]:
    """Return what config.json's "dovetail" says of a model on these grids (`dovetail.chains.layer.held`)."""
    own = {layer.name: grids.get(layer.name) for layer in all_layers(model)}
    return {
        "chain": "keep",
        "quantizer": "keep",
        "base_fingerprint": "unknown",
        "source": str(source),
        "layers": {name: {"quantizer": None if link is None else identity_of(link)} for name, link in own.items()},
    }


def folder_note(where: str, folder: Path, files: Sequence[Path], form: Format, model: nn.Module) -> dict[str, Any]:
    """Return the note on a folder's grids, for a model without storage; only small tensors are read."""
    with _opened(where, files) as stored:
        return _note(folder, _grids(form, stored, model), model)


@torch.no_grad()
def load_kept_folder(
    where: str,
    folder: Path,
    files: Sequence[Path],
    form: Format,
    config: PreTrainedConfig,
    auto: Any,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Load a quantized folder as a packed model on its own grids, on the CPU, in eval mode, for `dovetail.load`.

    files   with the weights
    dtype   of the dense tensors, and to which codes are dequantized when a layer runs
    errors  LoadError for grids that Dovetail does not hold, tensors of other shapes, and weights that are missing
    """
    from accelerate import init_empty_weights

    forget_format(config)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    model.tie_weights()
    with _opened(where, files) as stored:
        grids = _grids(form, stored, model)
        model.config.dovetail = _note(folder, grids, model)
        _fill_dense(stored, model, grids, dtype)
        model.tie_weights()
        scratch, layers = Scratch(), []
        for name, link in grids.items():
            module = model.get_submodule(name)
            layout = layout_of(name, module)
            base = Base(layout, torch.empty(0, dtype=dtype), scratch)
            with _named(f"{where}: {name}"):
                base.set_quantized(_read(form, stored, name, link, (layout.out_features, layout.in_features)))
            bias = getattr(module, "bias", None)
            site = Site(name, layout.out_features, layout.in_features, bias is not None)
            layers.append((module, ChainLinear(site, base, None if bias is None else bias.detach())))
    replace_modules(model, layers)
    missing = sorted(name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta)
    if missing:
        found = f"{len(missing)} weights of {type(model).__name__} not stored, first {missing[0]}"
        fix = "load it without grid: transformers may convert the names of this family, or make a new head"
        raise LoadError(where, found=found, rule="the folder must contain every weight by its name", fix=fix)
    guard_saving(model)
    return model.requires_grad_(False).eval()


def _read(form: Format, stored: _Tensors, name: str, link: Quantizer, shape: tuple[int, int]) -> QuantizedWeight:
    """Return the weight of a layer; raise LoadError where it is not exactly what the file holds."""
    tensors = {part: stored.get(f"{name}.{part}") for part in stored.parts(name)}
    floats = [t.dtype for part, t in tensors.items() if t.dtype in FLOATS.values() and "scale" in part]
    quantized = form.read(tensors, link.empty(shape))
    encoded = form.encode(quantized, floats[0] if floats else torch.float32)
    if extra := sorted(tensors.keys() - encoded.keys()):
        rule = f"a quantized layer must have the tensors of {form.name} alone"
        raise LoadError(name, found=", ".join(extra)[:200], rule=rule, fix="load it without grid")
    for part, tensor in encoded.items():
        if part.startswith("weight.quant_state"):
            continue  # text of JSON, whose numbers `read` has checked
        given = tensors.get(part)
        if given is None or given.shape != tensor.shape or not _same_numbers(given, tensor):
            rule = "the grid of a layer must be one that Dovetail writes back in the same numbers"
            raise LoadError(
                name, found=f"{part}, which it does not hold exactly", rule=rule, fix="load it without grid"
            )
    return quantized


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    if one.dtype in FLOATS.values() and other.dtype in FLOATS.values():
        return torch.equal(one.double(), other.double())
    if one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _fill_dense(stored: _Tensors, model: nn.Module, grids: Mapping[str, Quantizer], dtype: torch.dtype) -> None:
    """Put the tensors that belong to no quantized layer in their places."""
    for key in stored.owner:
        owner, _, leaf = key.rpartition(".")
        parts = key.split(".")
        if leaf != "bias" and any(".".join(parts[:end]) in grids for end in range(1, len(parts))):
            continue
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue  # weights of parts that this class lacks
        wanted = module._parameters.get(leaf)
        if wanted is None:
            _check_unused(stored, key, model, module)
            continue
        tensor = stored.get(key)
        if tensor.shape != wanted.shape or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            found = f"{key} stored as {list(tensor.shape)} of {tensor.dtype}, the model has {list(wanted.shape)}"
            rule = "dense tensors must be finite and have the shapes that config.json asks for"
            raise LoadError(stored.where, found=found, rule=rule, fix="download the files again")
        module._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)


def _check_unused(stored: _Tensors, key: str, model: nn.Module, module: nn.Module) -> None:
    """Raise LoadError for a tensor of a module that has no parameter of its name, unless it changes nothing."""
    leaf, ignored = key.rpartition(".")[2], getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if leaf in module._buffers or any(re.search(pattern, key) for pattern in ignored):
        return
    if leaf == "bias" and not bool(stored.get(key).any()):
        return  # of older versions of GPTQ's tools, which gave every layer one
    rule, fix = f"{type(module).__name__} must have a parameter for each of its tensors", "load it without grid"
    raise LoadError(stored.where, found=f"{key}, which the model does not have", rule=rule, fix=fix)
