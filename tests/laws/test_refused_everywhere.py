"""Law: a peft adapter that `import_peft` refuses because its tensors do not describe it, `pack` and `activate` refuse.

Such an adapter changes the base when peft loads it, has a field or a method that nobody knows, or is no whole file of
safetensors. What import refuses because no link can express it (biases, trained tokens) still packs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dovetail import experts
from dovetail.checkpoint.formats.peft import import_peft
from dovetail.cli.main import app
from dovetail.errors import LoadError
from peft_settings import base_of, config_of, tuned

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

FIELDS: dict[str, dict[str, Any]] = {
    **{kind: {"init_lora_weights": kind} for kind in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "later")},
    "invented field": {"invented_in_2031": "yes"},
    "invented number": {"rank_of_everything": 3},
    "no method": {"peft_type": None},
    "a list": {"peft_type": ["LORA"]},
    "unknown method": {"peft_type": "LORA2"},
}


def changed(folder: Path, fields: dict[str, Any], setting: str = "lora") -> dict[str, Any]:
    """Save an adapter with these fields in its config, and return the config."""
    tuned("llama", config_of("llama", setting), folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("setting", ["lora", "dora", "rslora"])
def test_a_config_that_import_refuses(fields: str, setting: str, tmp_path: Path) -> None:
    changed(tmp_path, {}, setting)
    vector = experts.task_vector(tmp_path, base_of("llama"))
    good = experts.compress(vector, 0.5)
    config = changed(tmp_path, FIELDS[fields], setting)
    with pytest.raises(LoadError):
        import_peft(base_of("llama"), tmp_path)
    with pytest.raises(LoadError):
        experts.task_vector(tmp_path, base_of("llama"))
    # An expert of an earlier version, which did not ask.
    old = experts.Expert(good.header.model_copy(update={"peft": config}), good.coded)
    live = peft.get_peft_model(base_of("llama"), config_of("llama", setting))
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with pytest.raises(LoadError):
        experts.activate(live, old)
    with pytest.raises(LoadError):
        experts.put(live, experts.TaskVector(dict(vector), replace(vector.origin, peft=config)))
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())
    with pytest.raises(LoadError):
        experts.unpack(old, tmp_path / "back", base_of("llama"))
    assert not (tmp_path / "back").exists()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def shards(change: Callable[[dict[str, Any], Path], Any]) -> Callable[[Path], None]:
    """Split the adapter into two files and change its index."""

    def split(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        names = sorted(tensors)
        parts = {f"adapter_model-0000{at}-of-00002.safetensors": names[at - 1 :: 2] for at in (1, 2)}
        for part, own in parts.items():
            save_file({name: tensors[name] for name in own}, folder / part)
        file.unlink()
        index = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
        change(index, folder)
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))

    return split


def without_a_shard(index: dict[str, Any], folder: Path) -> None:
    index["weight_map"] = {name: part for name, part in index["weight_map"].items() if "-00001-" in part}


def without_a_tensor(index: dict[str, Any], folder: Path) -> None:
    del index["weight_map"][sorted(index["weight_map"])[0]]


def with_another_tensor(index: dict[str, Any], folder: Path) -> None:
    index["weight_map"]["base_model.model.other"] = next(iter(index["weight_map"].values()))


def without_the_file(index: dict[str, Any], folder: Path) -> None:
    (folder / "adapter_model-00002-of-00002.safetensors").unlink()


def integers(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.extra": torch.zeros(2, dtype=torch.int32)}, file)


def without_a_parameter(folder: Path) -> None:
    """Remove the last tensor of a layer, which peft would draw anew."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[sorted(name for name in tensors if "layers.1" in name)[0]]
    save_file(tensors, file)


FILES: dict[str, Callable[[Path], None]] = {
    "a pickle": pickled,
    "no shard": shards(without_a_shard),
    "no tensor": shards(without_a_tensor),
    "another tensor": shards(with_another_tensor),
    "no file": shards(without_the_file),
    "an empty index": shards(lambda index, folder: index.update(weight_map={})),
    "integers": integers,
    "cut": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
    "nothing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("change", FILES)
@pytest.mark.parametrize("setting", ["lora", "ia3"])
def test_a_file_that_import_refuses(change: str, setting: str, tmp_path: Path) -> None:
    changed(tmp_path, {}, setting)
    FILES[change](tmp_path)
    with pytest.raises(LoadError):
        import_peft(base_of("llama"), tmp_path)
    with pytest.raises(LoadError):
        experts.task_vector(tmp_path, base_of("llama"))


@pytest.mark.parametrize("setting", ["lora", "dora", "rslora", "loha", "vera", "head", "norm"])
def test_a_layer_without_a_parameter(setting: str, tmp_path: Path) -> None:
    changed(tmp_path, {}, setting)
    without_a_parameter(tmp_path)
    with pytest.raises(LoadError):
        import_peft(base_of("llama"), tmp_path)
    with pytest.raises(LoadError, match="missing from the file"):
        experts.task_vector(tmp_path, base_of("llama"))


@pytest.mark.parametrize("setting", ["head", "norm", "both"])
def test_a_saved_module_without_its_tensor(setting: str, tmp_path: Path) -> None:
    changed(tmp_path, {}, setting)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers" in name}
    save_file(tensors, file)
    with pytest.raises(LoadError, match="missing from the file"):
        import_peft(base_of("llama"), tmp_path)
    with pytest.raises(LoadError, match="missing from the file"):
        experts.task_vector(tmp_path, base_of("llama"))


@pytest.mark.parametrize("change", ["a pickle", "no shard"])
def test_the_command_says_so_and_writes_nothing(change: str, tmp_path: Path) -> None:
    changed(tmp_path / "a", {})
    FILES[change](tmp_path / "a")
    result = CliRunner().invoke(app, ["pack", str(tmp_path / "a"), "--output", str(tmp_path / "a.dvt")])
    assert isinstance(result.exception, LoadError | SystemExit)
    assert not (tmp_path / "a.dvt").exists()


def test_a_whole_set_of_shards_packs(tmp_path: Path) -> None:
    changed(tmp_path, {})
    whole = experts.task_vector(tmp_path, base_of("llama"))
    shards(lambda index, folder: None)(tmp_path)
    vector = experts.task_vector(tmp_path, base_of("llama"))
    assert all(torch.equal(vector[name], whole[name]) for name in whole)
