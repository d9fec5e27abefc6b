"""Integer grids as other formats store them: checked and turned into the storage of `int`."""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.chains.packing import pack
from dovetail.errors import LoadError
from dovetail.links.quantize.affine import AffineWeight
from dovetail.links.quantize.integer import Int


def integer_grid(bits: float, in_features: int, groups: int, symmetric: bool) -> Int:
    """Return the quantizer of integers in groups. Raises LoadError for widths and groups that Dovetail lacks."""
    if bits not in Int.widths or groups < 1 or in_features % groups:
        found = f"{bits:g} bits, {groups} groups of {in_features} inputs"
        rule = "integers must have 2, 3, 4 or 8 bits, in groups that divide the inputs"
        raise LoadError("a quantized layer", found=found, rule=rule, fix="load it without grid")
    return Int(bits=int(bits), group=in_features // groups, symmetric=symmetric)


def integers(empty: AffineWeight, code_oi: Tensor, scale_og: Tensor, zero_og: Tensor | None) -> AffineWeight:
    """Return the weight of codes and zero points, uint8, and scales, any float, of which none is rounded.

    Raises LoadError for scales that float16 does not hold.
    """
    (o, i), groups = empty.shape, empty.shape[1] // empty.block
    narrow = scale_og.to(torch.float16)
    if scale_og.shape != (o, groups) or code_oi.shape != (o, i) or not torch.equal(narrow.float(), scale_og.float()):
        rule, fix = "a grid that is kept must have finite scales that float16 holds", "load it without grid"
        raise LoadError("a quantized layer", found=f"scales of {scale_og.dtype}", rule=rule, fix=fix)
    if not bool(torch.isfinite(narrow).all()):
        rule, fix = "scales must be finite", "download the files again"
        raise LoadError("a quantized layer", found="a scale that is NaN or infinite", rule=rule, fix=fix)
    zero = None if zero_og is None else pack(zero_og, empty.bits)
    return AffineWeight(
        pack(code_oi, empty.bits), {"scale_og": narrow.contiguous()}, zero,
        shape=(o, i), block=empty.block, bits=empty.bits, identity=empty.identity,
    )  # fmt: skip
