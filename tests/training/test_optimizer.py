"""What the optimizer decays: matrices of adapters and of whole models, and no vectors."""

from __future__ import annotations

import torch

from dovetail.compression.apply import apply
from dovetail.training.optimizer import TrainSettings, make_optimizer
from small_models import llama


def test_weight_decay_is_on_matrices_only() -> None:
    for model in (apply(llama(), "ia3 >> dora(r=4) >> vera(r=4)"), llama()):
        optimizer = make_optimizer(model, TrainSettings(weight_decay=0.3))
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.ndim for p in trained} == {1, 2}
        assert decays == {id(p): 0.3 if p.ndim == 2 else 0.0 for p in trained}


def test_vector_without_a_gradient_is_not_moved_by_weight_decay() -> None:
    model = apply(llama(), "ia3 >> lora(r=4)")
    optimizer = make_optimizer(model, TrainSettings(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in before and before[name].any():
            assert torch.equal(parameter, before[name]) == (parameter.ndim == 1), name
