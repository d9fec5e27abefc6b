"""What a run leaves on disk so that a killed one goes on: trained parameters as safetensors, the rest by the Trainer.

    output_dir/settings.json                     what the run was begun with
    output_dir/stage-1/base                      fingerprint of what the stage's links sit on
    output_dir/stage-1/checkpoint-200/           the newest two while the stage runs
    output_dir/stage-1/trained.safetensors       once the stage is done, with report.json

Every file is whole or not there; a checkpoint counts once its last file, `complete`, is. The Trainer's own files
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

from dovetail.chains.layer.fingerprint import base_fingerprint
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import TrainError
from dovetail.files import atomic, read_json, write_whole

TRAINED = "trained.safetensors"
"""Name of the file of trained parameters, in a checkpoint and after a stage."""

REPORT_NBYTES = 1 << 28
"""The limit of a stage's report, which holds the loss of every step."""

_COMPLETE, _SETTINGS, _BASE = "complete", "settings.json", "base"


@contextmanager
def run_directory(output_dir: Path | None, settings: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """Where the run is kept: a temporary directory, or output_dir, which holds this run and no other."""
    if output_dir is None:
        if resume:
            raise TrainError("train", found="resume without output_dir", rule="a run goes on from its output_dir")
        with tempfile.TemporaryDirectory(prefix="dovetail-") as name:
            yield Path(name)
        return
    path, mine = output_dir / _SETTINGS, dict(settings)
    if path.exists():
        if not resume:
            raise TrainError(
                "train",
                found=f"an earlier run in {output_dir}",
                rule="a directory holds one run",
                fix="resume=True, or another output_dir",
            )
        theirs = read_json(path, dict[str, Any], rule="an output directory must hold the settings of its run")
        differing = [name for name in mine if mine[name] != theirs.get(name)]
        if differing:
            name = differing[0]
            raise TrainError(
                f"resume from {output_dir}",
                found=f"{name}={mine[name]}, and {theirs.get(name)} when it began",
                rule="a run goes on with the settings that it began with",
            )
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine))
    yield output_dir


def mark_complete(checkpoint: Path) -> None:
    """Makes a written checkpoint count."""
    (checkpoint / _COMPLETE).touch()


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the parameters that are trained, under their names in the model."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    with atomic(path) as part:
        save_file(tensors, part)


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Puts back what `save_trained` wrote; TrainError when the model trains other parameters."""
    tensors = load_file(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    stored = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != stored:
        name = next(n for n in {**shapes, **stored} if shapes.get(n) != stored.get(n))
        raise TrainError(
            f"resume from {path.parent.name}",
            found=f"{name}: {stored.get(name)} stored, {shapes.get(name)} in the model",
            rule="a run goes on with the chain that it began with",
            fix="another output directory, or resume=False",
        )
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])


def last_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint under a stage's directory, if any."""
    whole = [path.parent for path in directory.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


def check_base(model: nn.Module, stage: Path) -> None:
    """TrainError where a stage that was begun in this folder sat on other bases; else remembers which these are.

    A resumed run prunes and quantizes again. On another machine GPTQ may choose other codes, and what was trained over
    the first ones doesn't belong to them.
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
            found="a base other than the one that this run was begun on",
            rule="a run is resumed on the same model, pruned and quantized to the same bits",
            fix="go on where it was begun, with as many threads, or start anew",
        )
