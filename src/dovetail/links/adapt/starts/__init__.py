"""Starts of a low rank that choose it together with the base: value of the argument `init` -> method, one a file."""

from collections.abc import Mapping

from dovetail.links.adapt.starts.factors import Start
from dovetail.links.adapt.starts.loftq import loftq
from dovetail.links.adapt.starts.lqlora import lqlora
from dovetail.links.adapt.starts.pissa import pissa

STARTS: Mapping[str, Start] = {
    "loftq": Start(loftq, quantizer=True, iterations=5),
    "pissa": Start(pissa, quantizer=False),
    "lqlora": Start(lqlora, quantizer=True, iterations=100),
}
