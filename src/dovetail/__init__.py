"""Dovetail: adapters, quantization and pruning as links of one chain, merged without loss."""
