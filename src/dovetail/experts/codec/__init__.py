"""Codec of task experts: ternary values as bytes near the entropy limit."""
