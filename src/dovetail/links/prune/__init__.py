"""Pruners: links that zero weights once, one method a file. Importing this package registers them."""

from dovetail.links.prune.magnitude import Magnitude
from dovetail.links.prune.ria import Ria
from dovetail.links.prune.scored import ScoredPruner, scoring
from dovetail.links.prune.sparsegpt import SparseGPT
from dovetail.links.prune.wanda import Wanda
