"""Checkpoints from which a killed run continues: trained parameters as safetensors, and the state of the Trainer.

    output_dir/settings.json                     the settings, the model and the data that the run started with
    output_dir/stage-1/base                      fingerprint of the bases of the stage
    output_dir/stage-1/checkpoint-200/           the two latest, while the stage runs
    output_dir/stage-1/trained.safetensors       after the stage, with report.json

Every file is written atomically; a checkpoint is valid once its last file, `complete`, exists. The Trainer's own files
(optimizer.pt, scheduler.pt, rng_state.pth) are read with `weights_only`: nothing is unpickled.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dovetail import processes
from dovetail.chains.layer.fingerprint import base_fingerprint
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import TrainError
from dovetail.files import atomic, on_full_disk, only_writer, read_json, write_whole, writing
from dovetail.training.identity import difference

TRAINED = "trained.safetensors"
"""Name of the file of trained parameters, in a checkpoint and after a stage."""

KEPT = "kept.safetensors"
"""Name of the file of what adapters remember between steps (`Adapter.before_step`), in a checkpoint."""

REPORT_NBYTES = 1 << 28
"""The limit of a stage's report, which holds the loss of every step."""

_COMPLETE, _SETTINGS, _BASE = "complete", "settings.json", "base"


@contextmanager
def run_directory(output_dir: Path | None, identity: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """Yield the directory of the run: a temporary one, or output_dir, which holds this run only.

    identity   what a resumed run must share with the run that it continues
    """
    if output_dir is None:
        if resume:
            raise TrainError(
                "train",
                found="resume without output_dir",
                rule="a run resumes from its output_dir",
                fix="pass output_dir",
            )
        with tempfile.TemporaryDirectory(prefix="dovetail-") as name:
            yield Path(name)
        return
    if not processes.first():
        processes.from_first(lambda: None)  # until the first one has claimed it, or could not
        yield output_dir
        return
    with only_writer(output_dir):
        processes.from_first(lambda: _claim(output_dir, dict(identity), resume))
        with on_full_disk(output_dir):
            yield output_dir


def _claim(output_dir: Path, mine: dict[str, Any], resume: bool) -> None:
    """Create the directory of a new run; raise TrainError if it holds another run than the one to resume."""
    path = output_dir / _SETTINGS
    if not path.exists():
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(mine))
        return
    if not resume:
        raise TrainError(
            "train",
            found=f"an earlier run in {output_dir}",
            rule="a directory must hold one run only",
            fix="pass resume=True, or another output_dir",
        )
    theirs = read_json(path, dict[str, Any], rule="an output directory must hold the settings of its run")
    if found := difference(theirs, mine):
        raise TrainError(
            f"resume from {output_dir}",
            found=found,
            rule="a run must continue with the chain, the model, the data and the settings that it started with",
            fix="pass the same ones, or another output_dir",
        )


def mark_complete(checkpoint: Path) -> None:
    """Mark a written checkpoint as valid."""
    (checkpoint / _COMPLETE).touch()


def save_trained(model: nn.Module, path: Path) -> None:
    """Write the trained parameters, under their names in the model."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with atomic(path) as part:
        save_file(tensors, part)


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Restore the parameters that `save_trained` wrote; TrainError if the model trains other parameters."""
    tensors = load_file(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    stored = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != stored:
        name = next(n for n in {**shapes, **stored} if shapes.get(n) != stored.get(n))
        raise TrainError(
            f"resume from {path.parent.name}",
            found=f"{name}: {stored.get(name)} stored, {shapes.get(name)} in the model",
            rule="a run must continue with the chain that it started with",
            fix="pass another output directory, or resume=False",
        )
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


def last_checkpoint(directory: Path) -> Path | None:
    """Return the latest valid checkpoint in the directory of a stage, or None."""
    whole = [path.parent for path in directory.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def check_base(model: nn.Module, stage: Path) -> None:
    """Raise TrainError if the stage in this folder was trained on other bases; remember the bases of a new stage.

    A resumed run prunes and quantizes again. On another machine, GPTQ may choose other codes, to which the trained
    adapters do not belong.
    """
    layers, path = chain_layers(model), stage / _BASE
    if not layers:
        return
    found = base_fingerprint(layers)
    if not path.exists():
        stage.mkdir(parents=True, exist_ok=True)
        write_whole(path, found)
    elif path.read_text(encoding="utf-8") != found:
        raise TrainError(
            str(stage),
            found="a base other than the one that this run started on",
            rule="a run must resume on the same model, pruned and quantized to the same bits",
            fix="resume on the machine where it started, with the same number of threads, or start a new run",
        )
