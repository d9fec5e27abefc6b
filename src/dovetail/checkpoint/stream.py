"""Compression of a checkpoint whose weights stay on disk: a folder in, a packed folder out, block by block.

It is `dovetail.load`, `apply`, `merge` and `save_packed` with one `Disk`. At most two blocks are dense in memory at a
time, and the activations between two blocks. The result is that of the four functions in memory, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dovetail.chains.assignment import Layers, assign
from dovetail.chains.layer.applied import Inputs
from dovetail.chains.link import Chain, Link
from dovetail.checkpoint.config import empty_model, held_in, load_config
from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import MergeReport, merge
from dovetail.checkpoint.packed import PackedSize, save_packed
from dovetail.compression.apply import apply, apply_on_meta
from dovetail.compression.calibration import Batch, calibration_batches, text_task
from dovetail.errors import ChainError
from dovetail.files import check_folder, only_writer
from dovetail.models.disk import Disk
from dovetail.progress import Bar
from dovetail.tasks.lengths import length_limit
from dovetail.tasks.task import Task
from dovetail.tasks.vocabulary import vocabulary_of


@dataclass(frozen=True)
class CompressReport:
    """A compressed checkpoint.

    chain  in its canonical form
    size   on disk
    merge  as `dovetail.merge` measured it
    """

    chain: str
    size: PackedSize
    merge: MergeReport


def compress(
    model: str | Path,
    chain_: str | Chain | Link,
    output: str | Path,
    *,
    layers: Layers | None = None,
    targets: str | Sequence[str] = "all-linear",
    calibration: Task | Path | Iterable[Batch] | None = None,
    samples: int = 128,
    max_length: int = 512,
    calibration_inputs: Inputs = "compressed",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> CompressReport:
    """Compress a checkpoint to a packed folder, with weights that stay on disk.

    model        a folder in transformers' format, with safetensors files
    chain_       of pruners and quantizers; a chain that trains needs `dovetail.run`
    output       a new or empty folder. While the work lasts, finished blocks are in .NAME.work beside it: the same call
                 goes on after a kill, behind the last finished block
    layers, targets, calibration_inputs, seed   as for `dovetail.apply`
    calibration  for links that need activations: a task, whose train split is used; a text file with a passage per
                 line; or batches of the model's arguments
    samples, max_length   rows of the task, drawn by `seed`, and tokens of a row
    dtype        of the weights; None: as stored
    progress     show bars
    errors       ChainError, LoadError, DataError, TargetError: nearly always before anything is written
    """
    output = Path(output).absolute()
    check_folder(output)
    links = assign(chain_, layers, held_in(model)).chain
    if trained := next((link for stage in links.stages for link in stage.trained), None):
        rule, fix = "a chain that is not trained must have pruners and quantizers alone", "use dovetail run"
        raise ChainError(f"compress by {links}", found=str(trained), rule=rule, fix=fix)
    config: Any = load_config(model, trust_remote_code=trust_remote_code)
    apply_on_meta(empty_model(config, dtype=dtype, trust_remote_code=trust_remote_code), chain_, targets, layers=layers)
    work = output.with_name(f".{output.name}.work")
    with only_writer(output):
        disk = Disk(work)
        try:
            with Bar(f"load {model}", shown=progress):
                loaded, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code, disk=disk)
            if isinstance(calibration, Path):
                calibration = text_task(calibration, encoder_decoder=config.is_encoder_decoder)
            if isinstance(calibration, Task):
                length = length_limit(loaded, tokenizer, max_length, calibration.split("train"))
                calibration = calibration_batches(
                    calibration, tokenizer, samples=samples, seed=seed, max_length=length,
                    decoder_start=config.decoder_start_token_id if config.is_encoder_decoder else None,
                    vocabulary=vocabulary_of(loaded),
                )  # fmt: skip
            apply(
                loaded, chain_, layers=layers, targets=targets, calibration=calibration, seed=seed,
                calibration_inputs=calibration_inputs, disk=disk, progress=progress,
            )  # fmt: skip
            with Bar("merge", shown=progress):
                merged = merge(loaded, packed=True, disk=disk)
            with Bar(f"write {output}", shown=progress):
                size = save_packed(loaded, output, tokenizer=tokenizer, disk=disk)
        except BaseException:
            if not any(work.glob("link*")):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return CompressReport(chain=str(links), size=size, merge=merged)
