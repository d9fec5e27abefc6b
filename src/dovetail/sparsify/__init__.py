"""Pruners: links that zero weights once, one method a file. Importing this package registers them."""

from dovetail.sparsify.magnitude import Magnitude
from dovetail.sparsify.ria import Ria
from dovetail.sparsify.scored import ScoredPruner, scoring
from dovetail.sparsify.sparsegpt import SparseGPT
from dovetail.sparsify.wanda import Wanda

__all__ = ["Magnitude", "Ria", "ScoredPruner", "SparseGPT", "Wanda", "scoring"]
