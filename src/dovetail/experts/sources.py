"""Task vectors of the results of training: a Dovetail adapter, a peft adapter, a fully fine-tuned checkpoint.

source                         names                            initial values
model with a chain             as in adapter.safetensors        drawn again from the chain's seed ("chain")
Dovetail adapter directory     the same                         the same
peft adapter directory         as in adapter_model.safetensors  those of `peft_adapters.peft_initial` ("peft")
checkpoint and its base        as in the base's state_dict      the base's weights ("base"), read tensor by tensor

A checkpoint whose names transformers converts or ignores is loaded whole, by transformers.

`load_base` loads the base model of a task vector with the head and the dtype that the vector was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch import promote_types as promote
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import Before, describe, load_adapter, parameters_of
from dovetail.checkpoint.formats.peft.read import refuse_pickle
from dovetail.checkpoint.formats.peft.write import CLASSIFIER_HEADS, CONFIG_FILE, TENSORS_FILE
from dovetail.checkpoint.load import load, load_like
from dovetail.compression.apply import initial_values
from dovetail.errors import LoadError
from dovetail.experts.expert import Expert
from dovetail.experts.peft_adapters import (
    check_complete,
    check_config,
    check_projections,
    learned,
    peft_initial,
    without_twins,
)
from dovetail.experts.vectors import Origin, Spec, TaskVector, specs_of
from dovetail.files import read_json
from dovetail.models.dtypes import FLOATS, STORED_FLOATS
from dovetail.models.fingerprint import model_fingerprint
from dovetail.models.locate import resolve
from dovetail.models.targets import inside, new_heads

_PREFIXES = ("head/", "base_model.model.")


def task_vector(source: nn.Module | str | Path, base: nn.Module | str | Path | None = None) -> TaskVector:
    """Return the task vector of a source: fine-tuned minus initial parameters, by tensor.

    source   a model with a chain (its current stage), a Dovetail or peft adapter directory, or the folder of a fully
             fine-tuned checkpoint
    base     the model before fine-tuning, or where `dovetail.load` finds it. Needed for Dovetail adapter directories
             and checkpoints. With it the vector names its base, and its experts refuse other bases. A model stays
             unchanged
    returns  values in the dtypes of training; those of a checkpoint in a dtype that holds both, computed at each
             access. Tensors of integers are left out
    errors   LoadError for incomplete files, and for names or shapes that differ from the base's
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
    if isinstance(base, nn.Module) and chain_layers(base):
        rule = "the base of a checkpoint or a peft adapter must be a plain model"
        raise LoadError("base", found="a model with a chain", rule=rule, fix="load the model again")
    if (folder / CONFIG_FILE).is_file():
        config = read_config(folder / CONFIG_FILE)
        check_config(config)
        refuse_pickle(folder)
        files = _Files(folder, TENSORS_FILE)
        return _of_peft(folder, config, files, None if base is None else _model(source, base, files.shapes))
    files = _Files(folder, "model.safetensors")
    return _of_checkpoint(folder, files, _model(source, base, files.shapes))


def _folder(source: str | Path) -> Path:
    """Return the source as an existing folder with an adapter or a checkpoint."""
    where = f"task vector of {source}"
    rule = "the source must be the folder of a Dovetail adapter, a peft adapter or a checkpoint"
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
        rule, fix = "a difference to the base needs the base", "pass base=MODEL (--base MODEL)"
        raise LoadError(f"task vector of {source}", found="no base", rule=rule, fix=fix)
    return base if isinstance(base, nn.Module) else load_base(base, shapes, adapter)[0]


def _of_chain(model: nn.Module) -> TaskVector:
    said = describe(model)
    initial, heads = initial_values(model), new_heads(model)
    tensors = {}
    for key, parameter in parameters_of(model).items():
        value = parameter.detach()
        start = initial.get(key.removeprefix("link/"))
        tensors[key] = value.clone() if start is None else value - start
        if start is None and not inside(key.removeprefix("head/"), heads):
            found, rule = "a tensor of the base, trained beside the chain", "the initial value must be known"
            fix = "freeze it before training, or pack the adapter that it was imported from"
            raise LoadError(f"task vector at {key}"[:300], found=found, rule=rule, fix=fix)
    origin = Origin("chain", said.base_fingerprint, said.chain, said.model_dump(mode="json", exclude={"digest"}))
    return TaskVector(tensors, origin)


def _of_peft(folder: Path, config: dict[str, Any], files: _Files, base: nn.Module | None) -> TaskVector:
    for name in files.others:
        rule = "every tensor of a peft adapter must be a float, because an expert holds no others"
        raise LoadError(f"{folder}, {name}"[:300], found="integers", rule=rule, fix="load it with peft")
    names = learned(files.specs)
    check_projections(config, {name: files.read(name) for name in files.specs.keys() - set(names)})
    twins = without_twins(config, names, base)
    for name, twin in twins.items():
        if not torch.equal(files.read(name), files.read(twin)):
            rule = f"it must equal {twin}, to which the base ties it"
            raise LoadError(f"{folder}, {name}"[:300], found="other values", rule=rule, fix="save it with peft again")
    names = [name for name in names if name not in twins]
    initial = peft_initial(config, {name: files.specs[name].shape for name in names}, base)
    check_complete(config, names, base)
    tensors = {}
    for name in names:
        value, start = files.read(name), initial.get(name)
        tensors[name] = value if start is None else value - start.to(value.dtype)
    fingerprint = None if base is None else model_fingerprint(base)
    return TaskVector(tensors, Origin("peft", fingerprint, peft=config))


def read_config(path: Path) -> dict[str, Any]:
    """Read the JSON object of a configuration. LoadError unless the file holds one, of at most a MiB."""
    return read_json(path, dict[str, Any], rule="the file must be a JSON object, as peft writes it")


def _of_checkpoint(folder: Path, files: _Files, base: nn.Module) -> TaskVector:
    starts = {name: tensor.detach() for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    stored: _Files | _Converted = files
    prefix = f"{base.base_model_prefix}." if isinstance(base, PreTrainedModel) else ""
    if isinstance(base, PreTrainedModel) and any(
        key not in starts and prefix + key not in starts for key in files.specs
    ):
        stored = _converted(folder, files, base)
    keys: dict[str, str] = {}
    places: dict[tuple[object, ...], str] = {}  # tied weights count under one name
    for key, spec in stored.specs.items():
        name = key if key in starts else f"{prefix}{key}"  # a checkpoint of the body alone lacks its prefix
        where = f"{folder}, {key}"
        if name not in starts:
            raise LoadError(where, found="a tensor that the base lacks", rule="both must have the same tensors")
        if tuple(starts[name].shape) != spec.shape:
            found, rule = f"shape {list(spec.shape)}", f"it must be {list(starts[name].shape)}, as in the base"
            raise LoadError(where, found=found, rule=rule)
        twin = places.setdefault(_place(name, starts[name]), name)
        if twin == name:
            keys[name] = key
        elif not torch.equal(stored.read(key), stored.read(keys[twin])):
            rule = f"it must equal {twin}, to which the base ties it"
            raise LoadError(where, found="other values", rule=rule, fix="load the base with tie_word_embeddings=False")
    for name, start in starts.items():
        if _place(name, start) not in places:
            raise LoadError(str(folder), found=f"no {name}", rule="both must have the same tensors")
    specs = {n: Spec(stored.specs[k].shape, promote(stored.specs[k].dtype, starts[n].dtype)) for n, k in keys.items()}
    return TaskVector(_Difference(stored, starts, keys, specs), Origin("base", model_fingerprint(base)), specs)


def _converted(folder: Path, files: _Files, base: PreTrainedModel) -> _Converted:
    """Load a checkpoint whose names transformers converts or ignores, such as those of Mixtral's MoE experts."""
    dtypes = [spec.dtype for spec in files.specs.values()]
    model, info = load_like(folder, base, reduce(promote, dtypes))
    rule = "both must have the same tensors"
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        rule = f"it must be {list(wanted)}, as in the base"
        raise LoadError(f"{folder}, {key}", found=f"shape {list(stored)}", rule=rule)
    for key in sorted(info["unexpected_keys"]):
        raise LoadError(f"{folder}, {key}", found="a tensor that the base lacks", rule=rule)
    for key in sorted(info["missing_keys"]):
        raise LoadError(str(folder), found=f"no {key}", rule=rule)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return _Converted(tensors)


def _place(name: str, tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two names of one tensor."""
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (name,)


@dataclass(frozen=True)
class _Difference(Mapping[str, Tensor]):
    """The files of a checkpoint minus the weights of a model, one tensor at a time."""

    files: _Files | _Converted
    starts: dict[str, Tensor]
    key_of: dict[str, str]
    specs: dict[str, Spec]

    def __getitem__(self, name: str) -> Tensor:
        wide = promote(self.specs[name].dtype, torch.float32)
        value = self.files.read(self.key_of[name]).to(wide)
        difference = value - self.starts[name].to(value)  # not in place: the value may be a view of the file
        return difference.to(self.specs[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.key_of)

    def __len__(self) -> int:
        return len(self.key_of)


@dataclass(frozen=True)
class _Converted:
    """The float tensors of a loaded model, under its names."""

    tensors: dict[str, Tensor]

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        return self.tensors[key]


class _Files:
    """The float tensors of a safetensors file, or of the files that its index names; read one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        index, shards = folder / f"{name}.index.json", {}
        names = [name]
        if not (folder / name).is_file() and index.is_file():
            shards = _shards(index)
            names = sorted(set(shards.values()))
        self.specs: dict[str, Spec] = {}
        self.others: list[str] = []
        self._file_of: dict[str, Any] = {}
        for part in names:
            path = folder / part
            if Path(part).name != part:
                rule, fix = "the files must be in the folder of the index", "save the checkpoint again"
                raise LoadError(str(index), found=f"a file {part[:200]!r}", rule=rule, fix=fix)
            try:
                file = safe_open(path, framework="pt")
                keys = list(file.keys())
                for key in keys:
                    some = file.get_slice(key)
                    if some.get_dtype() in STORED_FLOATS:
                        self.specs[key] = Spec(tuple(some.get_shape()), STORED_FLOATS[some.get_dtype()])
                        self._file_of[key] = file
                    else:
                        self.others.append(key)
            except (OSError, SafetensorError) as error:
                rule = f"the file must be a complete {name}"
                raise LoadError(str(path), found=str(error)[:200], rule=rule, fix="copy it again") from None
            for key in sorted(set(keys) ^ {key for key, shard in shards.items() if shard == part}) if shards else ():
                found = f"{key}, " + ("which the index does not list" if key in keys else f"not in {part}")
                rule, fix = "the index must list exactly the tensors of its files", "copy the folder again"
                raise LoadError(str(index), found=found[:300], rule=rule, fix=fix)
        if not self.specs:
            rule = f"the folder must contain a {name} with float tensors"
            raise LoadError(str(folder), found="no float tensor", rule=rule, fix="check the path")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._file_of[key].get_tensor(key)


def _shards(index: Path) -> dict[str, str]:
    """Return tensor -> file of an index. LoadError unless it lists every numbered file of its set."""
    said = read_config(index).get("weight_map")
    rule, fix = "the index must list the file of every tensor, and every file of its set", "copy the folder again"
    if not isinstance(said, dict) or not said or not all(isinstance(part, str) for part in said.values()):
        raise LoadError(str(index), found="no weight_map", rule=rule, fix=fix)
    named = set(said.values())
    for part in sorted(named):
        if match := re.fullmatch(r"(.*-)(\d{1,6})(-of-)(\d{1,6})(\.safetensors)", part):
            before, number, of, count, end = match.groups()
            every = (f"{before}{place:0{len(number)}d}{of}{count}{end}" for place in range(1, int(count) + 1))
            if missing := next((name for name in every if name not in named), None):
                raise LoadError(str(index), found=f"no tensor of {missing}"[:300], rule=rule, fix=fix)
    return said


def load_base(
    where: str | Path, shapes: Mapping[str, tuple[int, ...]], adapter: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base and its tokenizer.

    where    as for `dovetail.load`
    shapes   of the task vector; if it has a classifier's head, the base gets one with as many labels
    adapter  adapter.json, which holds the dtype; None: as stored
    """
    outputs = []
    for name, shape in shapes.items():
        path = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        if shape and path.split(".")[0] in CLASSIFIER_HEADS:
            outputs.append(shape[0])
    labels = min(outputs, default=0)  # the last layer of a head is the narrowest
    kind = "generation" if not labels else "regression" if labels == 1 else "classification"
    said = (adapter or {}).get("dtype")
    dtype = said if isinstance(said, str) and said in FLOATS else None
    return load(where, task_kind=kind, num_labels=labels if labels > 1 else None, dtype=dtype)


def base_of(source: Expert | TaskVector, where: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base of an expert or a task vector (`load_base`)."""
    shapes = source.shapes if isinstance(source, Expert) else {n: spec.shape for n, spec in specs_of(source).items()}
    return load_base(where, shapes, source.origin.adapter)
