"""Searches over what a chain leaves open. So far: the ranks of elastic adapters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
