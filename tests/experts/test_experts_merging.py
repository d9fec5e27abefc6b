"""Merged experts: what peft's functions make of the decoded vectors; what doesn't go together is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from dovetail import experts
from dovetail.errors import DataError, LoadError
from dovetail.experts.merging import METHODS, MergeSettings, merge, merge_method, weighted_sum

SHAPES = {"b.deep": (3, 1, 5, 7), "c.tall": (520, 4), "a.row": (1, 700), "d.empty": (0, 4), "e.scalar": ()}


def vector(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * (seed + 1) for name, shape in SHAPES.items()}


def some(number: int, density: float = 0.3, scale: str = "tensor") -> list[experts.Expert]:
    return [experts.compress(vector(seed), density, 1.3, scale) for seed in range(number)]  # type: ignore[arg-type]


def decoded(them: Sequence[experts.Expert]) -> dict[str, list[Tensor]]:
    dense = [expert.dense(torch.float32) for expert in them]
    return {name: [each[name] for each in dense] for name in them[0].shapes}


def check(merged: experts.TaskVector, expected: dict[str, Tensor], exact: bool = True) -> None:
    assert list(merged) == sorted(SHAPES)
    for name, tensor in expected.items():
        assert merged[name].dtype == torch.float32
        assert merged[name].shape == tensor.shape
        if exact:
            assert torch.equal(merged[name], tensor), name
        else:
            torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("number", "scale"), [(1, "vector"), (2, "tensor"), (3, "vector"), (7, "tensor")])
def test_average_and_arithmetic(number, scale):
    them = some(number, scale=scale)
    tensors = decoded(them)
    exact = number < 5  # torch adds more than four in another order
    check(merge(them), {name: torch.stack(parts).mean(0) for name, parts in tensors.items()}, exact)
    check(merge(them, "task_arithmetic"), {n: torch.stack(parts).sum(0) for n, parts in tensors.items()}, exact)
    weights = [0.5 - 0.3 * place for place in range(number)]
    given = torch.tensor(weights)
    expected = {n: merge_utils.task_arithmetic(parts, given) for n, parts in tensors.items()}
    check(merge(them, "task_arithmetic", weights=weights), expected, exact)
    if number != 4 and abs(sum(weights)) > 1e-6:
        scaled = {name: tensor / math.fsum(weights) for name, tensor in expected.items()}
        check(merge(them, "average", weights=weights), scaled, exact)


def untrimmed(parts: Sequence[Tensor], weights: Tensor, election: str) -> Tensor:
    """peft's TIES without its trimming, which at a density below 1 leaves a tensor of one value empty."""
    stacked = torch.stack(list(parts))
    sign = merge_utils.calculate_majority_sign_mask(stacked, election)
    return merge_utils.disjoint_merge(stacked * merge_utils.reshape_weight_task_tensors(stacked, weights), sign)


@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("density", [None, 1.0, 0.2, 0.0])
def test_ties(number, election, density):
    them = some(number)
    weights = [1.0, 0.4, -0.7, 0.0, 2.0, 0.3][:number]
    given, whole = torch.tensor(weights), density in (None, 1.0)
    expected = {
        name: untrimmed(parts, given, election) if whole else merge_utils.ties(parts, given, density, election)
        for name, parts in decoded(them).items()
    }
    merged = merge(them, "ties", weights=weights, density=density, election=election)
    check(merged, expected, exact=number < 5)


def test_ties_where_values_cancel():
    """A sum of exactly 0 elects plus, in float32 as the decoded tensors are: 0.1 + 0.2 - 0.3 is 0."""
    signs = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]])
    for flip in (1, -1):
        them = []
        for sign, scale in zip(signs, (0.1, 0.2, 0.3), strict=True):
            masks = experts.compress({"w": flip * sign}, 1.0).masks()
            like = experts.compress({"w": sign}, 1.0)
            them.append(experts.from_masks(replace(masks, scales={"w": scale}), like))
        parts = [expert.dense(torch.float32)["w"] for expert in them]
        for election in ("total", "frequency"):
            expected = untrimmed(parts, torch.ones(3), election)
            assert torch.equal(merge(them, "ties", election=election)["w"], expected)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.7])
def test_dare_draws_as_peft_does(method, density):
    them = some(3, 0.5)
    reference = {"dare": merge_utils.dare_linear, "dare_ties": merge_utils.dare_ties}[method]
    for seed in (0, 7):
        torch.manual_seed(seed)
        expected = {n: reference(parts, torch.tensor([1.0, 0.5, -2.0]), density) for n, parts in decoded(them).items()}
        state = torch.get_rng_state()
        check(merge(them, method, weights=[1, 0.5, -2], density=density, seed=seed), expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        merge(them, method, density=density)["c.tall"], merge(them, method, density=density, seed=1)["c.tall"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of a density of 1
        whole = {n: reference(parts, torch.ones(3), 1.0) for n, parts in decoded(them).items()}
    check(merge(them, method, density=1.0), whole)


def test_scales_of_zero_and_below():
    """Made by training scales: the signs that count are those of the decoded values."""
    them = some(3)
    masks = [expert.masks() for expert in them]
    masks[0] = replace(masks[0], scales=dict.fromkeys(masks[0].shapes, -0.5))
    masks[1] = replace(masks[1], scales=dict.fromkeys(masks[1].shapes, 0.0))
    them = [experts.from_masks(each, like) for each, like in zip(masks, them, strict=True)]
    for election in ("total", "frequency"):
        expected = {name: untrimmed(parts, torch.ones(3), election) for name, parts in decoded(them).items()}
        check(merge(them, "ties", election=election), expected)
    check(merge(them), {name: torch.stack(parts).mean(0) for name, parts in decoded(them).items()})


def test_result_says_what_it_is_of():
    origin = experts.Origin("zero", "sha256:" + "0" * 64, peft={"peft_type": "LORA", "r": 4})
    them = [replace_origin(expert, origin) for expert in some(2)]
    merged = merge(them, dtype=torch.bfloat16)
    assert merged.origin == origin
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    again = experts.compress(merged, 0.1)
    assert again.origin == origin
    assert torch.equal(merged["c.tall"], merge(them)["c.tall"].bfloat16())


def replace_origin(expert: experts.Expert, origin: experts.Origin) -> experts.Expert:
    return experts.compress(expert.dense(), 0.3, origin=origin)


def test_a_new_method_is_one_function():
    @merge_method("largest")
    def largest(parts, settings: MergeSettings) -> Tensor:
        return torch.stack([weighted_sum([part], None) for part in parts]).amax(0)

    try:
        them = some(2)
        check(merge(them, "largest"), {n: torch.stack(parts).amax(0) for n, parts in decoded(them).items()})
    finally:
        del METHODS["largest"]


def test_what_does_not_go_together_is_refused_by_name():
    one, two = some(2)
    with pytest.raises(DataError, match="none"):
        merge([])
    with pytest.raises(DataError, match=r"expert 2 of 2(.|\n)*a dict"):
        merge([one, {}])  # type: ignore[list-item]
    shorter = experts.compress({name: t for name, t in vector(1).items() if name != "c.tall"}, 0.3)
    with pytest.raises(DataError, match=r"expert 2 of 2, at c\.tall"):
        merge([one, shorter])
    turned = experts.compress({**vector(1), "c.tall": torch.ones(4, 520)}, 0.3)
    with pytest.raises(DataError, match=r"c\.tall(.|\n)*\[4, 520\](.|\n)*\[520, 4\]"):
        merge([one, turned])
    zero = experts.Origin()
    adapter = {"chain": "lora(r=4)", "seed": 1, "stage": 0, "dtype": None}
    odd = {
        "base": (zero, replace(zero, base="sha256:" + "1" * 64)),
        "initial": (zero, replace(zero, initial="base")),
        "chain 'ia3'": (replace(zero, chain="lora(r=4)"), replace(zero, chain="ia3")),
        "adapter's seed 2": (replace(zero, initial="chain", adapter=adapter),
                             replace(zero, initial="chain", adapter=adapter | {"seed": 2})),
        "adapter's chain": (zero, replace(zero, adapter=adapter)),
        "peft's lora_alpha 8": (replace(zero, peft={"lora_alpha": 16}), replace(zero, peft={"lora_alpha": 8})),
    }  # fmt: skip
    for words, (a, b) in odd.items():
        with pytest.raises(DataError, match=f"expert 2 of 2(.|\n)*{words}"):
            merge([replace_origin(one, a), replace_origin(two, b)])
    alike = {"lora_alpha": 8, "lora_dropout": 0.1, "rank_pattern": {}}, {"lora_alpha": 8, "lora_dropout": 0.0}
    merge([replace_origin(e, replace(zero, peft=p)) for e, p in zip((one, two), alike, strict=True)])
    seeds = ({**adapter, "seed": 1}, {**adapter, "seed": 2, "dtype": "float32"})
    merge([replace_origin(e, replace(zero, adapter=a)) for e, a in zip((one, two), seeds, strict=True)])


def test_settings_out_of_range_are_refused():
    them = some(2)
    for weights in ([1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [1.0, math.inf], [1.0, "2"], [True, 1.0]):
        with pytest.raises(DataError, match="weight"):
            merge(them, weights=weights)
    for method, keywords in {
        "average": {"weights": [1, -1]},
        "task_arithmetic": {"weights": [1e300, 1]},
        "ties": {"density": 1.5},
        "dare": {"density": None},
        "dare_ties": {"density": 0},
        "slerp": {},
    }.items():
        with pytest.raises(DataError, match=r"merge|experts at"):
            merge(them, method, **keywords)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="election"):
        merge(them, "ties", election="coin")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="density"):
        merge(them, "ties", density=math.nan)
    huge = [experts.compress({"w": torch.tensor([1e60, -1e60], dtype=torch.float64)}, 1.0)] * 2
    with pytest.raises(DataError, match="float32"):
        merge(huge)


def test_changed_bytes_are_refused():
    them = some(2)
    coded = them[0].coded["c.tall"]
    coded.blocks[5] ^= 1
    with pytest.raises(LoadError, match=r"c\.tall"):
        merge(them)
