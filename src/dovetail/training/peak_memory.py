"""The maximum bytes of tensors alive at once, counted per operation: equal on any device, and on fake tensors.

The inputs and outputs of every operation are counted, each storage from its first use until it is freed. The count
needs sizes only, so a training step on fake tensors predicts a real one from a configuration alone. Memory that a
kernel allocates internally, and memory that the allocator holds back, is not counted; on a GPU, a run reports the
allocator's own count instead.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.chains import packing
from dovetail.chains.layer import bits
from dovetail.links.quantize import nearest
from dovetail.models.targets import fused_experts
from dovetail.training.optimizer import TrainSettings, autocast, cast_frozen, make_optimizer, trained_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PeakMemory(TorchDispatchMode):
    """A context manager that counts the bytes of live storages.

    roots   tensors that exist before, such as parameters and buffers
    """

    def __init__(self, roots: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_nbytes = 0
        self.peak_nbytes = 0
        """The maximum of `live_nbytes` so far."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in roots:
            self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, *kwargs.values())):
            self._see(tensor)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0  # there is no value: branches take the path of zero
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # the storage's Python object lives as long as the storage
        if key in self._seen:
            return
        nbytes = storage.nbytes()
        self._seen[key] = weakref.ref(storage, partial(self._freed, key, nbytes))
        self.live_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)

    def _freed(self, key: int, nbytes: int, _: object) -> None:
        del self._seen[key]
        self.live_nbytes -= nbytes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def training_step_peak(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    bf16: bool = False,
    max_grad_norm: float = 1.0,
) -> int:
    """Return the peak in bytes over two steps of training, the second of which has the optimizer's state.

    model            with its chain applied; real (it is then trained two steps), or of fake tensors
    batch            what the model is called with, `labels` included: the widest batch gives the run's peak
    make_optimizer   from the model: `lambda model: make_optimizer(model, settings)`
    bf16             autocast, as in a run with bf16; cast the model with `cast_frozen` before
    """
    model.train()
    optimizer = make_optimizer(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        for _ in range(2):
            with autocast(trained[0].device, bf16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimizer.step()
            del loss
            model.zero_grad()
    return memory.peak_nbytes


def predict_peak_memory(
    model: PreTrainedModel, batch: Mapping[str, Tensor], settings: TrainSettings, *, device: str = "cpu"
) -> int | None:
    """Return the peak in bytes of a training on `device`, without weights and without computing.

    model     on the device "meta" (`dovetail.checkpoint.load.empty_model`), with its chain; it is unchanged
    batch     the widest batch of the run: only its shapes count
    settings  of the training
    returns   0 for a model that trains nothing; None where torch gives no prediction, which is the case for MoE experts
              in three-dimensional parameters of float32
    """
    if not trained_parts(model):
        return 0
    if fused_experts(model) and not settings.bf16 and model.dtype != torch.bfloat16:
        return None  # torch's grouped product takes no fake tensors of another dtype
    model = copy.deepcopy(model)
    if settings.bf16:
        cast_frozen(model)
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            # Code that compares the addresses of tensors finds all equal; no size depends on it.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            _place(model, device)
            if settings.gradient_checkpointing:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            return training_step_peak(
                model,
                {name: mode.from_tensor(tensor).to(device) for name, tensor in batch.items()},
                make_optimizer=lambda model: make_optimizer(model, settings),
                bf16=settings.bf16,
                max_grad_norm=settings.max_grad_norm,
            )
    finally:
        for table in (bits._table, packing._kept_table, nearest._tables):
            table.cache_clear()  # what fake tensors put there is no good to real ones


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
