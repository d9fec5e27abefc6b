"""Elastic ranks: an adapter whose leading parts are adapters too, `lora(r=32, elastic=[32, 24, 16])`.

    rank k of LoRA:   W' = W + c B[:, :k] A[:k]      c is that of the full rank

Training draws a rank per step and group of layers, so that all ranks are trained. The ranks to use are chosen
afterwards: the reference ranks, the median of each list, or better ones by `dovetail.search_ranks`. `extract` replaces
the elastic adapters by plain ones.

Source: neural low-rank adapter search (NLS), SQFT §2.2 and §3.1, after Shears and LoNAS. For LoRA, DoRA, LoHa and VeRA.
A training step costs at most that of the largest rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from torch import nn

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.linear import LinkState, chain_layers
from dovetail.chains.link import Adapter, Link, arguments
from dovetail.errors import ChainError, LoadError
from dovetail.models.roles import CROSS_ATTENTION, roles_of


@dataclass(frozen=True)
class Group:
    """Elastic adapters that run at one rank: one link on layers that read the same input.

    name   the layers' paths, joined, and the link's place in its stage: "model.layers.0.self_attn.q_proj+k_proj/0"
    ranks  to choose from, the largest first
    """

    name: str
    ranks: tuple[int, ...]
    states: tuple[LinkState, ...] = field(repr=False)

    @property
    def rank(self) -> int:
        """The rank that it runs at; of its first layer, should a file have said otherwise of the others."""
        return self.states[0].rank or self.ranks[0]

    @property
    def reference(self) -> int:
        """The median of its ranks (SQFT §3.1)."""
        return self.states[0].reference or self.ranks[0]

    def use_rank(self, rank: int) -> None:
        """Run at this rank, one of `ranks`, from now on."""
        for state in self.states:
            state.use_rank(rank)


def groups(model: nn.Module) -> list[Group]:
    """Return the groups of the current stage in module order; none without an elastic link, or once it is extracted.

    The query, key and value layers of one attention are a group, without the query where it reads another input
    (cross-attention); every other layer, and every layer without a label (`dovetail.models.targets`), is one by itself.
    Layers whose links have other arguments are a group of their own.
    """
    found: dict[tuple[str, int, Link], dict[str, LinkState]] = {}
    for (name, place), state in _elastic(model).items():
        found.setdefault((_group(name), place, state.link), {})[name] = state
    return [_named(place, states) for (_, place, _), states in found.items()]


def _group(layer: str) -> str:
    roles, parent = roles_of(layer), layer.rpartition(".")[0]
    if not roles or not set(roles) <= {"query", "key", "value"}:
        return layer
    crossed = "query" in roles and not CROSS_ATTENTION.isdisjoint(layer.split("."))
    return layer if crossed else f"{parent}."


def _named(place: int, states: Mapping[str, LinkState]) -> Group:
    first, *others = states
    name = "+".join([first, *(other.rpartition(".")[2] for other in others)])
    link = states[first].link
    assert isinstance(link, Adapter)
    return Group(f"{name}/{place}", link.ranks, tuple(states.values()))


def _elastic(model: nn.Module) -> dict[tuple[str, int], LinkState]:
    """Return (layer, place in the stage) -> the elastic adapters of the current stage."""
    return {
        (name, place): state
        for name, layer in chain_layers(model).items()
        for place, state in enumerate(layer.states)
        if state.rank is not None
    }


def use_reference(elastic: Sequence[Group]) -> None:
    """Run every group at its reference rank."""
    for group in elastic:
        group.use_rank(group.reference)


def draw_ranks(elastic: Sequence[Group], seed: str) -> None:
    """Run every group at a rank drawn uniformly from its list; the seed alone determines the draw."""
    random = Random(seed)
    for group in elastic:
        group.use_rank(random.choice(group.ranks))


def ranks(model: nn.Module) -> dict[str, int]:
    """Return group name -> the rank that the group runs at."""
    return {group.name: group.rank for group in groups(model)}


def set_ranks(model: nn.Module, chosen: Mapping[str, int]) -> None:
    """Run groups, by name, at these ranks; raise ChainError for an unknown name or rank and change nothing."""
    named = {group.name: group for group in groups(model)}
    for name, rank in chosen.items():
        if name not in named:
            some = ", ".join([*list(named)[:3], *(["…"] if len(named) > 3 else [])]) or "none here"
            rule = f"the name must be a group of elastic adapters: {some}"
            fix = "use a name that dovetail.chains.layer.elastic.ranks(model) returns"
            raise ChainError("set_ranks", found=f"{name!r}"[:200], rule=rule, fix=fix)
        known = named[name].ranks
        if rank not in known:
            rule, fix = f"the rank must be one of {list(known)}", f"set {known[0]}"
            raise ChainError(f"set_ranks at {name}", found=f"rank {rank}", rule=rule, fix=fix)
    for name, rank in chosen.items():
        named[name].use_rank(rank)


def extract(model: nn.Module) -> nn.Module:
    """Replace elastic adapters, in place, by plain ones of their current ranks; the other parameters are dropped.

    returns  the same model, with bit-identical effective weights; each layer's link has its current rank, and the
             alpha that keeps the scale
    errors   ChainError where no adapter is elastic
    """
    record = applied(model)
    if not _elastic(model):
        raise ChainError(
            str(record.chain),
            found="no elastic adapter in the current stage",
            rule="extract needs at least one elastic adapter",
            fix="use an elastic link, such as lora(r=16, elastic=[16, 12, 8])",
        )
    for layer in record.layers.values():
        layer.extract()
    return model


# The ranks of a saved adapter.


def specs(model: nn.Module) -> dict[str, tuple[Adapter, LinkState]]:
    """Return "LAYER/PLACE" -> the elastic link of the chain, and the current one there, extracted or not."""
    record = applied(model)
    return {
        f"{name}/{place}": (link, layer.states[place])
        for name, layer in record.layers.items()
        for place, link in enumerate(record.stage_at(name).trained)
        if isinstance(link, Adapter) and link.ranks
    }


def saved_ranks(model: nn.Module) -> tuple[dict[str, int], bool]:
    """Return "LAYER/PLACE" -> the rank that the adapter runs at; and whether the adapters are extracted."""
    here = specs(model)
    found = {key: state.rank or arguments(state.link)["r"] for key, (_, state) in here.items()}
    return found, any(state.rank is None for _, state in here.values())


def check_saved(model: nn.Module, saved: Mapping[str, int], extracted: bool, where: str) -> None:
    """Raise LoadError unless the result of `saved_ranks` for another model can be loaded into this one."""
    here = specs(model)
    fix = "save the adapter again, or load it on the base"
    for key in sorted(here.keys() ^ saved.keys()):
        found = f"ranks of {key}"[:200] + (" in the file alone" if key in saved else " missing from the file")
        rule = "the file must hold exactly one rank for each elastic adapter and layer"
        raise LoadError(where, found=found, rule=rule, fix=fix)
    for key, rank in saved.items():
        link, state = here[key]
        if rank not in link.ranks:
            rule = f"{link} has the ranks {list(link.ranks)}"
            raise LoadError(f"{where}, {key}", found=f"rank {rank}", rule=rule, fix=fix)
        if state.rank is None and not (extracted and state.link == link.plain(rank)):
            found = f"a model whose adapter is extracted as {state.link}"
            rule = "an adapter must be put on the base, or on its own chain"
            raise LoadError(f"{where}, {key}", found=found, rule=rule, fix=fix)


def shapes_at(model: nn.Module, saved: Mapping[str, int]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return "LAYER/PLACE" -> name -> shape of the parameters after extraction at these ranks."""
    return {key: link.plain(saved[key]).parameter_shapes(state.site) for key, (link, state) in specs(model).items()}


def load_ranks(model: nn.Module, saved: Mapping[str, int], extracted: bool) -> None:
    """Run the adapters at the ranks of `saved_ranks`, extracted where they were; call `check_saved` first."""
    for key, (_, state) in specs(model).items():
        if state.rank is not None:
            state.use_rank(saved[key])
    if extracted:
        for layer in applied(model).layers.values():
            layer.extract()
