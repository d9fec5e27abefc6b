"""Writes a run's merged model, packed and stock, and loads each again to compare it with the model in hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dovetail.checkpoint.load import load
from dovetail.checkpoint.merge import to_stock
from dovetail.checkpoint.packed import save_packed
from dovetail.runs.report.record import Checkpoint, Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def deliver_packed(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: dict[str, Tensor], kind: str
) -> Packed:
    """Writes the packed model, turns the one in hand into stock modules, and compares it with the one on disk.

    kind  of the run's task, which says what head the model has
    """
    shutil.rmtree(directory, ignore_errors=True)  # what a killed run left
    size = save_packed(model, directory, tokenizer=tokenizer)
    to_stock(model)
    again, _ = load(directory, task_kind=kind)
    return Packed(
        nbytes=size.nbytes, bits_per_weight=size.bits_per_weight, max_abs_logit_diff=_difference(again, model, probe)
    )


def deliver_stock(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: dict[str, Tensor]
) -> Checkpoint:
    """Writes the standard checkpoint, and loads it with stock transformers to compare the logits."""
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    again = type(model).from_pretrained(directory, dtype="auto").eval()
    nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return Checkpoint(nbytes=nbytes, max_abs_logit_diff=_difference(again, model, probe))


def _difference(one: PreTrainedModel, other: PreTrainedModel, probe: dict[str, Tensor]) -> float:
    """The largest difference of a logit, on the device of `other`."""
    moved: Any = torch.nn.Module.to(one, other.device)
    probe = {name: tensor.to(other.device) for name, tensor in probe.items()}
    with torch.inference_mode():
        return float((moved(**probe).logits - other(**probe).logits).abs().max())
