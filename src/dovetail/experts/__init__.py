"""Experts: adapters and fine-tuned models as ternary task vectors, near the entropy limit (`docs/format.md`)."""

from typing import TYPE_CHECKING

from dovetail.lazy import lazy

if TYPE_CHECKING:
    from dovetail.experts import baselines
    from dovetail.experts.activate import activate, deactivate, put, verify
    from dovetail.experts.compose import Composition, compose
    from dovetail.experts.expert import Expert, compress, from_masks, load, similarity
    from dovetail.experts.masks import Masks, elect, scaled_sum, sign_sum
    from dovetail.experts.merging import merge, merge_method
    from dovetail.experts.sources import task_vector
    from dovetail.experts.store import Store
    from dovetail.experts.sweep import Point, Score, Sweep, default_alpha, scorer, sweep
    from dovetail.experts.task_vector import Origin, TaskVector
    from dovetail.experts.unpack import unpack

_HOME = {
    "Composition": "compose",
    "Expert": "expert",
    "Masks": "masks",
    "Origin": "task_vector",
    "Point": "sweep",
    "Score": "sweep",
    "Store": "store",
    "Sweep": "sweep",
    "TaskVector": "task_vector",
    "activate": "activate",
    "baselines": "",
    "compose": "compose",
    "compress": "expert",
    "deactivate": "activate",
    "default_alpha": "sweep",
    "elect": "masks",
    "from_masks": "expert",
    "load": "expert",
    "merge": "merging",
    "merge_method": "merging",
    "put": "activate",
    "scaled_sum": "masks",
    "scorer": "sweep",
    "sign_sum": "masks",
    "similarity": "expert",
    "sweep": "sweep",
    "task_vector": "sources",
    "unpack": "unpack",
    "verify": "activate",
}
"""Public name -> the module that holds it: `dovetail inspect` must not wait for what composes and sweeps."""

__all__ = [
    "Composition",
    "Expert",
    "Masks",
    "Origin",
    "Point",
    "Score",
    "Store",
    "Sweep",
    "TaskVector",
    "activate",
    "baselines",
    "compose",
    "compress",
    "deactivate",
    "default_alpha",
    "elect",
    "from_masks",
    "load",
    "merge",
    "merge_method",
    "put",
    "scaled_sum",
    "scorer",
    "sign_sum",
    "similarity",
    "sweep",
    "task_vector",
    "unpack",
    "verify",
]

lazy(__name__, _HOME)
