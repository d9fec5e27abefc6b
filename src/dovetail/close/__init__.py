"""Closers: links that re-impose what the base has, one a file. Importing this package registers them."""

from dovetail.close.regrid import Regrid
from dovetail.close.remask import Remask

__all__ = ["Regrid", "Remask"]
