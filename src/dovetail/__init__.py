"""Dovetail: adapters, quantization and pruning as links of one chain, merged without loss."""

from dovetail import adapt, close, quantize, sparsify  # registers the links
from dovetail.apply import advance, apply
from dovetail.chain.notation import Chain, chain
from dovetail.errors import DovetailError
from dovetail.footprint import Footprint, footprint
from dovetail.load import load
from dovetail.merge import MergeReport, merge

__all__ = [
    "Chain",
    "DovetailError",
    "Footprint",
    "MergeReport",
    "adapt",
    "advance",
    "apply",
    "chain",
    "close",
    "footprint",
    "load",
    "merge",
    "quantize",
    "sparsify",
]
