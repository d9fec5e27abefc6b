"""A search space as genes: each parameter is one number within bounds, for operators to cross, move and round.

distribution                       gene                    bounds
float                              value                   low, high
float, logarithmic                 log(value)              log(low), log(high)
integer, or float with a step      (value - low) / step    -1/2, count - 1/2
integer, logarithmic               log(value)              log(low - 1/2), log(high + 1/2)
category                           index of the choice     -1/2, count - 1/2

The bounds of a discrete gene lie half a step outside of its values, so that every value has the same share of the range
after rounding. A category whose choices are sorted numbers, such as the bits (2, 3, 4, 8), is ordered as they are. The
indices of any other category have no order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Key = tuple[float, ...]
"""What equal configurations share: the internal value of each parameter, to 12 significant digits."""


@dataclass(frozen=True)
class Gene:
    """One parameter of a search space.

    count  number of its values; None if it is continuous
    lower, upper  bounds of the gene
    """

    distribution: CategoricalDistribution | FloatDistribution | IntDistribution
    count: int | None
    lower: float
    upper: float

    @classmethod
    def of(cls, distribution: BaseDistribution) -> Gene:
        """Return the gene of a parameter with this distribution."""
        if isinstance(distribution, CategoricalDistribution):
            count = len(distribution.choices)
            return cls(distribution, count, -0.5, count - 0.5)
        if not isinstance(distribution, FloatDistribution | IntDistribution):
            raise TypeError(f"unknown distribution {distribution!r}")
        low, high, step = distribution.low, distribution.high, distribution.step
        count = None if step is None else round((high - low) / step) + 1
        if distribution.log:
            half = 0.0 if step is None else 0.5
            return cls(distribution, count, math.log(low - half), math.log(high + half))
        return cls(distribution, count, low, high) if count is None else cls(distribution, count, -0.5, count - 0.5)

    @property
    def ordered(self) -> bool:
        """Whether the values are sorted numbers."""
        if not isinstance(self.distribution, CategoricalDistribution):
            return True
        numbers = [value for value in self.distribution.choices if isinstance(value, int | float)]
        return len(numbers) == self.count and numbers in (sorted(numbers), sorted(numbers, reverse=True))

    @property
    def ends(self) -> tuple[float, float]:
        """The genes of the first and the last value."""
        if self.count is None:
            return self.lower, self.upper
        return self.encode(self.at(0)), self.encode(self.at(self.count - 1))

    def allows(self, value: Any) -> bool:
        """Return whether the parameter can have this value."""
        if isinstance(self.distribution, CategoricalDistribution):
            return value in self.distribution.choices
        if (
            isinstance(value, bool | str)
            or value is None
            or not self.distribution.low <= value <= self.distribution.high
        ):
            return False
        return self.count is None or math.isclose(self.at(self.index(value)), value, rel_tol=1e-9, abs_tol=1e-12)

    def encode(self, value: Any) -> float:
        """Return the gene of a value."""
        if isinstance(self.distribution, FloatDistribution | IntDistribution) and self.distribution.log:
            return math.log(value)
        return float(value) if self.count is None else float(self.index(value))

    def decode(self, gene: float) -> Any:
        """Return the value next to a gene."""
        if isinstance(self.distribution, FloatDistribution | IntDistribution) and self.distribution.log:
            gene = math.exp(gene)
            if self.count is not None:
                gene -= self.distribution.low
        if self.count is not None:
            return self.at(min(max(math.floor(gene + 0.5), 0), self.count - 1))
        assert isinstance(self.distribution, FloatDistribution)
        return min(max(gene, self.distribution.low), self.distribution.high)

    def index(self, value: Any) -> int:
        """Return the place of a value among the values of a discrete parameter."""
        if isinstance(self.distribution, CategoricalDistribution):
            return int(self.distribution.to_internal_repr(value))
        assert self.distribution.step is not None
        return round((value - self.distribution.low) / self.distribution.step)

    def at(self, index: int) -> Any:
        """Return the value at a place among the values of a discrete parameter."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices[index]
        assert self.distribution.step is not None
        return min(self.distribution.low + index * self.distribution.step, self.distribution.high)


class Space:
    """The genes of a search space, in the order of its names.

    lower, upper       (d,)  bounds of each gene
    smallest, largest  (d,)  genes of the first and the last value
    ordered            (d,)  whether the values of the parameter are sorted numbers
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self.genes = {name: Gene.of(distribution) for name, distribution in distributions.items()}
        self.lower = np.array([gene.lower for gene in self.genes.values()])
        self.upper = np.array([gene.upper for gene in self.genes.values()])
        self.smallest = np.array([gene.ends[0] for gene in self.genes.values()])
        self.largest = np.array([gene.ends[1] for gene in self.genes.values()])
        self.ordered = np.array([gene.ordered for gene in self.genes.values()], dtype=bool)

    def encode(self, parameters: Mapping[str, Any]) -> NDArray[np.float64]:
        """Return the genes of a configuration, (d,)."""
        return np.array([gene.encode(parameters[name]) for name, gene in self.genes.items()])

    def decode(self, genes_d: NDArray[np.float64]) -> dict[str, Any]:
        """Return the configuration next to the genes."""
        listed = zip(self.genes.items(), genes_d.tolist(), strict=True)
        return {name: gene.decode(value) for (name, gene), value in listed}

    def features(self, parameters: Mapping[str, Any]) -> NDArray[np.float64]:
        """Return coordinates for a distance: numbers scaled to [0, 1], and the choices of a category at distance 1."""
        scaled_d = (self.encode(parameters) - self.lower) / (self.upper - self.lower)
        parts = [
            [value] if gene.ordered else np.eye(gene.count or 0)[gene.index(parameters[name])] / math.sqrt(2)
            for (name, gene), value in zip(self.genes.items(), scaled_d, strict=True)
        ]
        return np.concatenate(parts)

    def key(self, parameters: Mapping[str, Any]) -> Key:
        """Return what equal configurations share."""
        internal = [gene.distribution.to_internal_repr(parameters[name]) for name, gene in self.genes.items()]
        return tuple(float(f"{value:.12g}") for value in internal)

    def allows(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether the configuration has a value of the space for each of its names."""
        return all(name in parameters and gene.allows(parameters[name]) for name, gene in self.genes.items())

    def random(self, random: np.random.Generator) -> dict[str, Any]:
        """Return a configuration drawn uniformly."""
        return self.decode(random.uniform(self.lower, self.upper))

    def neighbour(self, parameters: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """Return the configuration with one parameter moved: to the next value, another choice, or by about 5 %."""
        moved = {name: parameters[name] for name in self.genes}
        name, gene = list(self.genes.items())[random.integers(len(self.genes))]
        if gene.count is None:
            step = random.normal(scale=0.05) * (gene.upper - gene.lower)
            moved[name] = gene.decode(gene.encode(moved[name]) + step)
        elif gene.ordered:
            step = int(random.choice((-1, 1)))
            moved[name] = gene.at(min(max(gene.index(moved[name]) + step, 0), gene.count - 1))
        else:
            moved[name] = gene.at((gene.index(moved[name]) + int(random.integers(1, gene.count))) % gene.count)
        return moved

    def free(self, taken: Collection[Key], random: np.random.Generator) -> dict[str, Any] | None:
        """Return a configuration that is not taken, or None if all are.

        In a discrete space it is the first free one after a random one, in lexicographic order, which takes time linear
        in the number of those taken.
        """
        counts = [gene.count for gene in self.genes.values() if gene.count is not None]
        if len(counts) < len(self.genes):
            return self.random(random)
        places = [int(random.integers(count)) for count in counts]
        for _ in range(len(taken) + 1):
            listed = zip(self.genes.items(), places, strict=True)
            parameters = {name: gene.at(place) for (name, gene), place in listed}
            if self.key(parameters) not in taken:
                return parameters
            for digit, count in enumerate(counts):
                places[digit] = (places[digit] + 1) % count
                if places[digit]:
                    break
        return None
