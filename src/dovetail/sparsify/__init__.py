"""Pruners: links that zero weights once, one method a file. Importing this package registers them."""

from dovetail.sparsify.magnitude import Magnitude
from dovetail.sparsify.wanda import Wanda

__all__ = ["Magnitude", "Wanda"]
