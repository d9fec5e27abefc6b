"""The memory that a training will need, predicted from a configuration alone: two steps on fake tensors.

`PeakMemory` needs the sizes of tensors only, so two steps on tensors without values give the count of real ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dovetail.chains import packing
from dovetail.chains.layer import bits
from dovetail.chains.layer.attach import open_experts
from dovetail.links.quantize import nearest
from dovetail.models.targets import all_layers
from dovetail.training.optimizer import TrainSettings, autocast, cast_frozen, make_optimizer, trained_parts
from dovetail.training.peak_memory import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def predict_peak_memory(
    model: PreTrainedModel, batch: Mapping[str, Tensor], settings: TrainSettings, *, device: str = "cpu"
) -> int:
    """Return the peak in bytes of a training on `device`, without weights and without computing.

    model     on the device "meta" (`dovetail.checkpoint.load.empty_model`), with its chain; it is unchanged
    batch     the widest batch of the run: only its shapes count
    settings  of the training
    returns   0 for a model that trains nothing. Tokens are taken to be spread evenly over MoE experts
    """
    if not trained_parts(model):
        return 0
    model = copy.deepcopy(model)
    # A grouped product takes fake tensors of bfloat16 only; opened experts are computed one by one.
    open_experts(model, all_layers(model))
    if settings.bf16:
        cast_frozen(model)
    with _faked(model, batch, device) as fake:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return _peak_of_two_steps(model, fake, settings)


def predict_unreached(model: PreTrainedModel, names: Iterable[str], batch: Mapping[str, Tensor]) -> str | None:
    """Return the first of these layers that a forward pass on the batch never calls, without computing.

    model    on the device "meta", without a chain; it is left on fake tensors
    returns  None where every layer is called, and where the path depends on values, so that torch cannot tell
    """
    known = dict(model.named_modules())
    left = dict.fromkeys(name for name in names if name in known)  # experts get the tokens that are routed to them

    def see(name: str) -> Callable[..., None]:
        return lambda module, args: left.pop(name, None)

    for name in left:
        model.get_submodule(name).register_forward_pre_hook(see(name))
    nn.Module.to(model, torch.bfloat16)  # torch's grouped product takes no other fake tensors
    try:
        with _faked(model, batch, "cpu") as fake, PeakMemory(), torch.no_grad():
            model(**fake)
    except Exception:  # whatever the code of a model does with the values that it does not find
        return None
    return next(iter(left), None)


@contextmanager
def _faked(model: nn.Module, batch: Mapping[str, Tensor], device: str) -> Iterator[dict[str, Tensor]]:
    """Put a model on fake tensors, and yield the batch as fake tensors."""
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            # Code that compares the addresses of tensors finds all equal; no size depends on it.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            _place(model, device)
            yield {name: mode.from_tensor(tensor).to(device) for name, tensor in batch.items()}
    finally:
        for table in (bits._table, packing._kept_table, nearest._tables):
            table.cache_clear()  # what fake tensors put there is no good to real ones


def _peak_of_two_steps(model: nn.Module, batch: Mapping[str, Tensor], settings: TrainSettings) -> int:
    """Return the peak in bytes over two steps of training, the second of which has the optimizer's state."""
    model.train()
    optimizer = make_optimizer(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        for _ in range(2):
            with autocast(trained[0].device, settings.bf16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
            optimizer.step()
            del loss
            model.zero_grad()
    return memory.peak_nbytes


def _place(model: nn.Module, device: str) -> None:
    """Make parameters and buffers empty ones on the device; shared ones remain shared, unlike with `Module.to`."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            if id(tensor) not in made:
                empty = torch.empty_like(tensor, device=device)
                made[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
            setattr(module, name, made[id(tensor)])
