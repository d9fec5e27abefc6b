"""`nf`, `nf4` and `fp4`: a few fixed levels, and one scale per block of weights.

Idea: the weights of a block are close to normally distributed. NF4's levels are quantiles of the normal distribution,
so each is used about equally often. FP4's levels are the numbers of a 4-bit float (sign, 2 bits of exponent, 1 of
fraction). Each block of weights, in row-major order, is divided by its largest absolute value:

    scale = max|w| over the block        code = argmin_c |w / scale - level_c|        value = level_code * scale

Zero is a level of both: a pruned weight stays zero. With `double=True` the scales are stored in 8 bits (QLoRA's double
quantization; `dynamic8`), which saves 0.37 bits per weight at block 64. As in bitsandbytes, the exact scale still
selects the codes, while values use the stored one.

`nf(bits=2|3|4|8)` has 2^bits quantiles; `nf4` is the one of 4 bits. Above zero, 2^(bits-1) of them divide the
probabilities from 1/2 to 0.9677 evenly, below zero 2^(bits-1) - 1; all are divided by the largest.
The levels are those of LoftQ, and at 4 bits bitsandbytes'.

Codes and scales equal those of `bitsandbytes.functional.quantize_4bit` on CPU, byte for byte. Values differ in one
case: blocks with a scale below 2^-116 are exactly zero.

Source: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314), §3 and appendix E; the layout is that of bitsandbytes.
Trade-off: nf4 has the error of asymmetric `int(bits=4)` at group 64 (9.2% and 9.1% of a normal weight's norm), and less
than the symmetric one (10.3%). With `double=True` it is the smallest of them, but it has no integer arithmetic. At 2
and 3 bits nf (56.3% and 20.2%) is behind `int` (45.7% and 19.5%). The error of fp4 is larger (12.2%); it exists for
checkpoints that use it.
Size: bits + 32/block bits per weight (4.5 at 4 bits, block 64); with double=True b0 + b1/B0 + b2/(B0 B1), with
b0 = bits, b1 = 8, b2 = 32, B0 = block, B1 = 256 (QR-Adaptor eq. 9; 4.127), and 32 bits per matrix for their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dovetail.chains.grid import refuse_bad_weight
from dovetail.chains.link import Quantizer, always_print, identity_of
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics
from dovetail.links.quantize.codebook import Book, CodeBookWeight

NF4 = Book(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4 = Book("fp4", tuple(v / 12 for v in _FP4_TWELFTHS) + tuple(-v / 12 if v else 0.0 for v in _FP4_TWELFTHS))

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCK_RULE = "block must be a power of two from 32 to 4096"
OFFSET = 0.9677083
"""The largest probability whose quantile is a level, 1 - (1/32 + 1/30) / 2 as bitsandbytes and LoftQ round it."""


def _nearest_block(block: int) -> int:
    return min(BLOCKS, key=lambda allowed: abs(allowed - block))


@dataclass(frozen=True)
class _CodeBookQuantizer(Quantizer):
    """The part that nf4 and fp4 share: everything except the levels."""

    book: ClassVar[Book]

    block: int = 64
    double: bool = False

    @property
    def movable(self) -> frozenset[Literal["scales", "zeros"]]:
        return frozenset(() if self.double else {"scales"})

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise self._bad(f"block={self.block}", BLOCK_RULE, f"set block={_nearest_block(self.block)}")

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> CodeBookWeight:
        """Return the scales and packed codes of weight_oi (o, i), any float. DovetailError on NaN or inf."""
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        return CodeBookWeight.from_weight(
            weight_32, block=self.block, double=self.double, book=self.book, identity=identity_of(self)
        )

    def empty(self, shape: tuple[int, int]) -> CodeBookWeight:
        form = "double" if self.double else "float32"
        return CodeBookWeight.empty(shape, block=self.block, scale=form, book=self.book, identity=identity_of(self))


@cache
def normal_float(bits: int) -> Book:
    """Return the levels of NormalFloat of 2, 3, 4 or 8 bits."""
    if bits == 4:
        return NF4
    half = 2 ** (bits - 1)
    above = [_quantile(1 - at / half) for at in range(half)]
    below = [-_quantile(1 - at / (half - 1)) for at in range(half - 1)]
    levels = torch.tensor(sorted([*below, 0.0, *above]), dtype=torch.float32, device="cpu") / max(above)
    return Book(f"nf{bits}", tuple(levels.tolist()))


def _quantile(part: float) -> float:
    """Return the quantile of the normal distribution at a part of the way from 1/2 to 0.9677."""
    return NormalDist().inv_cdf(0.5 + part * (OFFSET - 0.5))


@register("nf")
@dataclass(frozen=True)
class NormalFloat(Quantizer):
    """NormalFloat of 2, 3, 4 or 8 bits."""

    summary: ClassVar[str] = "NormalFloat of 2, 3, 4 or 8 bits: quantiles of the normal distribution"
    source: ClassVar[str] = "QLoRA (arXiv:2305.14314) §3; LoftQ (arXiv:2310.08659)"

    bits: int = always_print(4)
    block: int = 64
    double: bool = False

    @property
    def movable(self) -> frozenset[Literal["scales", "zeros"]]:
        return frozenset(() if self.double else {"scales"})

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise self._bad(f"bits={self.bits}", "bits must be 2, 3, 4 or 8", "set bits=4")
        if self.block not in BLOCKS:
            raise self._bad(f"block={self.block}", BLOCK_RULE, f"set block={_nearest_block(self.block)}")

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> CodeBookWeight:
        """Return the scales and packed codes of weight_oi (o, i), any float. DovetailError on NaN or inf."""
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        book, identity = normal_float(self.bits), identity_of(self)
        return CodeBookWeight.from_weight(weight_32, block=self.block, double=self.double, book=book, identity=identity)

    def empty(self, shape: tuple[int, int]) -> CodeBookWeight:
        form = "double" if self.double else "float32"
        book, identity = normal_float(self.bits), identity_of(self)
        return CodeBookWeight.empty(shape, block=self.block, scale=form, book=book, identity=identity)


@register("nf4")
@dataclass(frozen=True)
class NormalFloat4(_CodeBookQuantizer):
    """QLoRA's 4-bit NormalFloat."""

    summary: ClassVar[str] = "4-bit NormalFloat: quantiles of the normal distribution, one scale per block"
    source: ClassVar[str] = "QLoRA (arXiv:2305.14314) §3"
    book: ClassVar[Book] = NF4


@register("fp4")
@dataclass(frozen=True)
class Float4(_CodeBookQuantizer):
    """A 4-bit float."""

    summary: ClassVar[str] = "4-bit float (sign, 2 exponent bits, 1 fraction bit), one scale per block"
    source: ClassVar[str] = "QLoRA (arXiv:2305.14314) §4; bitsandbytes"
    book: ClassVar[Book] = FP4
