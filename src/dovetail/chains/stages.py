"""Stages of a chain: it is split by (N* D*), N applied once to the base, D trained together, then merged (CLAM §3.2,
A.10)."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.chains.link import Adapter, Chain, Link


@dataclass(frozen=True)
class Stage:
    """Links of one stage.

    applied  pruners and quantizers, applied once to the base, in order
    trained  differentiable links, trained together
    """

    applied: tuple[Link, ...]
    trained: tuple[Link, ...]

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The links that own trainable parameters."""
        return tuple(link for link in self.trained if isinstance(link, Adapter))

    def __str__(self) -> str:
        return " >> ".join(map(str, self.applied + self.trained))


def stages(chain: Chain) -> tuple[Stage, ...]:
    """Splits a chain by (N* D*).

    >>> from dovetail import chain
    >>> [str(stage) for stage in stages(chain("lora >> wanda(0.5) >> nf4 >> lora >> ia3"))]
    ['lora(r=8)', 'wanda(0.5) >> nf4 >> lora(r=8) >> ia3']
    """
    found: list[Stage] = []
    applied: list[Link] = []
    trained: list[Link] = []
    for link in chain:
        if trained and not link.differentiable:
            found.append(Stage(tuple(applied), tuple(trained)))
            applied, trained = [], []
        (trained if link.differentiable else applied).append(link)
    found.append(Stage(tuple(applied), tuple(trained)))
    return tuple(found)
