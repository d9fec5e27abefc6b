"""Parameters that are trained, their learning rates and their precision.

Each link has its own learning rate (CLAM, Table 4: they differ by orders of magnitude), unless the settings state one
for all links (CLAM, A.9). A common scale multiplies them (the c of CLAM §3.2). AdamW has betas 0.9 and 0.999 (Table 5).
Differences from the table: no weight decay by default, none of vectors, and paging of AdamW's state on request only.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dovetail import processes
from dovetail.chains.layer.elastic import groups
from dovetail.chains.layer.linear import LinkState, chain_layers
from dovetail.chains.link import Adapter
from dovetail.errors import TrainError
from dovetail.training.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS, MODEL = "heads", "model"
"""Names of the parts outside the chain: new task heads, and a whole model without a chain."""


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters by part: a link, "heads", or "model" for a model without a chain.

    Parts are in the order of the chain. Equal links are one part; so is a link whose arguments differ between layers,
    by its name and its place.
    """
    layers = chain_layers(model)
    parts: dict[str, list[nn.Parameter]] = {}
    for part, states in _links(model).items():
        if trained := [p for state in states for p in state.parameters() if p.requires_grad]:
            parts[part] = trained
    in_chain = {id(p) for parameters in parts.values() for p in parameters}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_chain]
    if rest:
        parts[HEADS if layers else MODEL] = rest
    return parts


def _links(model: nn.Module) -> dict[str, list[LinkState]]:
    """Return the links of the current stage on all layers, by the names of their parts."""
    found: dict[str, list[LinkState]] = {}
    for place, states in enumerate(zip(*(layer.states for layer in chain_layers(model).values()), strict=True), 1):
        texts = {str(state.link) for state in states}
        part = texts.pop() if len(texts) == 1 else f"{states[0].link.name}, link {place}"
        found.setdefault(part, []).extend(states)
    return found


def check_checkpointing(model: PreTrainedModel, asked: bool) -> None:
    """Raise TrainError if gradient checkpointing is asked for and the model does not support it."""
    if asked and not model.supports_gradient_checkpointing:
        raise TrainError(
            f"train a {type(model).__name__}",
            found="gradient_checkpointing=true",
            rule="the model must support gradient checkpointing in transformers",
            fix="leave gradient_checkpointing out, and use a smaller batch_size with gradient_accumulation",
        )


def check_compiling(model: nn.Module, asked: bool) -> None:
    """Raise TrainError if torch.compile is asked for, and the chain or the machine does not allow it."""
    if not asked:
        return
    where = f"train a {type(model).__name__}, torch_compile=true"
    if groups(model):
        raise TrainError(
            where,
            found="elastic ranks",
            rule="ranks are drawn for each step, and a compiled model is made for one rank of each layer",
            fix="leave torch_compile or elastic out",
        )
    if processes.count() > 1:
        raise TrainError(
            where,
            found=f"{processes.count()} processes",
            rule="a model that DistributedDataParallel wraps is not compiled",
            fix="leave torch_compile out, or train in one process",
        )
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise TrainError(
            where,
            found=f"no C++ compiler: {compiler}",
            rule="torch.compile compiles its loops with one",
            fix="install it, name another one in the environment variable CXX, or leave torch_compile out",
        )


def learning_rates(model: nn.Module, settings: TrainSettings) -> dict[str, float]:
    """Return the maximum learning rate of each of `trained_parts`."""
    of_links = {
        part: settings.link_learning_rate or states[0].link.learning_rate
        for part, states in _links(model).items()
        if isinstance(states[0].link, Adapter)
    }
    rates = {HEADS: settings.head_learning_rate, MODEL: settings.learning_rate, **of_links}
    return {part: rates[part] * settings.lr_scale for part in trained_parts(model)}


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return AdamW with a group per part and kind: matrices, and vectors, which have no weight decay.

    It is torch's, or one of bitsandbytes with a state of 8 bits or a paged one.
    """
    rates = learning_rates(model, settings)
    trained: list[dict[str, Any]] = []
    for part, parameters in trained_parts(model).items():
        for decay, matrices in ((settings.weight_decay, True), (0.0, False)):
            chosen = [p for p in parameters if (p.ndim > 1) == matrices]
            if chosen:
                trained.append({"params": chosen, "lr": rates[part], "weight_decay": decay})
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trained, betas=(0.9, 0.999), fused=True)
    from bitsandbytes import optim

    names = {"adamw_8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return names[settings.optimizer](trained, betas=(0.9, 0.999))


def cast_frozen(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Round every frozen parameter to `dtype` in place; trained parameters and quantized codes are unchanged."""
    for layer in chain_layers(model).values():
        layer.base.to(dtype)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def cast_heads(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Round trained heads to `dtype`, so that the model runs without autocast; adapters need no rounding."""
    for parameter in trained_parts(model).get(HEADS, []):
        parameter.data = parameter.data.to(dtype)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Run the block under autocast to bfloat16, if `bf16`."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
