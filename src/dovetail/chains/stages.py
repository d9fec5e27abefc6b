"""Stages of a chain: it is split by (N* D*), N applied once to the base, D trained together, then merged (CLAM §3.2,
A.10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dovetail.chains.link import Adapter, Chain, Constraint, Kind, Link, Quantizer
from dovetail.chains.registry import links

MADE_BY: dict[str, Kind] = {"zeros": "pruner", "grid": "quantizer"}
"""What a base can have -> the kind of link that makes it."""


def keeps(link: Link, what: str) -> bool:
    """Return whether a link keeps "zeros" or "grid" of the base; one that moves the grid keeps the weights on it."""
    return getattr(link, f"keeps_{what}") or (what == "grid" and isinstance(link, Adapter) and link.moves is not None)


@dataclass(frozen=True)
class Stage:
    """The links of one stage, what the base keeps for them, and what merging them would lose.

    applied     pruners and quantizers, applied once to the base, in order
    trained     differentiable links, trained together
    pruned      the base has the zeros of a pruner of this stage or of an earlier one
    keep_mask   the base keeps the pruner's mask: a constraint of this stage or of a later one reads it
    keep_start  the base keeps its weights as they were before this stage's quantizer: a constraint starts from them
    missing     the constraints to add at the end so that the stage merges without loss of zeros or grid
    """

    applied: tuple[Link, ...]
    trained: tuple[Link, ...]
    pruned: bool = field(default=False, compare=False)
    keep_mask: bool = field(default=False, compare=False)
    keep_start: bool = field(default=False, compare=False)
    missing: tuple[Constraint, ...] = field(default=(), compare=False)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The links that own trainable parameters."""
        return tuple(link for link in self.trained if isinstance(link, Adapter))

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The links that re-impose the base's zeros or grid."""
        return tuple(link for link in self.trained if isinstance(link, Constraint))

    @property
    def decomposing(self) -> Adapter | None:
        """The adapter that chooses its parameters together with the base (`Adapter.decompose`)."""
        return next((link for link in self.adapters if link.starts != "identity"), None)

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer that is applied in this stage."""
        return next((link for link in self.applied if isinstance(link, Quantizer)), None)

    @property
    def from_codes(self) -> tuple[bool, ...]:
        """Of each trained link, whether the weight that it receives at the start is the base as stored."""
        on_codes = all(link.from_codes for link in self.constraints)
        found = []
        for link in self.trained:
            found.append(on_codes)
            on_codes = on_codes or (isinstance(link, Constraint) and link.restores == "grid")
        return tuple(found)

    def breaker(self, what: str) -> str:
        """Return the name of the first trained link that does not keep "zeros" or "grid"."""
        return next(link.name for link in self.trained if not keeps(link, what))

    def __str__(self) -> str:
        return " >> ".join(map(str, self.applied + self.trained))


@dataclass(frozen=True, eq=False)
class CheckedChain(Chain):
    """A chain that can run, with its stages. Made by `dovetail.chains.check.check` alone.

    held  the pruner and the quantizer of earlier rounds, where the base is a merged model
    """

    held: tuple[Link, ...] = ()

    @cached_property
    def given_up(self) -> tuple[str, ...]:
        """What the base holds and the chain does not keep: "zeros", "grid".

        It keeps what it names before it would lose it (by a pruner or quantizer of its own) or restores (by a
        constraint): where that is not enough, it cannot be merged without loss.
        """
        return tuple(
            what
            for what, kind in MADE_BY.items()
            if any(link.kind == kind for link in self.held) and self._loses(what, kind)
        )

    def _loses(self, what: str, kind: Kind) -> bool:
        if any(isinstance(link, Constraint) and link.restores == what for link in self):
            return False
        first = next((link for link in self if link.kind == kind or not keeps(link, what)), None)
        return first is not None and first.kind != kind

    @property
    def keeping(self) -> str:
        """How to keep what the chain gives up, as a fix."""
        return f"use {self.closed} to keep them"

    @property
    def closed(self) -> str:
        """The chain, and the constraints at its end that restore what it gives up."""
        return " >> ".join(map(str, (*self, *map(_restoring, self.given_up))))

    @cached_property
    def kept(self) -> tuple[Link, ...]:
        """The pruner and the quantizer of earlier rounds whose zeros and grid the chain starts from."""
        return tuple(link for link in self.held if not any(MADE_BY[what] == link.kind for what in self.given_up))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Its stages, in order."""
        return stages(self, self.kept)

    @cached_property
    def quantizer(self) -> Quantizer | None:
        """The quantizer whose grid it ends on; a legal chain has at most one."""
        named = (link for link in (*self, *self.kept) if isinstance(link, Quantizer))
        return next((link for link in named if link in self.kept or not link.continues), None)

    @cached_property
    def pruner(self) -> Link | None:
        """The last pruner of the chain, or that of an earlier round."""
        return next((link for link in reversed((*self.held, *self)) if link.kind == "pruner"), None)

    def quantizer_at(self, stage: int) -> Quantizer | None:
        """Return the quantizer on whose grid the base is in that stage."""
        so_far = (*self.kept, *(link for part in self.stages[: stage + 1] for link in part.applied))
        return self.quantizer if self.quantizer in so_far else None


def stages(chain: Chain, kept: Sequence[Link] = ()) -> tuple[Stage, ...]:
    """Split a chain by (N* D*).

    kept  the pruner and the quantizer whose zeros and grid the base has already: that quantizer is not applied again

    >>> from dovetail import chain
    >>> [str(stage) for stage in stages(chain("lora >> wanda(0.5) >> nf4 >> lora >> ia3"))]
    ['lora(r=8)', 'wanda(0.5) >> nf4 >> lora(r=8) >> ia3']
    """
    split: list[tuple[list[Link], list[Link]]] = [([], [])]
    for link in chain:
        if isinstance(link, Quantizer) and (link in kept or link.continues):
            continue
        if split[-1][1] and not link.differentiable:
            split.append(([], []))
        split[-1][1 if link.differentiable else 0].append(link)
    found = []
    for number, (applied, trained) in enumerate(split):
        so_far = [*kept, *(link for part, _ in split[: number + 1] for link in part)]
        still = [link for _, part in split[number:] for link in part if isinstance(link, Constraint)]
        pruned = any(link.kind == "pruner" for link in so_far)
        quantized_here = any(link.kind == "quantizer" for link in applied)
        found.append(
            Stage(
                tuple(applied),
                tuple(trained),
                pruned=pruned,
                keep_mask=pruned and any(link.restores == "zeros" for link in still),
                keep_start=quantized_here
                and any(isinstance(link, Constraint) and not link.from_codes for link in trained),
                missing=_missing(so_far, trained),
            )
        )
    return tuple(found)


def _missing(applied: Sequence[Link], trained: Sequence[Link]) -> tuple[Constraint, ...]:
    """Return the constraints that restore what merging `trained` into a base made by `applied` loses."""
    found = []
    for what, kind in MADE_BY.items():
        kept = True
        for link in trained:
            if isinstance(link, Constraint) and link.restores == what:
                kept = True
            elif not keeps(link, what):
                kept = False
        if not kept and any(link.kind == kind for link in applied):
            found.append(_restoring(what))
    return tuple(found)


def _restoring(what: str) -> Constraint:
    """Return the constraint that restores "zeros" or "grid"."""
    constraints = (cls for cls in links().values() if issubclass(cls, Constraint))
    return next(cls() for cls in constraints if cls.restores == what)
