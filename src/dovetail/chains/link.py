"""The link contract: what a method declares so that it can be used in a chain; and chains of links.

A link is a frozen dataclass whose fields are the arguments of its notation (`lora(r=16, alpha=32)`). It holds no
tensors: one link serves all layers. Each of the four kinds is an abstract class:

- `Pruner`      selects the weights of a layer that remain, and may change them; applied once to the base;
- `Quantizer`   puts a layer's weight on a grid (`dovetail.chains.grid`); applied once to the base;
- `Adapter`     owns trainable parameters and defines how they change `(W, b)`;
- `Constraint`  owns nothing: it re-imposes the base's zeros (remask) or its grid (regrid).

A link depends on no model, quantizer or trainer. Shapes: o i r = out, in, rank.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dovetail.chains.statistics import Statistic
from dovetail.errors import CannotMerge, ChainError

if TYPE_CHECKING:
    from dovetail.chains.grid import QuantizedWeight
    from dovetail.chains.statistics import InputStatistics
    from dovetail.chains.terms import LowRank, Term


Kind = Literal["pruner", "quantizer", "adapter", "constraint"]


@dataclass(frozen=True)
class Site:
    """The place of a link: one layer, described without its weights (so that a plan needs none).

    name          module path in the model
    out_features, in_features   the weight as a matrix (o, i); a convolution's kernel is flattened into i
    has_bias      whether the layer has a bias (o,)
    feedforward   the feed-forward block's output layer, where IA3 scales inputs instead of outputs
    block         weights that share a scale on the grid of the chain's quantizer; 0 where no link moves the grid
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    feedforward: bool = False
    block: int = 0


@dataclass(frozen=True)
class Link(ABC):
    """One link of a chain; subclass one of the four kinds below, not this."""

    name: ClassVar[str] = ""
    differentiable: ClassVar[bool] = False
    """Trained, or crossed by the gradient; otherwise applied once to the base."""
    keeps_zeros: ClassVar[bool] = False
    """A zero of the weight stays exactly zero."""
    keeps_grid: ClassVar[bool] = False
    """A weight on the base's quantization grid stays on it."""
    mergeable: ClassVar[bool] = True
    """There is a W' that does the same; a non-linear link has none."""
    kind: ClassVar[Kind]
    """The kind of link; each of the four classes below sets it."""
    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    """The statistics of the layer's input that it needs (`dovetail.chains.statistics`)."""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""

    @property
    def remade_without_data(self) -> bool:
        """Whether its result can be computed again without data, from the base and the pruner's mask.

        Otherwise a saved adapter holds the bases.
        """
        return True

    def check(self, site: Site) -> None:
        """Raise ChainError when this link cannot be used on that layer."""

    def __rshift__(self, other: Link | Chain) -> Chain:
        return Chain((self,)) >> other

    def __str__(self) -> str:
        """Format the link as the notation reads it: arguments that differ from their default, and headline ones."""
        parts = []
        for name, f in argument_fields(self).items():
            value = getattr(self, f.name)
            if f.metadata.get("positional"):
                parts.append(format_value(value))
            elif f.metadata.get("always_print") or value != f.default:
                parts.append(f"{name}={format_value(value)}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name

    def _bad(self, found: str, rule: str, fix: str) -> ChainError:
        return ChainError(self.name, found=found, rule=rule, fix=fix)


@dataclass(frozen=True)
class Pruner(Link):
    """Selects the weights that remain.

    sparsity    the fraction of zeros wanted, in [0, 1)
    allocation  "uniform": every layer gets that fraction; "outlier": layers with more outlying scores get fewer zeros,
                others more, with the same mean over all weights (`links/prune/allocation.py`)
    """

    kind: ClassVar[Kind] = "pruner"
    keeps_zeros: ClassVar[bool] = True
    keeps_grid: ClassVar[bool] = True
    moves_weights: ClassVar[bool] = False
    """The remaining weights may change, too (SparseGPT)."""

    sparsity: float
    allocation: Literal["uniform", "outlier"]

    @property
    def remade_without_data(self) -> bool:
        """Without moved weights, the base and the mask are enough."""
        return not self.moves_weights

    @abstractmethod
    def scores(self, weight_oi: Tensor, inputs: InputStatistics | None) -> Tensor:
        """Return the importance of each weight, (o, i) float32 or wider; larger is more important."""

    @abstractmethod
    def prune(self, weight_oi: Tensor, inputs: InputStatistics | None) -> tuple[Tensor, Tensor]:
        """Select the weights that remain, and return their new values.

        weight_oi  (o, i) any float dtype, not written to
        inputs     statistics of the layer's input; None unless it declares `statistics`
        returns    keep (o, i) bool, False where the weight becomes zero; and the weight (o, i), weight_oi itself where
                   no weight is changed
        """


@dataclass(frozen=True)
class Quantizer(Link):
    """Puts the weight on a grid: scales (and zero points, or a code book) fixed once, codes stored packed."""

    kind: ClassVar[Kind] = "quantizer"
    keeps_zeros: ClassVar[bool] = True
    """A zero is rounded to zero wherever the grid has one, so that a pruned weight stays zero (CLAM §3.1)."""
    continues: ClassVar[bool] = False
    """It names the grid that the base has already, whatever it is, and is never applied to a dense weight."""

    @property
    def has_zero(self) -> bool:
        """Whether every block of the grid has a code of exact zero (`QuantizedWeight.zero_codes` is not None).

        Without one, no pruner can be in the same chain.
        """
        return True

    @property
    def movable(self) -> frozenset[Literal["scales", "zeros"]]:
        """The numbers of its grid that an adapter can train (`QuantizedWeight.moved`)."""
        return frozenset()

    @property
    def remade_without_data(self) -> bool:
        """Without statistics, the base is enough."""
        return not self.statistics

    @abstractmethod
    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> QuantizedWeight:
        """Return the weight's grid and packed codes.

        weight_oi  (o, i), float32 or wider values are what is rounded
        inputs     statistics of the layer's input; None unless it declares `statistics`
        """

    def quantize_from(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> tuple[QuantizedWeight, Tensor]:
        """Return the same as `quantize`, and the weights (o, i) that were rounded to the nearest codes.

        These are weight_oi, unless rounding one column changes the next. They have weight_oi's dtype, and their nearest
        grid values are the codes' values.
        """
        return self.quantize(weight_oi, inputs), weight_oi

    @abstractmethod
    def empty(self, shape: tuple[int, int]) -> QuantizedWeight:
        """Return a weight (o, i) on this quantizer's grid with zeroed buffers, for a state_dict to fill."""

    def stored_nbytes(self, site: Site) -> int:
        """Return the exact bytes that `quantize` stores for this layer: codes, scales, zero points, constants."""
        with torch.device("meta"):
            return self.empty((site.out_features, site.in_features)).nbytes


@dataclass(frozen=True)
class Adapter(Link):
    """Trainable change of `(W, b)`. Identity at init, unless `starts` says otherwise."""

    kind: ClassVar[Kind] = "adapter"
    differentiable: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 4e-4
    """Default learning rate (CLAM Table 4), scaled by the run's `lr_scale`."""
    rank_axes: ClassVar[Mapping[str, int]] = {}
    """Name of a parameter or constant -> its axis of ranks, of which a leading part is an adapter by itself."""

    @abstractmethod
    def parameter_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the trainable parameters on that layer."""

    @abstractmethod
    def init(self, site: Site, weight_oi: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return initial values of the trainable parameters, so that the chain starts as the identity.

        weight_oi  (o, i) the weight that this link receives at the start of its stage
        returns    name -> tensor of `parameter_shapes`, in float32 (float64 for a float64 weight), on weight_oi's
                   device
        """

    @property
    def starts(self) -> Literal["identity", "weight", "quantizer"]:
        """What the chain starts as.

        "identity": as its base. Otherwise `decompose` chooses the base and the parameters together, so that they are
        near the weight: "weight", with or without a quantizer before the link; "quantizer", with one only.
        """
        return "identity"

    @property
    def moves(self) -> Literal["scales", "zeros"] | None:
        """What it changes of the base's grid, while the codes stay; None for a link that changes the weight."""
        return None

    def grid_change(self, p: Mapping[str, Tensor]) -> Tensor:
        """Return what a link that `moves` the grid does to each block of `Site.block` inputs, (o, groups).

        "scales": a factor that is not negative; "zeros": a number that is added to the block's values. `fold` is the
        same on the weight, for the gradient; the layer uses the weight of the moved grid, whose numbers are rounded.
        """
        raise NotImplementedError(f"{self.name} does not move the grid")

    def decompose(
        self, weight_oi: Tensor, quantize: Callable[[Tensor], Tensor]
    ) -> tuple[LowRank | None, dict[str, Tensor]]:
        """Choose what is taken from the weight before it becomes the base, and the parameters that give it back.

        Called in the place of `init`, where the base is quantized and the dense weight is still at hand. The base
        becomes quantize(`without(weight_oi, taken)`). A saved adapter holds what was taken, from which the base is made
        again bit for bit.

        weight_oi  (o, i) the dense weight, float32 (float64 for a float64 weight)
        quantize   weight (o, i) -> the values (o, i) that it has once it is the base: on the quantizer's grid, with the
                   pruner's zeros; without both, itself in the base's dtype
        returns    what is taken, None for nothing; and name -> tensor of `parameter_shapes`
        """
        raise NotImplementedError(f"{self.name} starts as the identity")

    def constants(self, widest: tuple[int, int], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return frozen tensors that all layers share and that are drawn again from a seed instead of being stored.

        widest   (o, i) of the widest layer's outputs and inputs; narrower layers take leading slices
        returns  name -> tensor on the CPU; empty for most methods (VeRA's projections are the exception)
        """
        return {}

    def local(self, shared: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        """Return this layer's part (views) of what `constants` returned."""
        return dict(shared)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that it can run at, the largest first; empty where it is not elastic."""
        return ()

    def plain(self, rank: int) -> Adapter:
        """Return the link that is not elastic and equals this one over the leading `rank` of the parameters."""
        raise NotImplementedError(f"{self.name} is not elastic")

    def at_rank(self, p: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Return the leading `rank` of each tensor (views), by `rank_axes`; tensors without ranks stay whole."""
        axes = self.rank_axes
        return {name: t.narrow(axes[name], 0, rank) if name in axes else t for name, t in p.items()}

    def before_step(
        self, p: Mapping[str, Mapping[str, Tensor]], step: int, steps: int, kept: dict[str, Tensor]
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Change the parameters between two steps of training, and return what is added to the next gradient.

        Called without gradient before the first step, after every step of the optimizer and when a run is resumed; a
        method that needs none of this does nothing.

        p        layer -> name -> parameter, of all layers with this link; changed in place. `grad` is that of the step
                 that was taken; None before the first one and when a run is resumed, in which case the parameters were
                 changed after that step already
        step     number of steps taken so far, up to `steps`: the last call is after the last step
        kept     what the method remembers between the calls, by names of its own; saved in the run's checkpoints
        returns  layer -> name -> tensor, added to the gradient of the next step, before it is clipped
        """
        return {}

    @abstractmethod
    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Compute the definition `(W, b) -> (W', b')`, same shapes, in ordinary autograd, without dropout."""

    @abstractmethod
    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        """Return the same change as terms of the planner's algebra (`dovetail.chains.terms`)."""


@dataclass(frozen=True)
class OutputAdapter(Adapter):
    """Trainable function of the layer's output. No W' does the same, so it trains and is saved, but never merges."""

    mergeable: ClassVar[bool] = False

    @abstractmethod
    def output(self, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """Return the new output. y, returned: (..., o)."""

    def fold(self, weight_oi: Tensor, bias_o: Tensor | None, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        raise CannotMerge(
            self.name,
            found="a non-linear function of the layer's output",
            rule="only links that change the weight have an effective weight",
            fix=f"keep the model unmerged and save the adapter, or remove {self.name} from the chain",
        )

    def lower(self, p: Mapping[str, Tensor]) -> list[Term]:
        return []


class Base(Protocol):
    """The part of a layer's base (`dovetail.chains.layer.base`) that a constraint reads."""

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The codes and their grid; None for a dense base."""

    def take(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor in memory that all layers of the model share for this slot."""
        ...

    def mask_rows(self, rows: slice) -> Tensor:
        """Return the mask, (n, i) bool: False where the pruner put a zero."""
        ...

    def mask_words(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return the mask as integers as wide as `dtype`, (n, i): all ones where a weight remains, zero elsewhere."""
        ...


@dataclass(frozen=True)
class Constraint(Link):
    """Re-imposes an invariant of the base on whatever came before; no parameters."""

    kind: ClassVar[Kind] = "constraint"
    differentiable: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    keeps_grid: ClassVar[bool] = True
    restores: ClassVar[Literal["zeros", "grid"]]
    """The property of the base that it re-imposes."""
    float32: ClassVar[bool] = False
    """Computed in float32 whatever the weight's dtype."""
    lists_blocked: ClassVar[bool] = False
    """Whether the gradient passes at nearly all weights, so that the others are worth a list (`project_listing_`)."""
    masks_by_base: ClassVar[bool] = False
    """Whether the base alone says where the gradient passes, whatever the weight (`mask_gradient_`)."""

    @property
    def from_codes(self) -> bool:
        """Whether the chain starts from the base as stored; otherwise from the weights before quantizing."""
        return True

    @abstractmethod
    def project(self, weight_oi: Tensor, base: Base) -> Tensor:
        """Compute the definition: the projected weight (o, i), in ordinary autograd."""

    @abstractmethod
    def project_rows_(self, rows_ni: Tensor, start: int, base: Base, grad_ni: Tensor | None = None) -> None:
        """Project rows [start, start + n) of the weight in place.

        grad_ni  gradient of the closed rows, where wanted: masked in place on its way back, any float dtype
        """

    def project_listing_(self, rows_ni: Tensor, start: int, base: Base) -> Tensor | None:
        """Project rows in place, and list where no gradient passes; of constraints with `lists_blocked`.

        returns  places in rows_ni, flat, int64; None where the gradient passes everywhere
        """
        raise NotImplementedError(f"{self.name} lists no places without a gradient")

    def mask_gradient_(self, grad_ni: Tensor, start: int, base: Base) -> None:
        """Set the gradient of projected rows to zero where none passes, in place; of those with `masks_by_base`.

        grad_ni  any float dtype
        """
        raise NotImplementedError(f"{self.name} needs the weight to mask a gradient")


def always_print(default: Any) -> Any:
    """Declare a field that the notation always prints, also at its default: `lora` prints as `lora(r=8)`."""
    return field(default=default, metadata={"always_print": True})


def positional(default: Any) -> Any:
    """Declare a field that the notation accepts and prints without its name: `wanda(0.5)`."""
    return field(default=default, metadata={"always_print": True, "positional": True})


def argument_fields(link: Link | type[Link]) -> dict[str, Field[Any]]:
    """Return argument name -> field, in the order of the notation.

    A field that would have the name of a method has an underscore behind it: `init_` is the argument `init`.
    """
    return {f.name.rstrip("_"): f for f in fields(link)}


def added(default: Any) -> Any:
    """Declare a field that is newer than checkpoints of its link: `identity_of` leaves it out at its default.

    It comes after the older fields, so that arguments without names keep their meaning.
    """
    return field(default=default, metadata={"added": True})


def arguments(link: Link | type[Link]) -> dict[str, Any]:
    """Return argument name -> value (of a link) or default (of a class), in the order of the notation."""
    found = argument_fields(link).items()
    return {name: f.default if isinstance(link, type) else getattr(link, f.name) for name, f in found}


def with_arguments(link: Link, values: Mapping[str, Any]) -> Link:
    """Return the link with other values of some arguments."""
    found = argument_fields(link)
    return replace(link, **{found[name].name: value for name, value in values.items()})


def identity_of(quantizer: Quantizer) -> str:
    """Return the quantizer with all its arguments, which identifies the grid of a checkpoint's codes.

    Arguments that were added later (`added`) are left out at their default, so that the identities of earlier
    checkpoints stay the same.

    >>> from dovetail.links.quantize.nf import NormalFloat4
    >>> identity_of(NormalFloat4(double=True))
    'nf4(block=64, double=True)'
    """
    newer = {name: f.default for name, f in argument_fields(quantizer).items() if f.metadata.get("added")}
    values = {name: v for name, v in arguments(quantizer).items() if name not in newer or v != newer[name]}
    given = ", ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in values.items())
    return f"{quantizer.name}({given})"


MAX_LENGTH = 10_000
"""The most characters of a chain's text, which may come from outside and must be read in bounded time."""


@dataclass(frozen=True, eq=False)
class Chain:
    """Links in the order in which they are applied. Immutable; `>>` joins links and chains.

    A chain as it was written; `dovetail.chains.check` makes a `CheckedChain` of one that can run. ChainError for no
    link, and for a text longer than MAX_LENGTH: what a chain prints can always be read back.
    """

    links: tuple[Link, ...]

    def __post_init__(self) -> None:
        if not self.links:
            rule, fix = "a chain has at least one link", "write one, such as lora(r=16)"
            raise ChainError("chain", found="no link", rule=rule, fix=fix)
        check_length(str(self))

    def __rshift__(self, other: Link | Chain) -> Chain:
        if not isinstance(other, Link | Chain):
            return NotImplemented
        return Chain(self.links + (other.links if isinstance(other, Chain) else (other,)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.links == other.links

    def __hash__(self) -> int:
        return hash(self.links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self.links)

    def __len__(self) -> int:
        return len(self.links)

    def __str__(self) -> str:
        return " >> ".join(map(str, self.links))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The links that own trainable parameters."""
        return tuple(link for link in self.links if isinstance(link, Adapter))


def check_length(text: str) -> None:
    """Raise ChainError if the text of a chain is longer than MAX_LENGTH."""
    if len(text) > MAX_LENGTH:
        rule, fix = f"a chain has at most {MAX_LENGTH}", "remove links, or run them as several chains"
        raise ChainError("chain", found=f"{len(text)} characters", rule=rule, fix=fix)


WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None, "null": None}
"""Words of the notation that are values."""


def format_value(value: Any) -> str:
    """Format one argument as the notation reads it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_]\w*", value) and value.lower() not in WORDS
        return value if plain else f'"{value}"'
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # alpha=32, as people write it
    return repr(value)
