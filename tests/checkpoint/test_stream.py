"""Compression with weights that stay on disk: equal to the one in memory, and it continues after a kill."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import dovetail
import families
import todays_families
from dovetail.compression.journal import Journal
from dovetail.errors import ChainError, DovetailError, LoadError
from dovetail.models.disk import Disk
from small_models import make_tokenizer

CHAINS = ("nf4", "int(bits=4, group=32)", "wanda(0.5) >> gptq(bits=4, group=64)", "sparsegpt(0.5)")
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: families.make("llama"),
    "gpt2": lambda: families.make("gpt2"),
    "gemma3": lambda: families.make("gemma3"),
    "qwen3_moe": lambda: todays_families.make("qwen3_moe"),  # transformers joins the experts of its checkpoint
}
IDS = torch.randint(5, 17, (6, 40), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(4)]


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model in several shards, and a tokenizer."""
    model: Any = MODELS[name]()
    model.to(dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def in_memory(source: Path, chain: str, output: Path, dtype: str | None = None) -> Path:
    model, tokenizer = dovetail.load(source, dtype=dtype)
    dovetail.apply(model, chain, calibration=DATA)
    dovetail.merge(model, packed=True)
    dovetail.save_packed(model, output, tokenizer=tokenizer)
    return output


def check_equal(one: Path, other: Path) -> None:
    """Assert that two packed folders hold the same files, with the same tensors."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    mine, theirs = load_file(one / "packed.safetensors"), load_file(other / "packed.safetensors")
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_one_in_memory(name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model")
    for number, text in enumerate(CHAINS):
        chain = text.replace("64", "32") if name == "qwen3_moe" else text  # its experts are 32 wide
        report = dovetail.compress(source, chain, tmp_path / f"disk{number}", calibration=DATA)
        check_equal(in_memory(source, chain, tmp_path / f"memory{number}"), tmp_path / f"disk{number}")
        assert report.merge.exact
        assert report.size == dovetail.packed_size(tmp_path / f"disk{number}")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", *(f"{kind}{n}" for kind in ("disk", "memory") for n in range(len(CHAINS)))}
    dovetail.load(tmp_path / "disk2")


TRAINED = (
    "wanda(0.5) >> gptq(bits=4, group=64) >> lora(r=4) >> remask >> regrid",
    "wanda(0.5) >> lora(r=4) >> remask",
    "nf4 >> dora(r=4)",
    "sparsegpt(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid(start=codes)",
    "lora(r=4)",
)


def tune(model: Any, disk: Disk | None) -> list[float]:
    """Train the adapters for three steps, and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.train()
    losses = []
    for _ in range(3):
        if disk is not None:
            disk.drop()  # its pages are read again
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("chain", TRAINED)
def test_a_chain_that_trains_equals_the_one_in_memory(chain: str, name: str, tmp_path: Path) -> None:
    source = save(name, tmp_path / "model")
    chain = chain.replace("64", "32") if name == "qwen3_moe" else chain
    found = []
    for kind, disk in (("memory", None), ("disk", Disk(tmp_path / "work"))):
        model, tokenizer = dovetail.load(source, disk=disk)
        dovetail.apply(model, chain, calibration=DATA, disk=disk)
        losses = tune(model, disk)
        report = dovetail.merge(model, packed=True, disk=disk, lossy="regrid" not in chain)
        assert report.exact or "regrid" not in chain
        dovetail.save_packed(model, tmp_path / kind, tokenizer=tokenizer, disk=disk)
        found.append((losses, report))
    assert found[0] == found[1]
    check_equal(tmp_path / "memory", tmp_path / "disk")


def test_a_merge_writes_only_layers_that_were_trained(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    for chain, written in (("nf4", False), ("nf4 >> lora(r=4) >> regrid", True)):
        disk = Disk(tmp_path / f"work{written}")
        model, _ = dovetail.load(source, disk=disk)
        dovetail.apply(model, chain, disk=disk)
        dovetail.merge(model, packed=True, disk=disk)
        assert any(disk.folder.glob("merged-*")) == written


@pytest.mark.parametrize("chain", ["nf4 >> lora(init=loftq)", "lora(r=4) >> nf4"])
def test_a_chain_that_changes_its_base_again_is_refused(chain: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "work")
    model, _ = dovetail.load(save("llama", tmp_path / "model"), disk=disk)
    with pytest.raises(ChainError, match="one stage"):
        dovetail.apply(model, chain, disk=disk)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_as_in_memory(dtype: str, tmp_path: Path) -> None:
    """A wider dtype than the stored one, and a narrower one."""
    stored = torch.float32 if dtype == "bfloat16" else torch.bfloat16
    source = save("qwen3_moe", tmp_path / "model", stored)
    dovetail.compress(source, "wanda(0.5)", tmp_path / "disk", calibration=DATA, dtype=dtype)
    check_equal(in_memory(source, "wanda(0.5)", tmp_path / "memory", dtype), tmp_path / "disk")


@pytest.mark.parametrize("inputs", ["compressed", "original"])
@pytest.mark.parametrize("turn", range(1, 5))
def test_continues_behind_the_last_block(
    inputs: str, turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each block of each of two links, it goes on, and compresses no block twice."""
    source, kept = save("llama", tmp_path / "model"), list[tuple[int, str]]()
    keep = Journal.keep

    def keep_some(self: Journal, block: str, names: list[str]) -> None:
        keep(self, block, names)
        kept.append((self.place, block))
        if len(kept) == turn:
            raise KeyboardInterrupt

    def compress(to: str) -> None:
        dovetail.compress(source, CHAINS[2], tmp_path / to, calibration=DATA, calibration_inputs=inputs)  # type: ignore[arg-type]

    compress("whole")
    monkeypatch.setattr(Journal, "keep", keep_some)
    with pytest.raises(KeyboardInterrupt):
        compress("stopped")
    assert (tmp_path / ".stopped.work").is_dir()
    compress("stopped")
    assert kept == [(place, f"model.layers.{block}") for place in (0, 1) for block in (0, 1)]
    check_equal(tmp_path / "whole", tmp_path / "stopped")


def _killed(source: Path, folder: Path) -> None:
    """Compress in this process, which was forked and need not import everything again, until a file is half written."""
    write = Disk.drop

    def drop(self: Disk) -> None:
        if list(self.folder.glob(".link1-model.layers.1*")):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self)

    Disk.drop = drop
    dovetail.compress(source, CHAINS[2], folder, calibration=DATA)


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """SIGKILL while a file is half written."""
    source = save("llama", tmp_path / "model")
    process = get_context("fork").Process(target=_killed, args=(source, tmp_path / "disk"))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / ".disk.work" / "link1-model.layers.0.safetensors").is_file()
    dovetail.compress(source, CHAINS[2], tmp_path / "disk", calibration=DATA)
    check_equal(in_memory(source, CHAINS[2], tmp_path / "memory"), tmp_path / "disk")


def test_other_work_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save("llama", tmp_path / "model")
    keep = Journal.keep

    def once(self: Journal, block: str, names: list[str]) -> None:
        keep(self, block, names)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "keep", once)
    with pytest.raises(KeyboardInterrupt):
        dovetail.compress(source, "wanda(0.5)", tmp_path / "disk", calibration=DATA)
    monkeypatch.setattr(Journal, "keep", keep)
    with pytest.raises(LoadError, match=r"chain: wanda\(0.6\)"):
        dovetail.compress(source, "wanda(0.6)", tmp_path / "disk", calibration=DATA)
    with pytest.raises(LoadError, match="calibration"):
        dovetail.compress(source, "wanda(0.5)", tmp_path / "disk", calibration=DATA[:1])
    dovetail.compress(source, "wanda(0.5)", tmp_path / "disk", calibration=DATA)


def test_outliers(tmp_path: Path) -> None:
    """Sparsity that is allocated by a look at the whole model first."""
    source, chain = save("llama", tmp_path / "model"), "wanda(0.5, allocation=outlier)"
    dovetail.compress(source, chain, tmp_path / "disk", calibration=DATA)
    check_equal(in_memory(source, chain, tmp_path / "memory"), tmp_path / "disk")


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    source = save("llama", tmp_path / "model")
    with pytest.raises(ChainError, match="lora"):
        dovetail.compress(source, "nf4 >> lora(r=4)", tmp_path / "disk")
    with pytest.raises(ChainError, match="calibration"):
        dovetail.compress(source, "wanda(0.5)", tmp_path / "disk")
    with pytest.raises(DovetailError):
        dovetail.compress(source, "int(bits=4, group=48)", tmp_path / "disk")
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(LoadError):
        dovetail.compress(source, "nf4", tmp_path / "disk")
    disk = Disk(tmp_path / "other")
    with pytest.raises(LoadError, match="disk"):
        dovetail.load("playground", grid="keep", disk=disk)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_a_disk_reads_what_was_written(tmp_path: Path) -> None:
    """Every dtype, no elements, no axes; and the memory of pages is given back while views are in use."""
    tensors: dict[str, Tensor] = {
        "a": torch.arange(7, dtype=torch.uint8), "b": torch.randn(3, 5).bfloat16(), "c": torch.tensor(2.5),
        "d": torch.empty(0, 4), "e": torch.randn(4, 6).t(), "f": torch.tensor([True, False]),
    }  # fmt: skip
    disk = Disk(tmp_path / "files")
    found = disk.store("x", tensors, {"said": "so"})
    disk.drop()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    again = load_file(disk.path("x"))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    disk.remove("x")
    assert torch.equal(found["b"], tensors["b"])
    assert not any(disk.folder.iterdir())
    shutil.rmtree(disk.folder)
