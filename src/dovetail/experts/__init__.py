"""Experts: adapters and fine-tuned models as ternary task vectors, near the entropy limit (`docs/format.md`)."""

from dovetail.experts.activate import activate, deactivate, put
from dovetail.experts.expert import Expert, compress, from_masks, load, similarity
from dovetail.experts.masks import Masks, elect, scaled_sum, sign_sum
from dovetail.experts.task_vector import Origin, TaskVector

__all__ = [
    "Expert",
    "Masks",
    "Origin",
    "TaskVector",
    "activate",
    "compress",
    "deactivate",
    "elect",
    "from_masks",
    "load",
    "put",
    "scaled_sum",
    "sign_sum",
    "similarity",
]
