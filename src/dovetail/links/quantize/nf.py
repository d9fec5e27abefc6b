"""`nf4` and `fp4`: 16 fixed levels, one scale a block of weights.

Idea: weights of a network are close to normal within a block. NF4 puts its levels at quantiles of the normal
distribution, so that each is used about equally often; FP4 takes the numbers of a 4-bit float (sign, 2 bits of
exponent, 1 of fraction). Each block of weights, in row-major order, is divided by its largest absolute value:

    scale = max|w| over the block        code = argmin_c |w / scale - level_c|        value = level_code * scale

Zero is a level of both: a pruned weight stays zero. With `double=True` the scales themselves are stored in 8 bits
(QLoRA's double quantization; `dynamic8`), which saves 0.37 bits a weight at block 64. As in bitsandbytes, the codes
are then still chosen by the exact scale, while values use the stored one.

Codes and scales are, byte for byte, those of `bitsandbytes.functional.quantize_4bit` on CPU. One difference in
values: blocks with a scale below 2^-116 are exactly zero.

Source: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314), §3 and appendix E; the layout is bitsandbytes'.
Against their neighbours: nf4 errs as much as asymmetric `int(bits=4)` at group 64 (9.2% and 9.1% of a normal weight's
norm) and less than the symmetric one (10.3%); with `double=True` it is the smallest of them; but it has no integer
arithmetic and no other width. fp4 errs more (12.2%); it is kept for checkpoints that use it.
Cost: 4 + 32/block bits a weight (4.5 at 64); with double=True 4 + 8.125/block (4.13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dovetail.chains.grid import refuse_bad_weight
from dovetail.chains.link import Quantizer, Site, identity_of
from dovetail.chains.packing import packed_nbytes
from dovetail.chains.registry import register
from dovetail.chains.statistics import InputStatistics
from dovetail.links.quantize.codebook import Book, CodeBookWeight
from dovetail.links.quantize.dynamic8 import BLOCK

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


@dataclass(frozen=True)
class _CodeBookQuantizer(Quantizer):
    """What nf4 and fp4 share: everything but the levels."""

    book: ClassVar[Book]

    block: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            nearest = min(BLOCKS, key=lambda block: abs(block - self.block))
            rule = "block is a power of two from 32 to 4096"
            raise self._bad(f"block={self.block}", rule, f"block={nearest}")

    def quantize(self, weight_oi: Tensor, inputs: InputStatistics | None = None) -> CodeBookWeight:
        """Return the scales and packed codes of weight_oi (o, i), any float. DovetailError on NaN or inf."""
        weight_32 = refuse_bad_weight(self.name, weight_oi)
        return CodeBookWeight.from_weight(
            weight_32, block=self.block, double=self.double, book=self.book, identity=identity_of(self)
        )

    def empty(self, shape: tuple[int, int]) -> CodeBookWeight:
        """Zero buffers as `quantize` would fill them for a weight of this shape (o, i)."""
        return CodeBookWeight.empty(
            shape, block=self.block, double=self.double, book=self.book, identity=identity_of(self)
        )

    def stored_nbytes(self, site: Site) -> int:
        """Half a byte a weight, and a scale a block: 4 bytes, or 1 byte plus the nested constants."""
        count = site.out_features * site.in_features
        blocks = -(-count // self.block)
        scales = blocks + 4 * -(-blocks // BLOCK) + 4 if self.double else 4 * blocks
        return packed_nbytes(count, 4) + scales


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
