"""Experts: adapters and fine-tuned models as ternary task vectors, near the entropy limit (`docs/format.md`)."""

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
