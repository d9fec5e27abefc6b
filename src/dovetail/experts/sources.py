"""Task vectors from what training left: a Dovetail adapter, a peft adapter, a fully fine-tuned checkpoint.

source                         names                            initial values
model under a chain            as in adapter.safetensors        drawn again from the chain's seed ("chain")
Dovetail adapter directory     the same                         the same
peft adapter directory         as in adapter_model.safetensors  1 for IA3's scales and so on (`peft_initial`, "peft")
checkpoint and its base        as in the base's state_dict      the base's weights ("base"), read tensor by tensor
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch import promote_types as promote
from transformers import PreTrainedModel

from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import Before, describe, load_adapter, parameters_of
from dovetail.checkpoint.formats.peft.write import CONFIG_FILE, TENSORS_FILE
from dovetail.compression.apply import initial_values
from dovetail.errors import LoadError
from dovetail.experts.bases import load_base
from dovetail.experts.peft_initial import check_projections, learned, peft_initial
from dovetail.experts.vectors import Origin, Spec, TaskVector
from dovetail.models.fingerprint import model_fingerprint
from dovetail.models.locate import resolve

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_JSON_NBYTES = 1 << 20


def task_vector(source: nn.Module | str | Path, base: nn.Module | str | Path | None = None) -> TaskVector:
    """What fine-tuning changed, by tensor: parameters less initial ones.

    source   a model under a chain (its stage in hand), a Dovetail or peft adapter directory, or the folder of a fully
             fine-tuned checkpoint
    base     the model before fine-tuning, or where `dovetail.load` finds it. Needed for Dovetail adapter directories
             and checkpoints; with it the vector knows its base, and experts made of it refuse another. A model given
             here is as it was afterwards
    returns  values in the dtypes that they were trained in; a checkpoint's in the one that holds both, made anew
             whenever they are asked for. Tensors that aren't floats are left out
    errors   LoadError for files that aren't whole, and for names or shapes that don't go together
    """
    if isinstance(source, nn.Module):
        return _of_chain(source)
    folder = _folder(source)
    if (folder / "adapter.json").is_file():
        shapes = {} if base is None or isinstance(base, nn.Module) else _Files(folder, "adapter.safetensors").shapes
        model = _model(source, base, shapes, read_config(folder / "adapter.json"))
        before = Before(model)
        try:
            load_adapter(model, folder)
            return _of_chain(model)
        finally:
            before.put_back()
    if (folder / CONFIG_FILE).is_file():
        files = _Files(folder, TENSORS_FILE)
        return _of_peft(folder, files, None if base is None else _model(source, base, files.shapes))
    if isinstance(base, nn.Module) and chain_layers(base):
        rule = "a checkpoint is compared with a model as it was pretrained"
        raise LoadError("base", found="a model that carries a chain", rule=rule, fix="merge it, or load it again")
    files = _Files(folder, "model.safetensors")
    return _of_checkpoint(folder, files, _model(source, base, files.shapes))


def _folder(source: str | Path) -> Path:
    """An existing folder that holds one of the things a task vector is of."""
    where, rule = f"task vector of {source}", "the folder of a Dovetail adapter, a peft adapter or a checkpoint"
    folder = Path(source).expanduser()
    if not folder.exists() and not isinstance(source, Path):
        found = resolve(source)
        folder = found if isinstance(found, Path) else folder
    if not folder.is_dir():
        raise LoadError(where, found="a file" if folder.exists() else "no such folder", rule=rule, fix="check the path")
    names = ("adapter.json", CONFIG_FILE, "model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in names):
        raise LoadError(where, found=f"none of {', '.join(names)}", rule=rule, fix="check the path")
    return folder


def _model(
    source: object,
    base: nn.Module | str | Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    adapter: dict[str, Any] | None = None,
) -> nn.Module:
    if base is None:
        fix = "base=model, or where it is (--base)"
        raise LoadError(f"task vector of {source}", found="no base", rule="it is a difference to the base", fix=fix)
    return base if isinstance(base, nn.Module) else load_base(base, shapes, adapter)[0]


def _of_chain(model: nn.Module) -> TaskVector:
    said = describe(model)
    initial = initial_values(model)
    tensors = {}
    for key, parameter in parameters_of(model).items():
        value = parameter.detach()
        start = initial.get(key.removeprefix("link/"))
        tensors[key] = value.clone() if start is None else value - start
    origin = Origin("chain", said.base_fingerprint, said.chain, said.model_dump(mode="json"))
    return TaskVector(tensors, origin)


def _of_peft(folder: Path, files: _Files, base: nn.Module | None) -> TaskVector:
    config = read_config(folder / CONFIG_FILE)
    names = learned(files.specs)
    check_projections(config, {name: files.read(name) for name in files.specs.keys() - set(names)})
    initial = peft_initial(config, {name: files.specs[name].shape for name in names}, base)
    tensors = {}
    for name in names:
        value, start = files.read(name), initial.get(name)
        tensors[name] = value if start is None else value - start.to(value.dtype)
    fingerprint = None if base is None else model_fingerprint(base)
    return TaskVector(tensors, Origin("peft", fingerprint, peft=config))


def read_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json, of any method. LoadError unless it is a JSON object of at most a MiB."""
    rule = f"a JSON object of at most {_JSON_NBYTES} bytes, as peft writes it"
    try:
        if path.stat().st_size > _JSON_NBYTES:
            raise LoadError(str(path), found=f"{path.stat().st_size} bytes", rule=rule)
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(str(path), found=str(error)[:200], rule=rule) from None
    if not isinstance(config, dict):
        raise LoadError(str(path), found=type(config).__name__, rule=rule)
    return config


def _of_checkpoint(folder: Path, files: _Files, base: nn.Module) -> TaskVector:
    starts = {name: tensor.detach() for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    prefix = f"{base.base_model_prefix}." if isinstance(base, PreTrainedModel) else ""
    keys: dict[str, str] = {}
    stored: dict[tuple[object, ...], str] = {}  # of tied weights one name is enough
    for key, spec in files.specs.items():
        name = key if key in starts else f"{prefix}{key}"  # checkpoints of a body alone lack its prefix
        where = f"{folder}, {key}"
        if name not in starts:
            raise LoadError(where, found="a tensor that the base lacks", rule="both have the same tensors")
        if tuple(starts[name].shape) != spec.shape:
            found, rule = f"shape {list(spec.shape)}", f"the base's is {list(starts[name].shape)}"
            raise LoadError(where, found=found, rule=rule)
        twin = stored.setdefault(_place(name, starts[name]), name)
        if twin == name:
            keys[name] = key
        elif not torch.equal(files.read(key), files.read(keys[twin])):
            rule = f"the base has one tensor for it and {twin}"
            raise LoadError(where, found="other values", rule=rule, fix="load the base with tie_word_embeddings=False")
    for name, start in starts.items():
        if _place(name, start) not in stored:
            raise LoadError(str(folder), found=f"no {name}", rule="both have the same tensors")
    specs = {n: Spec(files.specs[k].shape, promote(files.specs[k].dtype, starts[n].dtype)) for n, k in keys.items()}
    return TaskVector(_Difference(files, starts, keys, specs), Origin("base", model_fingerprint(base)), specs)


def _place(name: str, tensor: Tensor) -> tuple[object, ...]:
    """The same for two names of one tensor."""
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (name,)


@dataclass(frozen=True)
class _Difference(Mapping[str, Tensor]):
    """A checkpoint's files less a model's weights, one tensor at a time."""

    files: _Files
    starts: dict[str, Tensor]
    key_of: dict[str, str]
    specs: dict[str, Spec]

    def __getitem__(self, name: str) -> Tensor:
        wide = promote(self.specs[name].dtype, torch.float32)
        value = self.files.read(self.key_of[name]).to(wide)
        return (value - self.starts[name].to(value)).to(self.specs[name].dtype)  # not in place: it may be the file's

    def __iter__(self) -> Iterator[str]:
        return iter(self.key_of)

    def __len__(self) -> int:
        return len(self.key_of)


class _Files:
    """The float tensors of a safetensors file, or of the several that its index names; read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        index = folder / f"{name}.index.json"
        names = [name]
        if not (folder / name).is_file() and index.is_file():
            said = read_config(index).get("weight_map")
            names = sorted({str(part) for part in said.values()}) if isinstance(said, dict) else []
        self.specs: dict[str, Spec] = {}
        self._file_of: dict[str, Any] = {}
        for part in names:
            path = folder / part
            if Path(part).name != part:
                raise LoadError(str(index), found=f"a file {part[:200]!r}", rule="files lie beside their index")
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    some = file.get_slice(key)
                    if some.get_dtype() in _FLOATS:
                        self.specs[key] = Spec(tuple(some.get_shape()), _FLOATS[some.get_dtype()])
                        self._file_of[key] = file
            except (OSError, SafetensorError) as error:
                raise LoadError(
                    str(path), found=str(error)[:200], rule=f"a whole {name}", fix="copy it again"
                ) from None
        if not self.specs:
            raise LoadError(str(folder), found="no float tensor", rule=f"it holds {name}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, read now."""
        return self._file_of[key].get_tensor(key)
