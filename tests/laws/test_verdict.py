"""A merge is called exact only where the merged model computes what the chain computed, in finite numbers.

Where the merged weights or the outputs are not finite, the merge is refused and the model is unchanged.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import dovetail
from dovetail.chains.layer.applied import applied
from dovetail.errors import CannotMerge
from families import batch, logits, make
from tolerance import rounding

CHAINS = [
    "lora(r=4)",
    "lora(r=4, scaling=rs)",
    "dora(r=4)",
    "ia3",
    "vera",
    "loha(r=4)",
    "lora(r=4) >> ia3",
    "magnitude(0.5) >> lora(r=4) >> remask",
    "magnitude(0.5) >> ia3 >> remask",
    "int(bits=4, group=32) >> lora(r=4) >> regrid",
    "nf4 >> dora(r=4) >> regrid(start=codes)",
    "magnitude(0.5) >> int(bits=4, group=32) >> lora(r=4) >> remask >> regrid",
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASTS = [*((dtype, dtype) for dtype in DTYPES), ("float32", "bfloat16"), ("bfloat16", "float32")]


def tuned(text: str, dtype: torch.dtype, *, cast: torch.dtype | None = None) -> nn.Module:
    """A tiny model under a chain whose adapters have been moved away from their start."""
    model = dovetail.apply(make("llama").to(dtype), text, calibration=None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in applied(model).layers.values():
            for parameter in layer.links.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model if cast is None else model.to(cast)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits, in float64."""
    with torch.no_grad():
        return logits(model, inputs).double()


@pytest.mark.parametrize(("dtype", "cast"), CASTS)
@pytest.mark.parametrize("text", CHAINS)
def test_the_report_says_what_is_measured(text: str, dtype: str, cast: str) -> None:
    model = tuned(text, DTYPES[dtype], cast=DTYPES[cast])
    inputs = batch(model)
    before, used = (
        outputs(model, inputs),
        {n: m.used_weight().double().detach() for n, m in applied(model).layers.items()},
    )
    report = dovetail.merge(model, probe=inputs)
    after = outputs(model, inputs)
    weights = max(float((model.get_submodule(n).weight.detach().double() - w).abs().max()) for n, w in used.items())
    assert report.max_abs_logit_diff == float((after - before).abs().max())
    assert report.max_abs_weight_diff == pytest.approx(weights, rel=1e-6, abs=0)
    if report.exact:
        bound = 0.0 if text.endswith(("regrid", "remask", "codes)")) else rounding(torch.float32, 128, steps=14)
        assert report.max_abs_logit_diff <= bound * float(before.abs().max())


@pytest.mark.parametrize(
    ("text", "dtype", "factor"),
    [
        *[(text, "float16", 1e7) for text in CHAINS],
        *[(text, "bfloat16", 1e38) for text in CHAINS],
        *[(text, "float32", 1e38) for text in CHAINS],
        ("ia3 >> ia3", "float32", 1e30),
    ],
)
def test_numbers_that_are_not_finite_are_never_merged(text: str, dtype: str, factor: float) -> None:
    model = tuned(text, DTYPES[dtype])
    with torch.no_grad():
        for layer in applied(model).layers.values():
            for name, parameter in layer.links.named_parameters():
                if not name.endswith("A"):
                    parameter.fill_(factor)
    copied = copy.deepcopy(model)
    inputs = batch(model)
    before = outputs(model, inputs)
    try:
        report = dovetail.merge(model, probe=inputs)
    except CannotMerge:
        assert applied(model).layers.keys() == applied(copied).layers.keys()
        assert torch.equal(outputs(model, inputs).nan_to_num(), before.nan_to_num())
    else:
        assert bool(before.isfinite().all())
        assert report.max_abs_logit_diff is not None
        assert report.max_abs_weight_diff < float("inf")
        assert bool(outputs(model, inputs).isfinite().all())


@pytest.mark.parametrize("text", CHAINS[:4])
def test_a_base_that_is_not_finite_is_never_merged(text: str) -> None:
    model = tuned(text, torch.float32)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(CannotMerge, match="NaN or infinite"):
        dovetail.merge(model)
    assert applied(model).layers


@pytest.mark.parametrize(("text", "dtype"), list(zip(CHAINS, ["float32", "bfloat16"] * 6, strict=True)))
def test_masked_logits_are_equal_where_both_are_minus_infinity(text: str, dtype: str) -> None:
    model, masked = tuned(text, DTYPES[dtype]), tuned(text, DTYPES[dtype])
    masked.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([5]), -torch.inf)
    )
    report, found = dovetail.merge(model), dovetail.merge(masked)
    assert found.exact == report.exact
    assert found.max_abs_logit_diff is not None
    assert found.max_abs_logit_diff <= report.max_abs_logit_diff
