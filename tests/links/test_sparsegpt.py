"""SparseGPT beside the textbook's loop in float64: Frantar and Alistarh 2023, algorithm 1, with an inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibrated import error, gram_of, sample
from dovetail.errors import DovetailError
from dovetail.links.prune import SparseGPT, Wanda

BLOCK = 128


def reference(weight: Tensor, x: Tensor, pruner: SparseGPT) -> tuple[Tensor, Tensor]:
    """Mask and weights; of each block goes what the whole needs up to its end, less what went before."""
    o, i = weight.shape
    n, m = map(int, pruner.pattern.split(":")) if pruner.pattern else (0, 1)
    hessian = x.double().t() @ x.double()
    hessian += pruner.damping * hessian.diagonal().mean() * torch.eye(i, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    square, new, keep = upper.diagonal().square(), weight.double(), torch.ones(o, i, dtype=torch.bool)
    block = BLOCK // m * m
    for j in range(i):
        if not n and j % block == 0:
            stop = min(j + block, i)
            go = round(pruner.sparsity * stop * o) - round(pruner.sparsity * j * o)
            lowest = (new[:, j:stop] ** 2 / square[j:stop]).flatten().argsort()[:go]
            keep[:, j:stop] = torch.ones(o * (stop - j), dtype=torch.bool).index_fill(0, lowest, False).view(o, -1)
        if n and j % m == 0:
            lowest = (new[:, j : j + m] ** 2 / square[j : j + m]).argsort(1)[:, : m - n]
            keep[:, j : j + m] = keep[:, j : j + m].scatter(1, lowest, False)
        value = new[:, j] * keep[:, j]
        miss = (new[:, j] - value) / upper[j, j]
        new[:, j:] -= miss[:, None] * upper[j, j:]
        new[:, j] = value
    return keep, new


@pytest.mark.parametrize(
    ("shape", "sparsity", "pattern"),
    [
        ((48, 64), 0.5, None),
        ((24, 384), 0.7, None),
        ((20, 300), 0.5, None),
        ((21, 150), 1 / 3, None),
        ((24, 256), 0.5, "2:4"),
        ((24, 256), 0.5, "4:8"),
        ((24, 300), 2 / 3, "1:3"),
        ((16, 192), 0.5, "24:48"),
    ],
)
def test_equals_the_textbook(shape: tuple[int, int], sparsity: float, pattern: str | None) -> None:
    weight, x = sample(*shape)
    pruner = SparseGPT(sparsity, pattern=pattern)
    wanted_keep, wanted = reference(weight, x, pruner)
    keep, new = pruner.prune(weight, gram_of(x))
    assert torch.equal(keep, wanted_keep)
    assert int((~keep).sum()) == round(pruner.sparsity * weight.numel())
    assert torch.equal(new != 0, keep)
    torch.testing.assert_close(new, wanted.float(), rtol=1e-5, atol=1e-6)
    narrow_keep, narrow = pruner.prune(weight, gram_of(x, torch.float32))
    assert error(weight, narrow * narrow_keep, x) == pytest.approx(error(weight, wanted, x), rel=0.01)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_is_nearer_than_wanda(sparsity: float) -> None:
    weight, x = sample(64, 128)
    keep, new = SparseGPT(sparsity).prune(weight, gram_of(x))
    wanda, _ = Wanda(sparsity).prune(weight, gram_of(x))
    assert error(weight, new * keep, x) < error(weight, weight * wanda, x)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_what_was_pruned_stays_pruned(pattern: str | None) -> None:
    weight, x = sample(24, 128)
    weight[:, ::4] = 0
    keep, new = SparseGPT(0.5, pattern=pattern).prune(weight, gram_of(x))
    assert not bool(keep[:, ::4].any())
    assert int((~keep).sum()) == round(0.5 * weight.numel())
    assert bool((new[~keep] == 0).all())


def test_inputs_never_seen_go_first_and_cost_nothing() -> None:
    weight, x = sample(16, 64)
    x[:, 3:20:5] = 0
    keep, _ = SparseGPT(0.5).prune(weight, gram_of(x))
    assert not bool(keep[:, 3:20:5].any())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_tokens_than_inputs(damping: float) -> None:
    weight, x = sample(16, 64, tokens=20)
    keep, new = SparseGPT(0.5, damping=damping).prune(weight, gram_of(x))
    assert bool(torch.isfinite(new).all())
    assert int((~keep).sum()) == weight.numel() // 2


def test_no_damping_is_the_textbook_too() -> None:
    weight, x = sample(16, 64)
    pruner = SparseGPT(0.5, damping=0.0)
    keep, new = pruner.prune(weight, gram_of(x))
    wanted_keep, wanted = reference(weight, x, pruner)
    assert torch.equal(keep, wanted_keep)
    torch.testing.assert_close(new, wanted.float(), rtol=1e-5, atol=1e-5)


def test_a_matrix_that_no_damping_mends_is_refused() -> None:
    weight, x = sample(16, 64)
    statistics = gram_of(x)
    assert statistics.gram_ii is not None
    statistics.gram_ii.neg_()
    with pytest.raises(DovetailError, match="singular") as caught:
        SparseGPT(0.5).prune(weight, statistics)
    assert "wanda" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype(dtype: torch.dtype) -> None:
    weight, x = sample(16, 64)
    weight = weight.to(dtype)
    keep, new = SparseGPT(0.5).prune(weight, gram_of(x))
    wide_keep, wide = SparseGPT(0.5).prune(weight.double(), gram_of(x))
    assert torch.equal(keep, wide_keep)
    assert new.dtype == dtype
    assert torch.equal(new, wide.to(dtype))
