"""Parameters that are trained, their learning rates and their precision.

Each link has its own learning rate (CLAM, Table 4: they lie orders of magnitude apart), times one scale for all
(CLAM §3.2's c). AdamW with betas 0.9 and 0.999 (Table 5); otherwise than there no weight decay unless asked, none on
vectors in any case, and AdamW's state isn't paged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import Adapter
from dovetail.training.settings import TrainSettings

HEADS, MODEL = "heads", "model"
"""Names of the groups outside the chain: new task heads, and a whole model without a chain."""


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained by name of its part: a link as text, "heads", or, for a model without a chain, "model".

    In the order of the chain; equal links are one part, links that differ from layer to layer are several.
    """
    layers = chain_layers(model)
    parts: dict[str, list[nn.Parameter]] = {}
    in_chain: set[int] = set()
    for layer in layers.values():
        for state in layer.states:
            for parameter in state.parameters():
                if parameter.requires_grad and id(parameter) not in in_chain:
                    in_chain.add(id(parameter))
                    parts.setdefault(str(state.link), []).append(parameter)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_chain]
    if rest:
        parts[HEADS if layers else MODEL] = rest
    return parts


def learning_rates(model: nn.Module, settings: TrainSettings) -> dict[str, float]:
    """The learning rate of each of `trained_parts`, at its highest."""
    of_links = {
        str(state.link): state.link.learning_rate
        for layer in chain_layers(model).values()
        for state in layer.states
        if isinstance(state.link, Adapter)
    }
    rates = {HEADS: settings.head_learning_rate, MODEL: settings.learning_rate, **of_links}
    return {part: rates[part] * settings.lr_scale for part in trained_parts(model)}


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trained parameters, a group per part and kind (matrices, and vectors, which don't decay)."""
    rates = learning_rates(model, settings)
    groups: list[dict[str, Any]] = []
    for part, parameters in trained_parts(model).items():
        for decay, matrices in ((settings.weight_decay, True), (0.0, False)):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            if chosen:
                groups.append({"params": chosen, "lr": rates[part], "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def cast_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Rounds every frozen parameter to `dtype`, in place; what is trained, and quantized codes, stay as they are."""
    for layer in chain_layers(model).values():
        layer.base.to(dtype)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def cast_heads(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Rounds trained heads, so that the model runs without autocast. Adapters do by themselves."""
    for parameter in trained_parts(model).get(HEADS, []):
        parameter.data = parameter.data.to(dtype)
