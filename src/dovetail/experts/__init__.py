"""Experts: adapters and fine-tuned models as ternary task vectors, near the entropy limit (`docs/format.md`)."""

from dovetail.experts.expert import Expert, compress, from_masks, load, similarity
from dovetail.experts.masks import Masks, elect, scaled_sum, sign_sum

__all__ = ["Expert", "Masks", "compress", "elect", "from_masks", "load", "scaled_sum", "sign_sum", "similarity"]
