"""Forward passes of one model, one per batch, that advance from block to block in step (`compression.blocks`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.linalg import times_transposed
from dovetail.chains.statistics import padding_mask
from dovetail.models.experts import Experts
from dovetail.models.layouts import Layout
from dovetail.models.roles import CROSS_ATTENTION, roles_of

Batch = Mapping[str, Tensor]

TOKENS = 1024
"""Tokens of a piece of a batch: enough for matrix products, and little memory for a block's activations."""
LOOK = 256
"""Tokens of a piece of the run before calibration."""
_ROWS = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask"}


def split(model: nn.Module, batches: Sequence[Batch], most: int = TOKENS) -> list[Batch]:
    """Return the batches, joined and split by rows to about `most` tokens where they are token ids."""
    from transformers import PreTrainedModel

    pieces: list[Batch] = []
    for batch in _joined(batches, most) if isinstance(model, PreTrainedModel) else batches:
        tokens = max((tensor.shape[1] for tensor in batch.values() if tensor.dim() == 2), default=0)
        if not tokens or not isinstance(model, PreTrainedModel) or not _ROWS.issuperset(batch):
            pieces.append(batch)
            continue
        rows, step = len(next(iter(batch.values()))), max(1, most // tokens)
        pieces += [{k: v[at : at + step] for k, v in batch.items()} for at in range(0, rows, step)]
    return pieces


def _joined(batches: Sequence[Batch], most: int) -> Iterator[Batch]:
    """Yield the batches with small ones of one width joined: each piece costs a thread."""
    waiting: list[Batch] = []
    for batch in batches:
        shapes = {name: tensor.shape[1:] for name, tensor in batch.items()}
        rows = sum(len(next(iter(one.values()))) for one in [*waiting, batch])
        widest = max((shape[0] for shape in shapes.values() if shape), default=most)
        alike = waiting and shapes == {name: tensor.shape[1:] for name, tensor in waiting[0].items()}
        if waiting and (not alike or not _ROWS.issuperset(batch) or rows * widest > most):
            yield {name: torch.cat([one[name] for one in waiting]) for name in waiting[0]}
            waiting = []
        waiting.append(batch)
    if waiting:
        yield {name: torch.cat([one[name] for one in waiting]) for name in waiting[0]}


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key-value cache while entered: a block that runs twice would read its own keys."""
    from transformers import PreTrainedModel

    # Parts of T5 have configs of their own.
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    caching = [config for config in configs.values() if config.to_dict().get("use_cache")]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def quick(layers: Iterable[ChainLinear]) -> Iterator[None]:
    """While entered, linear layers in float32 that carry no link compute by `times_transposed`."""
    changed = [one for one in layers if one.layout.linear and not one.states and one.base.dtype == torch.float32]
    for layer in changed:
        layer.forward = _forward(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _forward(layer: ChainLinear) -> Any:
    def forward(x: Tensor) -> Tensor:
        if layer.states:  # it got them with its base (`dovetail.compression.decomposition`)
            return ChainLinear.forward(layer, x)
        weight_oi = layer.layout.matrix(layer.base.native(x.dtype))
        y = times_transposed(x.reshape(-1, x.shape[-1]), weight_oi).view(*x.shape[:-1], len(weight_oi))
        return y if layer.bias is None else y.add_(layer.bias)

    return forward


@contextmanager
def watching(layers: Mapping[str, ChainLinear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While entered, call `see(name, x)` with the input of each layer before its forward pass."""

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(name, _first(args, kwargs))

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the layer's input among the arguments of its call."""
    return args[0] if args else next(iter(kwargs.values()))


def input_rows(x: Tensor, layout: Layout, mask: Tensor | None, expert: tuple[Experts, str] | None = None) -> Tensor:
    """Return a layer's input as rows of X, (n, i), without padding.

    x       (..., i), or what a convolution takes
    mask    (b, t) bool of the tokens that are not padding; counts where x is (b, t, i) or (b · t, i)
    expert  where the layer is an expert's matrix, whose input is the tokens routed to it (`expert_layers`)
    """
    if expert is not None:
        experts, name = expert
        counted = experts.counted(name, mask)
        return x if counted is None else x[counted]
    if layout.linear and mask is not None:
        if x.dim() == 3 and x.shape[:2] == mask.shape:
            x = x[mask]
        elif x.dim() == 2 and len(x) == mask.numel():  # OPT's feed-forward
            x = x[mask.flatten()]
    return layout.input_rows(x)


def read_by_decoder(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the layers whose input an encoder-decoder computes from its decoder's tokens."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return set()
    inside = {id(module) for module in model.get_decoder().modules()}
    found = {name for name in names if id(model.get_submodule(name)) in inside}
    crossed = {name for name in found if not CROSS_ATTENTION.isdisjoint(name.split("."))}
    return found - {name for name in crossed if not {"key", "value"}.isdisjoint(roles_of(name))}


class Stop(BaseException):
    """The end of a forward pass; no `except Exception` of a model catches it."""


class Pass:
    """One forward pass of the model, in a thread of its own, that waits at every block.

    block, args, kwargs   the block at which it waits, and the block's arguments; block is None after the last one
    mask, decoder_mask    (b, t) bool, False where its batch is padding
    """

    def __init__(self, model: nn.Module, piece: Batch) -> None:
        self.mask, self.decoder_mask = padding_mask(piece), padding_mask(piece, "decoder_attention_mask")
        self.block: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._told: SimpleQueue[Any] = SimpleQueue()
        self._answer: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(model, piece), daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._wait()

    def go_on(self, output: Any) -> None:
        """Give the block's output to the pass and wait until it reaches the next block."""
        self.block, self.args, self.kwargs = None, (), {}
        self._told.put(output)
        self._wait()

    def stop(self) -> None:
        """End the pass at its current block."""
        if self._thread.is_alive():
            self._told.put(Stop())
            self._thread.join()

    def arrive(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run in the pass's thread in place of the block's forward."""
        self.block, self.args, self.kwargs = block, args, kwargs
        self._answer.put(None)
        del args, kwargs  # or a block's input would live as long as its output
        output = self._told.get()
        if isinstance(output, Stop):
            raise output
        return output

    def _wait(self) -> None:
        if (error := self._answer.get()) is not None:
            raise error

    def _run(self, model: nn.Module, piece: Batch) -> None:
        _here.now = self
        try:
            with torch.no_grad():  # a new thread knows nothing of the caller's
                model(**piece)
            self._answer.put(None)
        except Stop:
            pass
        except BaseException as error:
            self._answer.put(error)


class _Here(threading.local):
    """The pass whose thread this is; None in the calibrating thread."""

    now: Pass | None = None


_here = _Here()


class Passes:
    """The forward passes of all batches, in step; context manager."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], pieces: Sequence[Batch]) -> None:
        self._modules = {name: model.get_submodule(name) for name in blocks}
        self._passes = [Pass(model, piece) for piece in pieces]

    def __enter__(self) -> Passes:
        self._own = {name: module.__dict__.get("forward") for name, module in self._modules.items()}
        self._forward = {name: module.forward for name, module in self._modules.items()}
        for name, module in self._modules.items():
            module.forward = self._gate(name)
        try:
            for one in self._passes:
                one.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._passes:
            one.stop()
        for name, module in self._modules.items():
            del module.forward
            if (own := self._own[name]) is not None:
                module.forward = own

    def _gate(self, name: str) -> Callable[..., Any]:
        from transformers import Cache

        def kept(argument: Any) -> Any:
            # XLM makes a cache whatever its config says, and a block that runs twice would read its own keys.
            return None if isinstance(argument, Cache) else argument

        def forward(*args: Any, **kwargs: Any) -> Any:
            if _here.now is None:
                return self._forward[name](*args, **kwargs)
            kwargs = {key: kept(value) for key, value in kwargs.items()}
            return _here.now.arrive(name, tuple(map(kept, args)), kwargs)

        return forward

    def waiting(self) -> list[Pass]:
        """Return the passes that wait at the block of the first waiting one; empty after the last block."""
        first = next((one.block for one in self._passes if one.block is not None), None)
        return [one for one in self._passes if first is not None and one.block == first]

    def go_on(self, here: Sequence[Pass]) -> None:
        """Run the block for each pass, and let the pass go on to the next block."""
        for one in here:
            assert one.block is not None
            one.go_on(self._forward[one.block](*one.args, **one.kwargs))

    def feed(
        self,
        one: Pass,
        layers: Mapping[str, ChainLinear],
        see: Callable[[str, Tensor], None],
        left: set[str] | None,
    ) -> None:
        """Run the block to observe the inputs of its layers: `see(layer, x)`.

        left  the layers still to be observed, where each is called once: the run of the block ends with the last one
        """
        assert one.block is not None
        if one.block in layers:  # a layer that is its own block
            see(one.block, _first(one.args, one.kwargs))
            return

        def see_once(name: str, x: Tensor) -> None:
            see(name, x)
            if left is not None:
                left.discard(name)
                if not left:
                    raise Stop

        with watching(layers, see_once), suppress(Stop):
            self._forward[one.block](*one.args, **one.kwargs)
