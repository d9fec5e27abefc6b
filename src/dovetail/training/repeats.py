"""Repeated blocks: which of them a dry run simulates, and how the peak of the whole model follows.

The model runs its blocks one after the other, forwards and backwards. A segment of the run is what happens between two
boundaries of blocks: by how many bytes it changes the live memory (net), and how far it goes above its start (high).
Blocks of one kind in the same neighbourhood have equal segments, so a segment that was measured once is played as often
as the model has such blocks. The others pass their input on while they are measured, and are not updated: their
gradients, their optimizer's state and what clipping needs for them are those of the blocks that stand for them.

Equality is verified, not assumed: the segments of two neighbouring repeats must be equal to the byte, what a block
leaves behind must be its gradients alone, and the optimizer must allocate its state alone. Otherwise nothing is claimed
(`NotRepeated`), and all blocks are simulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dovetail.chains.layer.operators import Numbered
from dovetail.chains.link import Link
from dovetail.training.peak_memory import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD = "held"
"""The segment in which the outputs of the model are dropped, and what they hold of its blocks: keys and values."""
FREED = "freed"
"""The segment in which the gradients are freed."""
EDGE = 1
"""Blocks at each end of a repeated part whose segments differ: they free what another kind of block left."""
LONGEST = 16
"""The most blocks in a unit that repeats."""


class NotRepeated(Exception):
    """The blocks are not what the extrapolation needs: simulate all of them."""


@dataclass(frozen=True)
class Repeat:
    """A part of a stack of blocks that repeats.

    blocks   the stack
    window   places of one unit of blocks, whose segments are played for each skipped unit
    skipped  places of the blocks that pass their input on
    checked  pairs of places whose segments must be equal
    """

    blocks: nn.ModuleList
    window: range
    skipped: range
    checked: list[tuple[int, int]]

    @property
    def copies(self) -> int:
        """How often the window is played beside its own blocks."""
        return len(self.skipped) // len(self.window)

    @property
    def kept(self) -> list[int]:
        """Places of the blocks that are simulated."""
        return [place for place in range(len(self.blocks)) if place not in self.skipped]

    @property
    def unused(self) -> set[int]:
        """Identities of the tensors of skipped blocks: only their number of bytes counts."""
        blocks = [self.blocks[place] for place in self.skipped]
        return {id(t) for block in blocks for module in block.modules() for t in _own_tensors(module)}

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters of the window that are trained."""
        return [p for place in self.window for p in self.blocks[place].parameters() if p.requires_grad]

    def like(self, place: int) -> int:
        """Return the place in the window that stands for a skipped one."""
        return self.window[(place - self.skipped.start) % len(self.window)]


def find_repeats(model: PreTrainedModel) -> list[Repeat]:
    """Return the repeated parts of the model's stacks of blocks (nn.ModuleList) that are worth skipping."""
    uses = Counter(id(t) for module in model.modules() for t in _own_tensors(module))
    found, inside = [], set[nn.Module]()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside.update(part for part in module.modules() if part is not module)
            repeat = _repeat(module, _kinds(model, module, uses))
            if repeat is not None:
                found.append(repeat)
    return found


def _repeat(blocks: nn.ModuleList, kinds: list[int]) -> Repeat | None:
    """Return the repeated part whose simulation skips most blocks."""
    best: tuple[int, int, int, int] | None = None
    for period in range(1, min(LONGEST, len(kinds) // 3) + 1):
        kept = -(-(2 * period + 2 * EDGE) // period)  # units: the edges, and each place of a unit twice between them
        start = 0
        while start + period < len(kinds):
            stop = start
            while stop + period < len(kinds) and kinds[stop] == kinds[stop + period]:
                stop += 1
            skipped = ((stop + period - start) // period - kept) * period
            if skipped > 0 and (best is None or skipped > best[0]):
                best = skipped, start, period, kept * period
            start = max(stop, start) + 1
    if best is None:
        return None
    skipped, start, period, kept = best
    first = start + EDGE  # of the blocks in the middle, counted without the skipped ones
    middle = range(first, start + kept - EDGE)
    gap = middle.start + period

    def place(number: int) -> int:
        return number if number < gap else number + skipped

    return Repeat(
        blocks,
        window=range(first, gap),
        skipped=range(gap, gap + skipped),
        checked=[(place(one), place(one + period)) for one in middle if one + period in middle],
    )


def _kinds(model: PreTrainedModel, blocks: nn.ModuleList, uses: Mapping[int, int]) -> list[int]:
    """Return a number per block: equal for blocks that differ in nothing that memory could depend on."""
    described = [_description(block) for block in blocks]
    # A block's own place in the stack is no difference.
    counted = {
        key
        for key, value in described[0].items()
        if type(value) is int and all(other.get(key) == value + at for at, other in enumerate(described))
    }
    lists = [
        values
        for config in (model.config, model.config.get_text_config())
        for values in vars(config).values()
        if isinstance(values, list) and len(values) == len(blocks)
    ]
    numbers: dict[Hashable, int] = {}
    kinds = []
    for place, (block, description) in enumerate(zip(blocks, described, strict=True)):
        own = Counter(id(t) for module in block.modules() for t in _own_tensors(module))
        shared = any(uses[key] != count for key, count in own.items())
        kind = (
            tuple((key, value) for key, value in description.items() if key not in counted),
            tuple(repr(values[place]) for values in lists),
            place if shared else None,
        )
        kinds.append(numbers.setdefault(kind, len(numbers)))
    return kinds


def _description(block: nn.Module) -> dict[tuple[str, str], Hashable]:
    """Return the settings, links and tensors of a block's modules, by the module's name and their own."""
    found: dict[tuple[str, str], Hashable] = {}
    for name, module in block.named_modules():
        found[name, ""] = type(module)
        for key, value in vars(module).items():
            if key == "number" and isinstance(module, Numbered):
                continue  # every layer has another one
            if isinstance(value, bool | int | float | str | torch.dtype | Link) or value is None:
                found[name, key] = value
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[name, key] = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
    return found


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None]


@dataclass(frozen=True)
class Segment:
    """What happened between two boundaries: bytes, relative to the live ones at its start.

    label  (direction, step, stack, place) of a block, or the name of what else was done
    """

    label: Hashable
    net: int
    high: int


class Trace:
    """The segments of a training on fake tensors, as a context manager inside the one that counts it.

    memory   the count; its peak is set back at each boundary
    repeats  what `find_repeats` returned; [] for one that simulates all blocks
    """

    def __init__(self, memory: PeakMemory, repeats: list[Repeat]) -> None:
        self._memory, self._repeats = memory, repeats
        self._first = self._start = memory.live_nbytes
        self._segments: list[Segment] = []
        self._label: Hashable = "start"
        self._step = -1
        self._gradients = [0] * len(repeats)  # bytes of the window's gradients
        self._left = [0] * len(repeats)  # these, and what the outputs held of its blocks
        self._states: list[list[int]] = []  # of each step: bytes of the optimizer's state of each window
        self._born: list[set[int]] = [set() for _ in repeats]
        self._before: dict[int, int] = {}
        self._dropped: dict[int, list[int]] = {}
        self._undo: list[Callable[[], object]] = []
        self._passages: dict[tuple[int, int], _Passage] = {}

    def __enter__(self) -> Trace:
        for stack, repeat in enumerate(self._repeats):
            kept = repeat.kept
            for before, place in zip([None, *kept], kept, strict=False):
                self._watch(stack, repeat, before, place, last=place == kept[-1])
            for place in repeat.skipped:
                self._skip(stack, repeat, place)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()

    def begin(self, label: Hashable) -> None:
        """Close the segment that is open and open another one."""
        memory = self._memory
        net, high = memory.live_nbytes - self._start, memory.peak_nbytes - self._start
        alive = memory.alive() if self._repeats else {}
        match self._label:
            case "forward", int(), int() as stack, int() as place if place in self._repeats[stack].window:
                self._born[stack] |= alive.keys() - self._before.keys()
            case "held":
                gone = self._before.keys() - alive.keys()
                self._dropped[self._step] = [sum(self._before[key] for key in born & gone) for born in self._born]
                self._born = [set() for _ in self._repeats]
        self._before = alive
        self._segments.append(Segment(self._label, net, high))
        self._label, self._start = label, memory.live_nbytes
        memory.peak_nbytes = memory.live_nbytes

    def begin_step(self) -> None:
        """Start a step of training."""
        self._step += 1
        self.begin("step")

    def clip(self, trained: Sequence[nn.Parameter], norm: float) -> None:
        """Clip the gradients after the backward pass, also without those of each window: the difference is theirs."""
        for stack, repeat in enumerate(self._repeats):
            self.begin(("clip without", self._step, stack))
            window = {id(p) for p in repeat.trained}
            self._gradients[stack] = sum(map(_gradient_nbytes, repeat.trained))
            self._left[stack] = self._dropped[self._step][stack] + self._gradients[stack]
            nn.utils.clip_grad_norm_([p for p in trained if id(p) not in window], norm)
        self.begin(("clip", self._step))
        nn.utils.clip_grad_norm_(trained, norm)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Run the optimizer's step, and begin what frees the gradients."""
        self.begin(("update", self._step))
        optimizer.step()
        self.begin(FREED)
        states = [[optimizer.state.get(p, {}) for p in repeat.trained] for repeat in self._repeats]
        self._states.append(
            [sum(t.nbytes for state in window for t in state.values() if isinstance(t, Tensor)) for window in states]
        )

    def peak_nbytes(self) -> int:
        """Return the peak of all blocks; raise NotRepeated where segments of equal blocks are not equal."""
        self.begin("end")
        measured: dict[Hashable, Segment] = {}
        for segment in self._segments:
            if isinstance(segment.label, tuple) and measured.setdefault(segment.label, segment) is not segment:
                raise NotRepeated("a block that is called several times")
        played = {}
        for stack, repeat in enumerate(self._repeats):
            for step in range(self._step + 1):
                for direction in ("forward", "backward"):
                    try:
                        of = {place: measured[direction, step, stack, place] for place in repeat.kept}
                    except KeyError:
                        raise NotRepeated("a block without a forward or a backward pass") from None
                    if any((of[a].net, of[a].high) != (of[b].net, of[b].high) for a, b in repeat.checked):
                        raise NotRepeated("blocks of one kind that use different memory")
                    window = repeat.window if direction == "forward" else repeat.window[::-1]
                    played[of[window[-1]].label] = [of[place] for place in window] * repeat.copies
            left = sum(
                measured[direction, self._step, stack, place].net
                for direction in ("forward", "backward")
                for place in repeat.window
            )
            if left != self._left[stack]:
                raise NotRepeated("blocks that leave more behind than their gradients")
        live = peak = self._first
        steps = iter(self._dropped.values())
        for segment in self._segments:
            for each in [segment, *played.get(segment.label, [])]:
                net, high = self._of_skipped(each, measured)
                peak = max(peak, live + each.high + high)
                live += each.net + net
            if segment.label == HELD:
                live -= self._times_copies(next(steps))
        return peak

    def _of_skipped(self, segment: Segment, measured: Mapping[Hashable, Segment]) -> tuple[int, int]:
        """Return by how much the skipped blocks change the live memory in an update, and how far they raise it."""
        match segment.label:
            case "clip", step:
                without = [measured["clip without", step, stack].high for stack in range(len(self._repeats))]
                return 0, self._times_copies([segment.high - high for high in without])
            case "update", int() as step if self._repeats:
                if segment.high != segment.net:
                    raise NotRepeated("an optimizer that needs more than its state")
                before = self._states[step - 1] if step else [0] * len(self._repeats)
                grown = self._times_copies([now - old for now, old in zip(self._states[step], before, strict=True)])
                return grown, grown
            case "freed":
                return -self._times_copies(self._gradients), 0
        return 0, 0

    def _times_copies(self, of_windows: Sequence[int]) -> int:
        return sum(n * repeat.copies for n, repeat in zip(of_windows, self._repeats, strict=True))

    def _watch(self, stack: int, repeat: Repeat, before: int | None, place: int, last: bool) -> None:
        """Set boundaries where the block at this place starts, forwards and backwards."""
        block = repeat.blocks[place]

        def starts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step = self._step
            self.begin(("forward", step, stack, place))
            hidden = _hidden(args, kwargs)[1]
            if hidden.requires_grad:
                label = "between" if before is None else ("backward", step, stack, before)
                hidden.register_hook(lambda gradient: self.begin(label))

        def ends(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            step = self._step
            if place in repeat.window:
                self._passages[stack, place] = _Passage.of(args, kwargs, output)
            if last:
                self.begin("between")
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: self.begin(("backward", step, stack, place)))

        self._undo.append(block.register_forward_pre_hook(starts, with_kwargs=True).remove)
        self._undo.append(block.register_forward_hook(ends, with_kwargs=True).remove)

    def _skip(self, stack: int, repeat: Repeat, place: int) -> None:
        """Let the block at this place pass its input on."""
        block, like = repeat.blocks[place], repeat.like(place)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._passages[stack, like].through(args, kwargs)

        block.forward = forward
        self._undo.append(lambda: vars(block).pop("forward"))


@dataclass(frozen=True)
class _Passage:
    """Where a block's outputs are among its arguments, if it were to pass its input on.

    sources  the key of each output; None for one that is not among them, which becomes None: a block that needs it then
             behaves otherwise, and is noticed
    single   whether the block returns a tensor instead of a tuple
    """

    sources: list[int | str | None]
    single: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> _Passage:
        """Read it off a call; raise NotRepeated where the hidden states change their shape."""
        key, hidden = _hidden(args, kwargs)
        first, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor) or (first.shape, first.dtype) != (hidden.shape, hidden.dtype):
            raise NotRepeated("a block whose output is not like its input")
        sources: list[int | str | None] = [key]
        for other in others:
            sources.append(next((key for key, value in _by_key(args, kwargs).items() if value is other), None))
        return cls(sources, not isinstance(output, tuple))

    def through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _by_key(args, kwargs)
        outputs = tuple(None if key is None else given[key] for key in self.sources)
        return outputs[0] if self.single else outputs


def _by_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    return {**dict(enumerate(args)), **kwargs}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
    """Return the hidden states that a block gets, and their key: the first argument, or the one of that name."""
    key = 0 if args else "hidden_states"
    found = _by_key(args, kwargs).get(key)
    if not isinstance(found, Tensor):
        raise NotRepeated("a block that takes no hidden states")
    return key, found


def _gradient_nbytes(parameter: nn.Parameter) -> int:
    if parameter.grad is None:
        return 0
    if parameter.grad.untyped_storage().nbytes() != parameter.nbytes:
        raise NotRepeated("a gradient that is not like its parameter")
    return parameter.nbytes
