"""The groups of inputs that share a scale of the base's grid, for adapters that move the grid."""

from __future__ import annotations

from dovetail.chains.link import Site
from dovetail.errors import ChainError


def groups_of(link: str, site: Site) -> int:
    """Return the number of groups of a row; ChainError where a block of the grid does not lie in one row."""
    if site.block == 0 or site.in_features % site.block:
        raise ChainError(
            f"{link} at {site.name}",
            found=f"blocks of {site.block} weights, in_features={site.in_features}" if site.block else "no grid",
            rule=f"{link} needs a quantizer whose blocks each lie in one row",
            fix="use a group or block of the quantizer that divides in_features, such as 32, or group=0",
        )
    return site.in_features // site.block
