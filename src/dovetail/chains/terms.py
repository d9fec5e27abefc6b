"""The planner's algebra: what a link does to a weight, in terms that compose without touching the weight.

Scales and low ranks are closed under composition:

    out-scale l:   (s, t, BA) -> (l·s, t, diag(l)B A)
    in-scale l:    (s, t, BA) -> (s, t·l, B A diag(l))
    low rank ba:   (s, t, BA) -> (s, t, [B b][A; a])

so any chain of them is one `Form`  W' = diag(s) W diag(t) + B A, whatever its length. Factors are small and stay
ordinary autograd tensors; the planner computes only the products with the weight.
Shapes: o i r = out, in, rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_CHUNK = 1 << 17
"""Weights that `without` works on at a time, so that they stay in a core's cache."""


@dataclass(frozen=True)
class OutScale:
    """W' = diag(scale) W; the bias too when `scales_bias`. scale_o: (o,)."""

    scale_o: Tensor
    scales_bias: bool


@dataclass(frozen=True)
class InScale:
    """W' = W diag(scale). scale_i: (i,)."""

    scale_i: Tensor


@dataclass(frozen=True)
class LowRank:
    """W' = W + B A, the method's scale folded into B. a_ri: (r, i); b_or: (o, r); dropout on the input of A."""

    a_ri: Tensor
    b_or: Tensor
    dropout: float = 0.0


@dataclass(frozen=True)
class Hadamard:
    """W' = W + (B1 A1) ⊙ (B2 A2): LoHa. As a low rank of r² by Khatri-Rao products where that is cheap."""

    b1_or: Tensor
    a1_ri: Tensor
    b2_or: Tensor
    a2_ri: Tensor

    def low_rank(self) -> LowRank:
        """Return (B1 A1) ⊙ (B2 A2) = (B1 ⊛ B2)(A1 ⊛ A2): rows of A and columns of B multiplied pairwise; rank r²."""
        b = (self.b1_or[:, :, None] * self.b2_or[:, None, :]).flatten(1)
        a = (self.a1_ri[:, None, :] * self.a2_ri[None, :, :]).flatten(0, 1)
        return LowRank(a, b)


@dataclass(frozen=True)
class RowNorm:
    """W' = diag(m / ‖W‖_row) W, the norm without gradient: DoRA. magnitude_o: (o,)."""

    magnitude_o: Tensor


Term = OutScale | InScale | LowRank | Hadamard | RowNorm


@dataclass
class Form:
    """W' = diag(out) W diag(in) + B A, and b'. None means a scale of ones, or no low rank.

    out_scale_o (o,), in_scale_i (i,), a_ri (r, i), b_or (o, r), bias_o (o,): in the adapters' dtype
    dropped      low-rank pairs whose input has its own dropout: [(probability, a_ri, b_or)]
    """

    bias_o: Tensor | None = None
    out_scale_o: Tensor | None = None
    in_scale_i: Tensor | None = None
    a_ri: Tensor | None = None
    b_or: Tensor | None = None
    dropped: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)

    def scale_out(self, scale_o: Tensor, scales_bias: bool) -> None:
        self.out_scale_o = scale_o if self.out_scale_o is None else self.out_scale_o * scale_o
        if self.b_or is not None:
            self.b_or = self.b_or * scale_o[:, None]
        self.dropped = [(p, a, b * scale_o[:, None]) for p, a, b in self.dropped]
        if scales_bias and self.bias_o is not None:
            self.bias_o = self.bias_o * scale_o

    def scale_in(self, scale_i: Tensor) -> None:
        self.in_scale_i = scale_i if self.in_scale_i is None else self.in_scale_i * scale_i
        if self.a_ri is not None:
            self.a_ri = self.a_ri * scale_i
        self.dropped = [(p, a * scale_i, b) for p, a, b in self.dropped]

    def add(self, term: LowRank, training: bool) -> None:
        if term.dropout > 0 and training:
            self.dropped = [*self.dropped, (term.dropout, term.a_ri, term.b_or)]
        elif self.a_ri is None or self.b_or is None:
            self.a_ri, self.b_or = term.a_ri, term.b_or
        else:
            self.a_ri, self.b_or = torch.cat([self.a_ri, term.a_ri]), torch.cat([self.b_or, term.b_or], dim=1)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return all low-rank factors as one pair (a_ri, b_or), without dropout; None when there are none."""
        pairs = [(a, b) for _, a, b in self.dropped]
        if self.a_ri is not None and self.b_or is not None:
            pairs.append((self.a_ri, self.b_or))
        if not pairs:
            return None
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


def without(weight_oi: Tensor, taken: LowRank | None) -> Tensor:
    """Return W - B A in W's dtype, the same bits on every processor; W itself where nothing is taken.

    A matrix product sums in an order that depends on the processor and its threads, so that the codes of a base made
    from its result could differ. Here the ranks are subtracted one after the other, each operation rounded by itself.
    """
    if taken is None:
        return weight_oi
    a_ri, b_or = taken.a_ri.to(weight_oi), taken.b_or.to(weight_oi)
    rest_oi = weight_oi.clone()
    step = max(1, _CHUNK // max(1, weight_oi.shape[1]))
    for start in range(0, len(rest_oi), step):
        rows = slice(start, start + step)
        for rank in range(len(a_ri)):
            rest_oi[rows] -= b_or[rows, rank, None] * a_ri[rank]
    return rest_oi


def nonzero(norm_o: Tensor) -> Tensor:
    """Return the norms with 1 for 0, so that a row of zeros stays zero instead of becoming NaN."""
    return torch.where(norm_o == 0, torch.ones_like(norm_o), norm_o)
