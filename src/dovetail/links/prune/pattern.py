"""What pruners with a sparsity share: the checks of their arguments, and N:M patterns.

In an N:M pattern, N of every M consecutive weights along a row's inputs are nonzero (NVIDIA's convention: 2:4). A
pattern implies its sparsity, 1 - N/M. A sparsity given beside it must agree.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from dovetail.chains.link import Pruner, Site, positional
from dovetail.errors import ChainError

MOST = 64
"""The longest window."""

DEFAULT_SPARSITY = 0.5
"""The default of pruners; beside a pattern it counts as not given."""


@dataclass(frozen=True)
class SparsityPruner(Pruner):
    """A pruner whose zeros are given as a fraction or as an N:M pattern.

    sparsity    fraction of zeros; with a pattern it is the pattern's
    allocation  "uniform": the same fraction in every layer; "outlier": fewer zeros where scores have more outliers
    pattern     "N:M": of every M consecutive weights along a row's inputs, N are nonzero
    """

    sparsity: float = positional(DEFAULT_SPARSITY)
    allocation: Literal["uniform", "outlier"] = "uniform"
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            rule = "sparsity, the fraction of zeros, must be in [0, 1)"
            raise self._bad(f"sparsity={self.sparsity}", rule, "set it to 0.5")
        if self.window is not None:
            object.__setattr__(self, "sparsity", self._pattern_sparsity(*self.window))

    @property
    def window(self) -> tuple[int, int] | None:
        """N and M of the pattern; None without one. Raises ChainError for a text that is no pattern.

        >>> from dovetail.links.prune import Wanda
        >>> Wanda(pattern="2:4").window
        (2, 4)
        """
        if self.pattern is None:
            return None
        match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", self.pattern)
        n, m = map(int, match.groups()) if match else (0, 0)
        if not 1 <= n < m <= MOST:
            rule = f"a pattern must be N:M with 1 <= N < M <= {MOST}: N nonzero weights of every M inputs"
            raise self._bad(f"pattern={self.pattern!r}", rule, 'set pattern="2:4"')
        return n, m

    def _pattern_sparsity(self, n: int, m: int) -> float:
        """Return 1 - N/M; raise ChainError where the other arguments contradict the pattern.

        The sparsity may be given beside the pattern, to three places.
        """
        exact = 1 - n / m
        if self.sparsity != DEFAULT_SPARSITY and not math.isclose(self.sparsity, exact, abs_tol=1e-3):
            other = (1 - self.sparsity) * m
            asked = f', or pattern="{round(other)}:{m}"' if math.isclose(other, round(other)) and 0 < other < m else ""
            found = f'sparsity={self.sparsity:g}, pattern="{self.pattern}"'
            rule = f"the pattern {self.pattern} has the sparsity 1 - {n}/{m} = {exact:g}"
            raise self._bad(found, rule, f"leave sparsity out{asked}")
        if self.allocation != "uniform":
            found = f'allocation={self.allocation}, pattern="{self.pattern}"'
            raise self._bad(found, "a pattern gives every layer the same sparsity", "remove one of the two")
        return exact

    def check(self, site: Site) -> None:
        """Raise ChainError where the pattern's M does not divide the layer's inputs."""
        self.check_width(f"{self.name} at {site.name}", site.in_features)

    def check_width(self, where: str, width: int) -> None:
        """Raise ChainError where the pattern's M does not divide `width`, the inputs of the layer at `where`."""
        n, m = self.window or (0, 1)
        if width % m == 0:
            return
        same = [(n * d // m, d) for d in range(2, min(width, MOST) + 1) if width % d == 0 and n * d % m == 0]
        other = ""
        if same:
            nearest = min(same, key=lambda pair: abs(pair[1] - m))
            other = f'pattern="{nearest[0]}:{nearest[1]}", or '
        raise ChainError(
            where,
            found=f'in_features={width}, pattern="{self.pattern}"',
            rule="the pattern's M must divide in_features",
            fix=f"{other}leave this layer out of the targets",
        )
