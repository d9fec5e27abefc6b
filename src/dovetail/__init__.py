"""Dovetail: adapters, quantization and pruning as links of one chain, merged without loss."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
