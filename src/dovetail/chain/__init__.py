"""Chains: links, notation, legality, stages, the planner and the layer. Importing this package registers every link."""

import dovetail.adapt
import dovetail.close
import dovetail.quantize
import dovetail.sparsify  # noqa: F401
