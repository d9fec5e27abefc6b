"""Chains: the link contract, notation, legality, stages, the planner and the layer that owns base and chain."""
