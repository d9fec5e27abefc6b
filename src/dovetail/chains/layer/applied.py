"""The record of the chain that a model carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from dovetail.chains.assignment import Assignment
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.link import Link
from dovetail.chains.stages import CheckedChain, Stage
from dovetail.chains.terms import LowRank
from dovetail.errors import ChainError

Inputs = Literal["compressed", "original"]
"""What a block is calibrated on: the outputs of the compressed blocks before it, or of the original ones."""


@dataclass
class AppliedChain:
    """The record of a model's chain; one object, which every chain layer holds as `record`.

    assignment        the whole chain of each layer
    targets           the targets as given
    seed              of initial values and shared projections
    base_fingerprint  of the model before anything was done to it
    layers            the layers under the chain by their paths in the model
    number            the current stage, from 0
    on_link           see `apply`
    calibration_inputs  see `apply`
    broken            compression was interrupted: some layers are compressed and others are not
    taken             layer -> what the stage's adapter took from the weight that became its base (`Adapter.decompose`)
    given_up          what the layers had from an earlier round and the chain does not keep: "zeros", "grid"
    """

    assignment: Assignment
    targets: str | tuple[str, ...]
    seed: int
    base_fingerprint: str
    layers: dict[str, ChainLinear] = field(default_factory=dict, repr=False, compare=False)
    number: int = 0
    on_link: Callable[[Link], None] | None = field(default=None, repr=False, compare=False)
    calibration_inputs: Inputs = "compressed"
    broken: bool = False
    given_up: tuple[str, ...] = ()
    taken: dict[str, LowRank] = field(default_factory=dict, repr=False, compare=False)

    @property
    def chain(self) -> CheckedChain:
        """The whole chain, with the arguments of the layers that have none of their own."""
        return self.assignment.chain

    @property
    def stage(self) -> Stage:
        """The current stage, with the arguments of the layers that have none of their own."""
        return self.chain.stages[self.number]

    def stage_at(self, layer: str) -> Stage:
        """Return the current stage of a layer, by its path."""
        return self.assignment.at(layer).stages[self.number]

    @property
    def stages_left(self) -> int:
        """The number of stages after the current one."""
        return len(self.chain.stages) - self.number - 1


def carries_chain(model: nn.Module) -> bool:
    """Return whether layers of the model are under a chain that is not merged."""
    return any(layer.record is not None for layer in chain_layers(model).values())


def applied(model: nn.Module) -> AppliedChain:
    """Return the record of the model's chain; raise ChainError for a model that carries none."""
    layer = next(iter(chain_layers(model).values()), None)
    rule = "the model must be under a chain"
    if layer is None:
        fix = "call dovetail.apply(model, chain)"
        raise ChainError("model", found="no layer with a chain", rule=rule, fix=fix)
    if layer.record is None:
        fix = "call dovetail.to_stock(model), then apply another chain; or apply one that continues on its grid"
        raise ChainError("model", found="a packed model, whose chain is merged", rule=rule, fix=fix)
    assert isinstance(layer.record, AppliedChain)
    if layer.record.broken:
        raise ChainError(
            f"model under {layer.record.chain}",
            found="a model whose compression was interrupted",
            rule="all layers of a model must be compressed, or none",
            fix="load the model again",
        )
    return layer.record
