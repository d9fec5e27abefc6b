"""Fingerprints: which base a model, an adapter or a merged checkpoint belongs to, exactly.

SHA-256 over names, dtypes, shapes and bytes, streamed tensor by tensor.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dovetail.errors import HistoryWarning, LoadError
from dovetail.models.disk import Disk
from dovetail.models.targets import inside, new_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 24  # elements hashed at a time: what a fingerprint needs beside the model


def fingerprint(model: nn.Module, *, leave_out: Collection[str] = (), disk: Disk | None = None) -> str:
    """Return "sha256:" and 64 hexadecimal digits that identify the model's tensors exactly.

    The hash runs over parameters and persistent buffers in order of their names: name, dtype, shape, bytes. Equal
    fingerprints mean equal tensors, bit for bit; a changed bit, dtype, shape or name changes it. The device, the
    class of the model and the storage of tied weights do not change it. It needs memory for one chunk of a tensor
    (for the whole tensor where it is not contiguous).

    leave_out  paths of modules to leave out, such as a new head, whose weights depend on the seed
    disk       of the weights that stay on disk
    """
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    return tensors_fingerprint(tensors, leave_out=leave_out, disk=disk)


def tensors_fingerprint(
    tensors: Mapping[str, Tensor], *, leave_out: Collection[str] = (), disk: Disk | None = None
) -> str:
    """Return the `fingerprint` of a module with these tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if inside(name, leave_out):
            continue
        if tensor.is_meta:
            rule = "a fingerprint needs stored tensors"
            raise LoadError(f"fingerprint at {name}", found="device meta", rule=rule, fix="load the model's weights")
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
        if disk is not None:
            disk.drop()
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(model: nn.Module, disk: Disk | None = None) -> str:
    """Return the fingerprint of a base, without a classifier's head, which the run's seed may have drawn."""
    if any(p.is_meta for p in model.parameters()):
        return "unknown"
    return fingerprint(model, leave_out=new_heads(model), disk=disk)


def drop_stale_note(where: str, model: PreTrainedModel, disk: Disk | None = None) -> None:
    """Remove a merged model's entry from the config, and warn, unless the weights are those that it names."""
    said = getattr(model.config, "dovetail", None)
    if not isinstance(said, dict) or "merged_fingerprint" not in said:
        return
    found = fingerprint(model, disk=disk)
    if found != said["merged_fingerprint"]:
        vars(model.config).pop("dovetail")
        warnings.warn(
            f"{where}: config.json says that the weights are {said.get('chain')} over {said.get('quantizer')}, merged, "
            f"with fingerprint {said['merged_fingerprint']}; they have fingerprint {found}. The entry is ignored: the "
            "weights were changed since the merge (fine-tuned, cast or damaged); their zeros and grid are unknown.",
            HistoryWarning,
            stacklevel=3,
        )
