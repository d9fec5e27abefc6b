"""N:M sparsity: of every M consecutive weights along a row's inputs, N are not zero (NVIDIA's convention: 2:4).

A pattern says which sparsity it has, 1 - N/M, so a pruner needs no other; what both say must agree.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from dovetail.errors import ChainError

MOST = 64
"""The longest window."""

DEFAULT_SPARSITY = 0.5
"""Of pruners; beside a pattern it counts as not given."""


def read_pattern(method: str, pattern: str) -> tuple[int, int]:
    """N and M of the text "N:M", or ChainError.

    >>> read_pattern("wanda", "2:4")
    (2, 4)
    """
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", pattern)
    n, m = map(int, match.groups()) if match else (0, 0)
    if not 1 <= n < m <= MOST:
        raise ChainError(
            method,
            found=f"pattern={pattern!r}",
            rule=f"a pattern must be N:M with 1 <= N < M <= {MOST}: N nonzero weights of every M inputs",
            fix='set pattern="2:4"',
        )
    return n, m


def pattern_sparsity(
    method: str, pattern: str, sparsity: float, allocation: Literal["uniform", "outlier"] = "uniform"
) -> float:
    """Return the pattern's sparsity, 1 - N/M; raise ChainError where the pruner's other arguments contradict it.

    sparsity  as given beside the pattern: 1 - N/M to three places, or the default
    """
    n, m = read_pattern(method, pattern)
    exact = 1 - n / m
    if sparsity != DEFAULT_SPARSITY and not math.isclose(sparsity, exact, abs_tol=1e-3):
        other = (1 - sparsity) * m
        asked = f', or pattern="{round(other)}:{m}"' if math.isclose(other, round(other)) and 0 < other < m else ""
        raise ChainError(
            method,
            found=f'sparsity={sparsity:g}, pattern="{pattern}"',
            rule=f"the pattern {pattern} has the sparsity 1 - {n}/{m} = {exact:g}",
            fix=f"leave sparsity out{asked}",
        )
    if allocation != "uniform":
        raise ChainError(
            method,
            found=f'allocation={allocation}, pattern="{pattern}"',
            rule="a pattern gives every layer the same sparsity",
            fix="remove one of the two",
        )
    return exact


def check_width(where: str, pattern: str, width: int) -> None:
    """ChainError where M does not divide width, the layer's inputs."""
    n, m = read_pattern(where, pattern)
    if width % m == 0:
        return
    same = [(n * d // m, d) for d in range(2, min(width, MOST) + 1) if width % d == 0 and n * d % m == 0]
    other = ""
    if same:
        nearest = min(same, key=lambda pair: abs(pair[1] - m))
        other = f'pattern="{nearest[0]}:{nearest[1]}", or '
    raise ChainError(
        where,
        found=f'in_features={width}, pattern="{pattern}"',
        rule="the pattern's M must divide in_features",
        fix=f"{other}leave this layer out of the targets",
    )
