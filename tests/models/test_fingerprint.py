"""Fingerprints of a base: stable, exact, independent of device, strides and ties."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dovetail.models.fingerprint import fingerprint
from families import make


class Small(nn.Module):
    """Every kind of tensor that a fingerprint meets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.brief = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("codes", torch.arange(4, dtype=torch.uint8))
        self.register_buffer("scalar", torch.tensor(1.5))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_fingerprints_see_every_bit_and_nothing_else() -> None:
    base = fingerprint(Small())
    assert base.startswith("sha256:")
    assert len(base) == 7 + 64
    # Stays the same on every machine and in every version: adapters carry it.
    assert base == "sha256:acaa3e250cdded03d270c14132bf6ae0a785d303f1096da34021bc04ddf60324"
    other = Small()
    other.scratch += 1  # not persistent
    other.weight.requires_grad_(False)
    assert fingerprint(other) == base
    other.weight.data = other.weight.data.t().contiguous().t()  # same values, other strides
    assert fingerprint(other) == base
    other.codes = torch.arange(8, dtype=torch.uint8).div(2, rounding_mode="floor")[::2]
    assert fingerprint(other) == base

    def changed(change: Callable[[Small], object]) -> str:
        model = Small()
        with torch.no_grad():
            change(model)
        return fingerprint(model)

    changes: list[Callable[[Small], object]] = [
        lambda m: m.weight.view(-1)[0].copy_(torch.tensor(-0.0)),  # equal as a number, another bit
        lambda m: m.brief[0].add_(0.0078125),
        lambda m: m.codes[0].add_(1),
        lambda m: m.flags.logical_not_(),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.reshape(3, 2))),
        lambda m: setattr(m, "brief", nn.Parameter(m.brief.half())),
        lambda m: m.register_buffer("more", torch.zeros(1)),
    ]
    prints = [changed(change) for change in changes]
    assert len({base, *prints}) == len(changes) + 1


def test_fingerprints_of_tied_models_and_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(make("gemma"))
    untied = make("gemma")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert fingerprint(untied) == whole
    monkeypatch.setattr(sys.modules["dovetail.models.fingerprint"], "_CHUNK", 7)
    assert fingerprint(Small()) != whole
    monkeypatch.setattr(sys.modules["dovetail.models.fingerprint"], "_CHUNK", 1000)
    assert fingerprint(make("gemma")) == whole
