"""GPTQ, Wanda and SparseGPT beside llm-compressor's, on layers that golden/compress_reference.py makes from a seed."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.chains.statistics import InputStatistics
from dovetail.links.prune import SparseGPT, Wanda
from dovetail.links.quantize.gptq import GPTQ
from golden.compress_reference import error, layer, unpack_mask
from places import GOLDEN

CASES: list[dict[str, Any]] = json.loads((GOLDEN / "compress.json").read_text())
MOST = 1.02


def cases(method: str) -> list[Any]:
    return [
        pytest.param(case, id="-".join(map(str, (*case["shape"], *case["arguments"].values()))))
        for case in CASES
        if case["method"] == method
    ]


made = cache(layer)


def calibrated(seed: int, o: int, i: int) -> tuple[Tensor, Tensor, InputStatistics]:
    weight, x = made(seed, o, i)
    statistics = InputStatistics(i, {"gram"}, dtype=x.dtype, device=x.device)
    for sequence in x:
        statistics.add(sequence)
    statistics.finish()
    return weight, x, statistics


def gptq_ratio(case: dict[str, Any]) -> float:
    weight, x, statistics = calibrated(case["seed"], *case["shape"])
    new = GPTQ(**case["arguments"]).quantize(weight, statistics)
    return error(weight, new.dequantize(torch.empty_like(weight)), x) / case["error"]


def pruned(method: type[Wanda] | type[SparseGPT], case: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Our zeros, theirs, and our error over theirs."""
    weight, x, statistics = calibrated(case["seed"], *case["shape"])
    keep, new = method(case["arguments"]["sparsity"], pattern=case["arguments"]["pattern"]).prune(weight, statistics)
    return ~keep, unpack_mask(case["zeros"], tuple(case["shape"])), error(weight, new * keep, x) / case["error"]


@pytest.mark.parametrize("case", cases("gptq"))
def test_gptq_is_as_near_as_theirs(case: dict[str, Any]) -> None:
    assert gptq_ratio(case) <= MOST


def test_gptq_is_as_near_on_average() -> None:
    ratios = [gptq_ratio(case) for case in CASES if case["method"] == "gptq"]
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.003


@pytest.mark.parametrize("case", cases("wanda"))
def test_wanda_makes_the_same_zeros(case: dict[str, Any]) -> None:
    """Where width times sparsity isn't whole, ours rounds it and theirs truncates: one more zero a row, the next."""
    ours, theirs, _ = pruned(Wanda, case)
    width = case["shape"][1]
    more = round(case["arguments"]["sparsity"] * width) - int(case["arguments"]["sparsity"] * width)
    assert int((ours < theirs).sum()) <= 0.001 * ours.numel()
    assert float((ours != theirs).double().mean()) <= 0.001 + more / width


@pytest.mark.parametrize("case", cases("sparsegpt"))
def test_sparsegpt_is_as_near_as_theirs(case: dict[str, Any]) -> None:
    """Theirs prunes one weight more a block."""
    ours, theirs, ratio = pruned(SparseGPT, case)
    assert ratio <= MOST
    assert float((ours == theirs).double().mean()) >= 0.999
