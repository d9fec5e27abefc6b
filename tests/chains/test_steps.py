"""A step of generation straight from codes: what the open path computes, to the digits that a sum in float32 keeps."""

import pytest
import torch
from torch import nn

import dovetail
from dovetail.chains.layer.linear import chain_layers

IN, OUT = 512, 264
CODES = [
    "int(bits=4, group=64)",
    "int(bits=8, group=32)",
    "int(bits=2, group=32)",
    "int(bits=4, group=0)",
    "int(bits=4, group=128, symmetric=signed, scale_bits=4)",
    "hqq(bits=4)",
]
"""Chains whose layers multiply from codes."""
CHAINS = [
    *CODES,
    "wanda(0.5) >> int(bits=4, group=64)",
    "int(bits=4, group=64) >> ia3 >> lora(r=4) >> ia3",
    "int(bits=8) >> dora(r=2)",
    "int(bits=3, group=64)",
    "nf4",
    "int(bits=4, group=64) >> lora(r=2) >> regrid",
    "lora(r=2)",
]


class _Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _model(chain: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = _Block().to(dtype)
    dovetail.apply(model, chain, calibration=[{"x": torch.randn(8, IN, dtype=dtype)}])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def _definition(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    return chain_layers(model)["layer"].effective_weight()


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equal_to_the_definition(chain: str, dtype: torch.dtype) -> None:
    model = _model(chain, dtype)
    weight_oi, bias_o = _definition(model)
    x = torch.randn(3, 1, IN, dtype=dtype)
    with torch.no_grad():
        found = model(x)
    wanted = x.double() @ weight_oi.double().t() + (0 if bias_o is None else bias_o.double())
    eps = torch.finfo(dtype).eps
    summed = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # The definition and, on the open path, the thin products are rounded to the dtype; sums have IN terms.
    slack = (8 * eps + IN**0.5 * summed) * wanted.abs().max()
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= float(slack)


@pytest.mark.parametrize("chain", CODES)
def test_longer_inputs_and_training_are_the_open_path_bit_for_bit(chain: str) -> None:
    model = _model(chain)
    weight_oi, bias_o = _definition(model)
    for shape in [(1, 5, IN), (3, 2, IN), (1, IN), (4, IN), (5, 1, IN)]:
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(model(x), nn.functional.linear(x, weight_oi, bias_o))
    x = torch.randn(2, 1, IN, requires_grad=True)
    assert torch.equal(model(x), nn.functional.linear(x, weight_oi, bias_o))


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_a_batch_are_those_alone(threads: int) -> None:
    model = _model("int(bits=4, group=64)")
    x = torch.randn(4, 1, IN)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            assert torch.equal(model(x), torch.cat([model(row[None]) for row in x]))
    finally:
        torch.set_num_threads(before)


def test_not_a_number_is_not_hidden() -> None:
    model = _model("int(bits=4, group=64)")
    x = torch.randn(1, 1, IN)
    x[..., 7] = torch.nan
    with torch.no_grad():
        assert bool(model(x).isnan().all())
