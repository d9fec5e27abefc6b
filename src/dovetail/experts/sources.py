"""Task vectors of the results of training: a Dovetail adapter, a peft adapter, a fully fine-tuned checkpoint.

source                         names                            initial values
model with a chain             as in adapter.safetensors        drawn again from the chain's seed ("chain")
Dovetail adapter directory     the same                         the same
peft adapter directory         as in adapter_model.safetensors  those of `peft_initial` ("peft")
checkpoint and its base        as in the base's state_dict      the base's weights ("base"), read tensor by tensor

`load_base` loads the base model of a task vector with the head and the dtype that the vector was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch import promote_types as promote
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import Before, describe, load_adapter, parameters_of
from dovetail.checkpoint.formats.peft.write import CLASSIFIER_HEADS, CONFIG_FILE, PREFIX, TENSORS_FILE
from dovetail.checkpoint.load import load
from dovetail.compression.apply import initial_values
from dovetail.errors import DovetailError, LoadError
from dovetail.experts.expert import Expert
from dovetail.experts.vectors import Origin, Spec, TaskVector, specs_of
from dovetail.files import read_json
from dovetail.links.adapt import VeRA
from dovetail.models.dtypes import FLOATS, STORED_FLOATS
from dovetail.models.fingerprint import model_fingerprint
from dovetail.models.layouts import layout_of
from dovetail.models.locate import resolve

_CONSTANTS = (*VeRA.peft_constants.values(), "base_model.model.vera_A", "base_model.model.vera_B")
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
    if (folder / CONFIG_FILE).is_file():
        files = _Files(folder, TENSORS_FILE)
        return _of_peft(folder, files, None if base is None else _model(source, base, files.shapes))
    if isinstance(base, nn.Module) and chain_layers(base):
        rule = "the base of a checkpoint must be a plain model"
        raise LoadError("base", found="a model with a chain", rule=rule, fix="load the model again")
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
    initial = initial_values(model)
    tensors = {}
    for key, parameter in parameters_of(model).items():
        value = parameter.detach()
        start = initial.get(key.removeprefix("link/"))
        tensors[key] = value.clone() if start is None else value - start
    origin = Origin("chain", said.base_fingerprint, said.chain, said.model_dump(mode="json", exclude={"digest"}))
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
    """Read the JSON object of a configuration. LoadError unless the file holds one, of at most a MiB."""
    return read_json(path, dict[str, Any], rule="the file must be a JSON object, as peft writes it")


def _of_checkpoint(folder: Path, files: _Files, base: nn.Module) -> TaskVector:
    starts = {name: tensor.detach() for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    prefix = f"{base.base_model_prefix}." if isinstance(base, PreTrainedModel) else ""
    keys: dict[str, str] = {}
    stored: dict[tuple[object, ...], str] = {}  # tied weights count under one name
    for key, spec in files.specs.items():
        name = key if key in starts else f"{prefix}{key}"  # a checkpoint of the body alone lacks its prefix
        where = f"{folder}, {key}"
        if name not in starts:
            raise LoadError(where, found="a tensor that the base lacks", rule="both must have the same tensors")
        if tuple(starts[name].shape) != spec.shape:
            found, rule = f"shape {list(spec.shape)}", f"it must be {list(starts[name].shape)}, as in the base"
            raise LoadError(where, found=found, rule=rule)
        twin = stored.setdefault(_place(name, starts[name]), name)
        if twin == name:
            keys[name] = key
        elif not torch.equal(files.read(key), files.read(keys[twin])):
            rule = f"it must equal {twin}, to which the base ties it"
            raise LoadError(where, found="other values", rule=rule, fix="load the base with tie_word_embeddings=False")
    for name, start in starts.items():
        if _place(name, start) not in stored:
            raise LoadError(str(folder), found=f"no {name}", rule="both must have the same tensors")
    specs = {n: Spec(files.specs[k].shape, promote(files.specs[k].dtype, starts[n].dtype)) for n, k in keys.items()}
    return TaskVector(_Difference(files, starts, keys, specs), Origin("base", model_fingerprint(base)), specs)


def _place(name: str, tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two names of one tensor."""
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else (name,)


@dataclass(frozen=True)
class _Difference(Mapping[str, Tensor]):
    """The files of a checkpoint minus the weights of a model, one tensor at a time."""

    files: _Files
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


class _Files:
    """The float tensors of a safetensors file, or of the files that its index names; read one by one."""

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
                rule, fix = "the files must be in the folder of the index", "save the checkpoint again"
                raise LoadError(str(index), found=f"a file {part[:200]!r}", rule=rule, fix=fix)
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    some = file.get_slice(key)
                    if some.get_dtype() in STORED_FLOATS:
                        self.specs[key] = Spec(tuple(some.get_shape()), STORED_FLOATS[some.get_dtype()])
                        self._file_of[key] = file
            except (OSError, SafetensorError) as error:
                rule = f"the file must be a complete {name}"
                raise LoadError(str(path), found=str(error)[:200], rule=rule, fix="copy it again") from None
        if not self.specs:
            rule = f"the folder must contain a {name} with float tensors"
            raise LoadError(str(folder), found="no float tensor", rule=rule, fix="check the path")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, key: str) -> Tensor:
        """Read one tensor."""
        return self._file_of[key].get_tensor(key)


def learned(names: Iterable[str]) -> list[str]:
    """Return the names without VeRA's projections, which are drawn from the config's key and never trained."""
    return [name for name in names if not name.startswith(_CONSTANTS)]


def check_projections(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise LoadError for VeRA projections that the config's key does not draw: an expert holds only the key."""
    stored = {name[-1]: tensor for name, tensor in tensors.items() if name.startswith(_CONSTANTS) and tensor.ndim == 2}
    if stored.keys() != {"A", "B"}:
        return
    a, b = stored["A"], stored["B"]
    try:
        drawn = VeRA(r=a.shape[0]).constants((b.shape[0], a.shape[1]), config["projection_prng_key"], torch.float32)
        same = all(torch.allclose(drawn[key].to(t.dtype).float(), t.float(), rtol=1e-2) for key, t in stored.items())
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError, DovetailError):
        same = False
    if not same:
        rule = "VeRA's projections must be those drawn from projection_prng_key: an expert does not hold them"
        raise LoadError("peft adapter", found="other projections", rule=rule)


def peft_initial(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: nn.Module | None
) -> dict[str, Tensor]:
    """Return a peft adapter's initial values by tensor, float32 on the CPU; tensors without an entry start at 0.

        ia3_l                    1
        vera_lambda_d            d_initial
        lora_magnitude_vector    row norms of the base's weight (DoRA §4.1)
        modules_to_save          the base's own weights; 0 for a new classifier

    The A of a LoRA starts at random numbers that its files do not contain. Its initial value counts as 0, as in
    ComPEFT's released experts. That of a Dovetail adapter is known from its seed.

    config  adapter_config.json
    shapes  of the adapter's tensors, by their names in adapter_model.safetensors
    base    the model of the adapter, with or without it; needed only for magnitudes and saved modules
    errors  LoadError if the base is needed and missing, or lacks a layer
    """
    found, saved = {}, tuple(config.get("modules_to_save") or ())
    for name, shape in shapes.items():
        path, _, last = name.removeprefix(PREFIX).rpartition(".")
        if last == "ia3_l":
            found[name] = torch.ones(shape)
        elif last == "vera_lambda_d":
            found[name] = torch.full(shape, float(config.get("d_initial", 0.1)))
        elif last == "lora_magnitude_vector" or path.endswith("lora_magnitude_vector"):
            layer = _module(base, path.removesuffix(".lora_magnitude_vector"), name)
            weight_oi = layout_of(name, layer).matrix(layer.get_parameter("weight").detach())
            found[name] = weight_oi.float().norm(dim=1).cpu().view(shape)
        elif saved and path.endswith(saved) and not path.endswith(CLASSIFIER_HEADS):
            found[name] = _module(base, path, name).get_parameter(last).detach().float().cpu()
    for name, start in found.items():
        if tuple(start.shape) != shapes[name]:
            rule = f"it must be {list(start.shape)}, as in the base"
            raise LoadError(f"task vector at {name}", found=f"shape {list(shapes[name])}", rule=rule)
    return found


def _module(base: nn.Module | None, path: str, name: str) -> nn.Module:
    if base is None:
        rule = "the base is needed, since the initial values are its weights"
        raise LoadError(f"task vector at {name}", found="no base", rule=rule, fix="pass base=MODEL (--base MODEL)")
    for inside in (f"{path}.base_layer", f"{path}.original_module", path):  # as stock peft wraps it
        try:
            return base.get_submodule(inside)
        except AttributeError:
            continue
    rule = "the base must contain the layers of the adapter"
    raise LoadError(f"task vector at {name}", found="no such layer in the base", rule=rule, fix="pass another base")


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
