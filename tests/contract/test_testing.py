"""`dovetail.testing` over the registry, and its answer to links that break one rule each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dovetail import testing
from dovetail.chains import registry
from dovetail.chains.link import Adapter
from dovetail.chains.registry import links
from dovetail.chains.terms import LowRank
from dovetail.links.adapt.ia3 import IA3
from dovetail.links.adapt.lora import LoRA
from dovetail.links.prune import Magnitude
from dovetail.links.quantize.integer import Int
from samples import SAMPLES, STARTS


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "keep"])  # it needs a quantized model
def test_every_registered_link_holds_the_contract(name: str) -> None:
    testing.check_link(*SAMPLES[name])


@pytest.mark.parametrize("text", [*STARTS, "lora(r=3, pool=group)", "lora(r=2, alpha=3, pool=group, scaling=rs)"])
def test_other_starts_and_links_that_move_the_grid_hold_the_contract(text: str) -> None:
    testing.check_link(text)


@dataclass(frozen=True)
class StartsElsewhere(LoRA):
    def init(self, site, weight_oi, generator):
        return {name: torch.ones_like(p) for name, p in super().init(site, weight_oi, generator).items()}


@dataclass(frozen=True)
class LowersOtherwise(LoRA):
    def lower(self, p: Mapping[str, Tensor]):
        return [LowRank(p["A"], 1.01 * self.scale * p["B"], self.dropout)]


@dataclass(frozen=True)
class ClaimsZeros(LoRA):
    keeps_zeros = True


@dataclass(frozen=True)
class DeniesZeros(IA3):
    keeps_zeros = False


@dataclass(frozen=True)
class PromisesLess(Int):
    def stored_nbytes(self, site):
        return super().stored_nbytes(site) - 1


@dataclass(frozen=True)
class ClaimsToMove(Magnitude):
    moves_weights = True


@pytest.mark.parametrize(
    ("cls", "rule"),
    [
        (StartsElsewhere, "starts as the identity"),
        (LowersOtherwise, "equals the definition"),
        (ClaimsZeros, "keeps_zeros"),
        (DeniesZeros, "keeps_zeros"),
        (PromisesLess, "stored_nbytes"),
        (ClaimsToMove, "moves_weights"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_link_that_breaks_a_rule_is_told(cls: type[Adapter], rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    links()
    monkeypatch.setattr(cls, "name", "stranger", raising=False)
    monkeypatch.setitem(registry._REGISTERED, "stranger", cls)
    text = "stranger(bits=4, group=8)" if issubclass(cls, Int) else "stranger"
    with pytest.raises(AssertionError, match=rule):
        testing.check_link(text)
