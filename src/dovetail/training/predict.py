"""The memory that a training will need, predicted from a configuration alone: two steps on fake tensors.

`PeakMemory` needs the sizes of tensors only, so two steps on tensors without values give the count of real ones.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dovetail.chains import packing
from dovetail.chains.layer import bits
from dovetail.chains.layer.attach import open_experts
from dovetail.chains.layer.keeping import keeping_layers, kept_nbytes
from dovetail.links.quantize import nearest
from dovetail.models.targets import all_layers
from dovetail.tasks.holding import free_memory
from dovetail.training.optimizer import TrainSettings, autocast, cast_frozen, make_optimizer
from dovetail.training.peak_memory import PeakMemory
from dovetail.training.repeats import HELD, Repeat, Trace, find_repeats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALL = 16
"""Kept weights that take up to one part in so many of the free memory need no prediction."""


def predict_peak_memory(
    model: PreTrainedModel, batch: Mapping[str, Tensor], settings: TrainSettings, *, device: str = "cpu"
) -> int:
    """Return the peak in bytes of a training on `device`, without weights and without computing.

    With keep_weights=auto, it is the one with kept weights where these fit into the free memory of this machine.

    model     on the device "meta" (`dovetail.checkpoint.config.empty_model`), with its chain; it is unchanged
    batch     the widest batch of the run: only its shapes count
    settings  of the training
    returns   0 for a model that trains nothing; else what `simulate` returns, without running all of a model's equal
              blocks where the others follow from them (`dovetail.training.repeats`). Tokens are taken to be spread
              evenly over MoE experts
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return 0
    if settings.keep_weights == "auto":
        kept, less = (settings.model_copy(update={"keep_weights": asked}) for asked in (True, False))
        needed = kept_nbytes(model)
        if device != "cpu" or not needed:
            return predict_peak_memory(model, batch, less, device=device)
        free = free_memory(torch.device(device))
        if needed + _own_nbytes(model) <= free and (peak := predict_peak_memory(model, batch, kept)) <= free:
            return peak
        return predict_peak_memory(model, batch, less)
    with suppress(Exception):  # whatever the code of a model does without some of its blocks; it may need them all
        return simulate(model, batch, settings, device=device, whole=False)
    model = copy.deepcopy(model)
    open_experts(model, all_layers(model))  # the stock ones may ask for the values of the routing
    return simulate(model, batch, settings, device=device)


def worth_keeping(model: PreTrainedModel, batch: Mapping[str, Tensor], settings: TrainSettings) -> bool:
    """Return whether a training keeps weights (`chains/layer/keeping.py`): as set, or where memory is left ("auto").

    model   with its weights
    batch   the widest batch of the run: only its shapes count

    "auto" keeps none on an accelerator, where making a weight costs little beside the products, and none where the
    predicted peak is above the free memory and the model's own. Without a prediction, a small part of it is enough.
    """
    if settings.keep_weights != "auto":
        return settings.keep_weights
    needed = kept_nbytes(model)
    if needed == 0 or model.device.type != "cpu":
        return False
    free = free_memory(model.device)
    if needed * _SMALL <= free:
        return True
    own = _own_nbytes(model)
    kept = settings.model_copy(update={"keep_weights": True})
    for whole in (False, True) if needed <= free else ():
        with suppress(Exception):  # whatever the code of a model does without values, or without some of its blocks
            return simulate(model, batch, kept, whole=whole) <= free + own
    return False


def _own_nbytes(model: nn.Module) -> int:
    return sum({id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())


def simulate(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    settings: TrainSettings,
    *,
    device: str = "cpu",
    whole: bool = True,
) -> int:
    """Return the peak in bytes over two steps of training on fake tensors: the definition of `predict_peak_memory`.

    whole   whether every block is run; else those that stand for the repeated ones (`dovetail.training.repeats`)
    errors  those of the model's own code, and NotRepeated where the others do not follow
    """
    model = _copied(model)
    config: Any = model.config
    config.use_cache = False  # as in training
    if settings.bf16:
        cast_frozen(model)
    for layer in keeping_layers(model):
        layer.base.keep(settings.keep_weights is True)
    repeats = [] if whole else find_repeats(model)
    with _faked(model, batch, device, repeats) as fake:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return _peak_of_two_steps(model, fake, settings, repeats)


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose tensors are aliases on the device "meta", which copying would make one by one."""
    aliases: dict[int, Any] = {}
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if id(tensor) not in aliases:
                alias = tensor.detach()
                aliases[id(tensor)] = (
                    nn.Parameter(alias, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else alias
                )
    return copy.deepcopy(model, aliases)


def predict_unreached(model: PreTrainedModel, names: Iterable[str], batch: Mapping[str, Tensor]) -> str | None:
    """Return the first of these layers that a forward pass on the batch never calls, without computing.

    model    on the device "meta", without a chain; it is left on fake tensors
    returns  None where every layer is called, and where the path depends on values, so that torch cannot tell
    """
    model.requires_grad_(False)
    names, repeats = list(names), find_repeats(model)
    for some in [repeats, []] if repeats else [repeats]:
        # Whatever the code of a model does with the values that it does not find, or without some of its blocks.
        with suppress(Exception):
            return _first_uncalled(model, names, batch, some)
    return None


def _first_uncalled(
    model: nn.Module, names: Iterable[str], batch: Mapping[str, Tensor], repeats: list[Repeat]
) -> str | None:
    """Return the first of these layers that a forward pass never calls, where a block stands for others of its kind."""
    skipped = {module for repeat in repeats for place in repeat.skipped for module in repeat.blocks[place].modules()}
    known = dict(model.named_modules())  # without experts, which get the tokens that are routed to them
    left = {name: None for name in names if name in known and known[name] not in skipped}

    def see(name: str) -> Callable[..., None]:
        return lambda module, args: left.pop(name, None)

    handles = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in left]
    try:
        with (
            _faked(model, batch, "cpu", repeats) as fake,
            PeakMemory() as memory,
            Trace(memory, repeats),
            torch.no_grad(),
        ):
            model(**fake)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(left), None)


@contextmanager
def _faked(
    model: nn.Module, batch: Mapping[str, Tensor], device: str, repeats: list[Repeat]
) -> Iterator[dict[str, Tensor]]:
    """Put a model on fake tensors, except blocks that are skipped, and yield the batch as such."""
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            # Code that compares the addresses of tensors finds all equal; no size depends on it.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            _place(model, device, set[int]().union(*(repeat.unused for repeat in repeats)))
            yield {name: mode.from_tensor(tensor).to(device) for name, tensor in batch.items()}
    finally:
        for table in (bits._table, packing._kept_table, nearest._tables):
            table.cache_clear()  # what fake tensors put there is no good to real ones


def _peak_of_two_steps(
    model: nn.Module, batch: Mapping[str, Tensor], settings: TrainSettings, repeats: list[Repeat]
) -> int:
    """Return the peak in bytes over two steps of training, the second of which has the optimizer's state."""
    model.train()
    for repeat in repeats:
        for place in repeat.skipped:
            repeat.blocks[place].requires_grad_(False)
    optimizer = make_optimizer(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory, Trace(memory, repeats) as trace:
        for _ in range(2):
            trace.begin_step()
            with autocast(trained[0].device, settings.bf16):
                outputs = model(**batch)
            trace.begin(HELD)
            loss = outputs.loss
            del outputs
            trace.begin("loss")
            loss.backward()
            trace.clip(trained, settings.max_grad_norm)
            trace.update(optimizer)
            del loss
            model.zero_grad()
        return trace.peak_nbytes()


def _place(model: nn.Module, device: str, left_out: set[int]) -> None:
    """Make parameters and buffers empty ones on the device; shared ones remain shared, unlike with `Module.to`.

    left_out   identities of tensors that remain where they are
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]:
            if id(tensor) in left_out:
                continue
            if id(tensor) not in made:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                made[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
            setattr(module, name, made[id(tensor)])
