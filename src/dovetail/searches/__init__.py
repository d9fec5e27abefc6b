"""Searches over what a recipe leaves open: the chain, the arguments of its links on each layer, elastic ranks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
