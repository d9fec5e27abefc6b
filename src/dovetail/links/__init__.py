"""Links, one method a file, and the extension API. Importing this package registers Dovetail's own links.

`docs/add_a_method.md` shows how another package adds a link with the names below.
"""

from dovetail.chains.grid import QuantizedWeight
from dovetail.chains.link import (
    Adapter,
    Constraint,
    Link,
    OutputAdapter,
    Pruner,
    Quantizer,
    Site,
    always_print,
    positional,
)
from dovetail.chains.registry import register
from dovetail.chains.terms import Hadamard, InScale, LowRank, OutScale, RowNorm, Term
from dovetail.links import adapt, constrain, prune, quantize
from dovetail.links.adapt.peft import PeftAdapter, PeftConfig, PeftLink
from dovetail.links.adapt.rank import RankAdapter
from dovetail.links.prune.scored import scoring
