"""Putting a chain on a model: pruners and quantizers run over its layers, block by block."""
