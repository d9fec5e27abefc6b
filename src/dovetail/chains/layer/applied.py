"""What a model remembers of the chain that it carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Chain, Link
from dovetail.chains.stages import stages
from dovetail.errors import ChainError

Inputs = Literal["compressed", "original"]
"""What a block is calibrated on: the outputs of the compressed blocks before it, or of the original ones."""


@dataclass
class AppliedChain:
    """What a model under a chain remembers of it; one object, held by every chain layer's `record`.

    chain             the whole chain
    targets           as they were asked for
    seed              of initial values and shared projections
    base_fingerprint  of the model before anything was done to it
    stage             the stage in hand, from 0
    on_link           see `apply`
    calibration_inputs  see `apply`
    broken            compressing was interrupted: some layers are compressed and others not
    """

    chain: Chain
    targets: str | tuple[str, ...]
    seed: int
    base_fingerprint: str
    stage: int = 0
    on_link: Callable[[Link], None] | None = field(default=None, repr=False, compare=False)
    calibration_inputs: Inputs = "compressed"
    broken: bool = False


def applied(model: nn.Module) -> AppliedChain:
    """What the model remembers of its chain; ChainError when it carries none."""
    for layer in chain_layers(model).values():
        if layer.record is None:
            raise ChainError(
                "model",
                found="a packed model, whose chain is merged",
                rule="this needs a model that carries a chain",
                fix="dovetail.to_stock(model), then apply another chain",
            )
        assert isinstance(layer.record, AppliedChain)
        if layer.record.broken:
            raise ChainError(
                f"model under {layer.record.chain}",
                found="a model that was compressed in part when something went wrong",
                rule="all layers of a model are compressed, or none",
                fix="load the model again",
            )
        return layer.record
    raise ChainError(
        "model",
        found="no layer with a chain",
        rule="this needs a model that a chain was applied to",
        fix="dovetail.apply(model, chain)",
    )


def stages_left(model: nn.Module) -> int:
    """Stages still to come after the one in hand."""
    record = applied(model)
    return len(stages(record.chain)) - record.stage - 1
