"""Assignment of a chain to layers: the same links everywhere, with arguments that may differ between layers.

    apply(model, "int(bits=4) >> lora(r=8)", layers={"down": "int(bits=8) >> lora(r=16)"})

The chain of a layer has the links of the common chain in their order, and differs from it in arguments alone. So all
layers have the same stages, kinds of links and learning rates, and one trainer, merge and file format serve them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dovetail.chains.check import check
from dovetail.chains.link import Chain, Link
from dovetail.chains.notation import chain
from dovetail.chains.stages import CheckedChain
from dovetail.errors import ChainError, TargetError
from dovetail.models.targets import Target, matches

Held = tuple[Link, ...]
"""The pruner and the quantizer of a merged base (`dovetail.chains.layer.held`)."""
Layers = Mapping[str, str | Chain | Link]
"""Pattern of layers, as in `targets` -> the chain of the layers that it fits."""


@dataclass(frozen=True)
class Assignment:
    """The chain of each layer. Made by `assign` alone.

    chain     of the layers that no pattern fits
    layers    pattern -> chain, in order: of several patterns that fit a layer, the last decides
    resolved  path of a layer -> its chain, where it is not `chain`; known once the targets are found (`on`)
    """

    chain: CheckedChain
    layers: Mapping[str, CheckedChain] = field(default_factory=dict)
    resolved: Mapping[str, CheckedChain] = field(default_factory=dict, repr=False)

    def at(self, layer: str) -> CheckedChain:
        """Return the chain of a layer, by its path."""
        return self.resolved.get(layer, self.chain)

    @property
    def chains(self) -> tuple[CheckedChain, ...]:
        """All chains of the assignment, the common one first."""
        return (self.chain, *self.layers.values())

    @property
    def texts(self) -> dict[str, str]:
        """Pattern -> chain, as `layers` of a recipe writes them."""
        return {pattern: str(links) for pattern, links in self.layers.items()}

    def on(self, targets: Sequence[Target], held: Callable[[str], Held]) -> Assignment:
        """Return the assignment with the chain of each of these targets.

        held    path of a layer -> what it has from an earlier round
        errors  TargetError for a pattern that fits none of them; ChainError for a chain that does not suit what a layer
                has from an earlier round
        """
        chosen: dict[str, CheckedChain] = {}
        for pattern, links in self.layers.items():
            fitting = [target.name for target in targets if matches(target, pattern)]
            if not fitting:
                raise TargetError(
                    f"layers {pattern!r}",
                    found="no such layer among the targets",
                    rule="each pattern of layers must fit a target",
                    fix="remove the pattern, or add its layers to targets",
                )
            chosen |= dict.fromkeys(fitting, links)
        made: dict[tuple[str, Held], CheckedChain] = {}
        resolved = {}
        for target in targets:
            name = target.name
            links = chosen.get(name, self.chain)
            had = held(name)
            key = str(links), had
            if key not in made:
                made[key] = links if had == links.held else _check_at(name, links, had)
            if made[key] is not self.chain:
                resolved[name] = made[key]
        return Assignment(self.chain, self.layers, resolved)

    def __str__(self) -> str:
        return ", ".join([str(self.chain), *(f"{pattern}: {links}" for pattern, links in self.layers.items())])


def assign(common: str | Chain | Link, layers: Layers | None = None, held: Held | None = None) -> Assignment:
    """Check the chain of each layer, and return the assignment.

    common  the chain of the layers that no pattern fits
    layers  pattern -> chain with the same links in the same order
    held    see `dovetail.chains.check.check`
    errors  ChainError for an illegal chain, or for one with other links

    >>> found = assign("int(bits=4) >> lora(r=8)", {"down": "int(bits=8) >> lora(r=16)"})
    >>> found.texts
    {'down': 'int(bits=8, group=64) >> lora(r=16)'}
    """
    checked = check(common, held)
    return Assignment(checked, {pattern: _alike(pattern, text, checked) for pattern, text in (layers or {}).items()})


def _check_at(layer: str, links: CheckedChain, had: Held) -> CheckedChain:
    """Check a chain on what a layer has from an earlier round; an error names the layer."""
    try:
        return check(links, had)
    except ChainError as error:
        where = f"{error.where} at {layer}"
        raise ChainError(where, found=error.found, rule=error.rule, fix=error.fix) from None


def _alike(pattern: str, text: str | Chain | Link, common: CheckedChain) -> CheckedChain:
    links = check(chain(text), common.held)
    if [type(link) for link in links] != [type(link) for link in common]:
        names = " >> ".join(link.name for link in common)
        raise ChainError(
            f"layers {pattern!r}",
            found=str(links),
            rule=f"the chain of a layer must have the links of {common} in the same order; only arguments may differ",
            fix=f"write a chain of {names}",
        )
    return links
