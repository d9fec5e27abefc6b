"""Export of additive adapters as one plain LoRA, which engines such as vLLM read.

    W' = W + B A        lora, rslora, adalora, vera, loha, and chains of them

The planner's terms give A and B. VeRA's scaled projections are a low rank. LoHa is one of rank r² by Khatri-Rao
products. Terms of one layer are concatenated, and layers of a smaller rank are filled with zeros, because vLLM reads
one rank and one alpha (alpha = r, scale 1). Scales of a weight (IA3) and of its rows (DoRA) are no such change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import AppliedChain, applied
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Adapter
from dovetail.chains.terms import Hadamard, LowRank
from dovetail.checkpoint.formats.engines import LORA_RANKS
from dovetail.checkpoint.formats.peft.write import (
    PREFIX,
    adapter_config,
    check_layers,
    refused,
    task_of,
    trained_beside,
    write_adapter,
)
from dovetail.links.adapt import LoRA

TOLERANCE = 1e-5
"""Of the largest change of a layer: how far the written factors may be from the chain, in float32."""


def check_plain_lora(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer -> A (r, i) and B (o, r), float32, of what the current stage trains; values are not read.

    errors   ChainError for links that are no low rank, for modules trained beside them, and above vLLM's largest rank
    """
    record = applied(model)
    check_layers(model, record, record.layers, LoRA)
    if beside := trained_beside(model, record.layers):
        rule = "vLLM refuses an adapter with modules_to_save"
        fix = "freeze it before training, or merge the chain and export the model"
        raise refused(record, f"{beside[0]}, trained beside the adapter", rule, fix)
    if record.taken:
        rule = "the adapter belongs to the weight less a low rank, which the engine does not have"
        raise refused(record, "a base from which a low rank was taken", rule, "merge the chain and export the model")
    _check_links(record)
    found = {name: _factors(layer) for name, layer in record.layers.items()}
    rank = max(len(a_ri) for a_ri, _ in found.values())
    if rank > LORA_RANKS[-1]:
        rule = f"vLLM reads ranks up to {LORA_RANKS[-1]}"
        raise refused(
            record, f"a change of rank {rank}", rule, "use a smaller r, or merge the chain and export the model"
        )
    return found


def export_plain_lora(model: nn.Module, directory: Path) -> dict[str, tuple[int, float]]:
    """Write what the current stage trains as one LoRA of scale 1 for all layers, in a directory, created if needed.

    returns  layer -> the rank of its change, and the largest difference to the chain's change over its largest change
    errors   those of `check_plain_lora`
    """
    record, found = applied(model), check_plain_lora(model)
    rank = max(len(a_ri) for a_ri, _ in found.values())
    said, tensors = {}, {}
    for name, (a_ri, b_or) in found.items():
        said[name] = (len(a_ri), _difference(record.layers[name], a_ri, b_or))
        if said[name][1] > TOLERANCE:
            rule = f"B A must be the chain's change up to {TOLERANCE} of its largest number"
            raise refused(record, f"{name}, off by {said[name][1]:.1e}", rule, "report it")
        missing = rank - len(a_ri)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([a_ri, a_ri.new_zeros(missing, a_ri.shape[1])])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.cat([b_or, b_or.new_zeros(len(b_or), missing)], dim=1)
    fields: dict[str, Any] = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    config = adapter_config(model, record, LoRA, fields) | {"task_type": task_of(model), "modules_to_save": None}
    write_adapter(directory, config, tensors)
    return said


def _check_links(record: AppliedChain) -> None:
    fix = "end the chain with regrid or remask, merge it and export the model"
    for layer in record.layers.values():
        for state in layer.states:
            if not isinstance(state.link, Adapter) or state.link.moves is not None:
                raise refused(record, str(state.link), "no engine re-imposes a mask or a grid on an adapter", fix)
            if any(not isinstance(term, LowRank | Hadamard) for term in state.terms()):
                raise refused(record, str(state.link), "it scales the weight, which no LoRA does", fix)


@torch.no_grad()
def _factors(layer: ChainLinear) -> tuple[Tensor, Tensor]:
    """Return A (r, i) and B (o, r) of the change of a layer, float32."""
    terms = [term for state in layer.states for term in state.terms()]
    low = [term.low_rank() if isinstance(term, Hadamard) else term for term in terms]
    assert all(isinstance(term, LowRank) for term in low)
    pairs = [(term.a_ri, term.b_or) for term in low if isinstance(term, LowRank)]
    a_ri, b_or = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    return a_ri.detach().float(), b_or.detach().float()


@torch.no_grad()
def _difference(layer: ChainLinear, a_ri: Tensor, b_or: Tensor) -> float:
    """Return the largest difference of B A to the definition's change, over its largest change; in float64."""
    change = torch.zeros(len(b_or), a_ri.shape[1], dtype=torch.float64, device=a_ri.device)
    for state in layer.states:
        link = state.running
        assert isinstance(link, Adapter)
        change, _ = link.fold(change, None, {name: value.double() for name, value in state.values().items()})
    written = b_or.double() @ a_ri.double()
    return float((written - change).abs().max() / change.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
