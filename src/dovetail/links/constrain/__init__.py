"""Constraints: links that re-impose what the base has, one a file. Importing this package registers them."""

from dovetail.links.constrain.regrid import Regrid
from dovetail.links.constrain.remask import Remask
