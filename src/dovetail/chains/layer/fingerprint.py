"""Fingerprints of bases: which weights, codes and scales a chain stands on (`dovetail.models.fingerprint`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import nn

from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.models.disk import Disk
from dovetail.models.fingerprint import fingerprint


def base_fingerprint(layers: Mapping[str, ChainLinear]) -> str:
    """SHA-256 of the bases in hand: dense weights, or codes and scales with the quantizer's identity."""
    digest = hashlib.sha256()
    for name in sorted(layers):
        base = layers[name].base
        digest.update(f"{name}:{base.identity}:{fingerprint(base)};".encode())
    return "sha256:" + digest.hexdigest()


def packed_fingerprint(model: nn.Module, disk: Disk | None = None) -> str:
    """Of a packed model (`dovetail.merge`): its tensors, and of each layer the grid and dtype that give them values."""
    digest = hashlib.sha256(fingerprint(model, disk=disk).encode())
    for name, layer in sorted(chain_layers(model).items()):
        digest.update(f";{name}:{layer.base.identity}:{layer.base.dtype}".encode())
    return f"sha256:{digest.hexdigest()}"
