"""What every chain does on one layer: identity at init, gradients, the fast path against the definition, closing.

Sizes are tiny; over dtypes, over bases (dense, pruned, each quantizer) and over layers (Linear, GPT-2's Conv1D,
convolutions).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dovetail
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Constraint
from samples import (
    ADAPTERS,
    BASES,
    FEW_BASES,
    GRID_CONSTRAINTS,
    IN,
    LAYERS,
    MIXTURES,
    OTHER_LAYERS,
    PRUNABLE,
    PRUNERS,
    QUANTIZERS,
    WEIGHT_ADAPTERS,
    One,
    by_definition,
    chained,
    closed_chains,
    input_of,
    joined,
    model_of,
)
from tolerance import difference, rounding

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
each_layer = pytest.mark.parametrize("layer", LAYERS)
CLOSED = list(closed_chains())
TURNS = [*ADAPTERS, *MIXTURES]


def turn(adapter: str, layer: str) -> int:
    """A number that differs between the layers of an adapter and between the adapters of a layer, to take turns by."""
    return TURNS.index(adapter) + list(LAYERS).index(layer)


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of x and of every trained parameter, for a loss that weighs every output differently."""
    names = ["x", *(name for name, p in model.named_parameters() if p.requires_grad)]
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return dict(zip(names, torch.autograd.grad((y * weight).sum(), parameters), strict=True))


# ---- identity


def base_of(base: str, layer: str, dtype: torch.dtype) -> nn.Module:
    return chained(base, layer, dtype) if base else model_of(layer, dtype)


@each_layer
@pytest.mark.parametrize("adapter", ADAPTERS + MIXTURES)
def test_before_training_an_open_chain_computes_what_its_base_does(adapter: str, layer: str) -> None:
    """To rounding: scales put the bias after the product, and DoRA divides a norm by itself."""
    at = turn(adapter, layer) % 3
    dtype, base = DTYPES[at], ["", "wanda(0.5)", "nf4(block=32)"][at]
    x = input_of(layer, dtype)
    before, after = base_of(base, layer, dtype)(x), chained(joined(base, adapter), layer, dtype, moved=False)(x)
    assert difference(after, before) <= rounding(dtype, IN, steps=2), base


@pytest.mark.parametrize("base", BASES)
def test_before_training_low_ranks_change_no_bit(base: str) -> None:
    for dtype in DTYPES:
        x = input_of(dtype=dtype)
        for adapter in ["lora(r=3)", "vera(r=16)", "loha(r=2, alpha=3)", "loha(r=5)"]:
            after = chained(joined(base, adapter), dtype=dtype, moved=False)(x)
            assert torch.equal(after, base_of(base, "linear", dtype)(x)), (adapter, dtype)


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [*(("linear", dtype) for dtype in DTYPES), *((layer, DTYPES[at % 3]) for at, layer in enumerate(OTHER_LAYERS))],
)
def test_before_training_a_closed_chain_is_its_base_bit_for_bit(layer: str, dtype: torch.dtype) -> None:
    """Bit for bit, also where regrid starts from the full-precision weights: rounding them gives the base's codes.

    But for double quantization from the weights: its codes were chosen by the scales before these were rounded.
    """
    x = input_of(layer, dtype)
    closings = [
        ("wanda(0.5)", "remask"),
        *((quantizer, constraint) for quantizer in QUANTIZERS for constraint in GRID_CONSTRAINTS),
        *((f"wanda(0.5) >> {quantizer}", "remask >> regrid(start=codes)") for quantizer in PRUNABLE),
    ]
    for base, constraint in closings:
        before, model = (
            chained(base, layer, dtype),
            chained(f"{base} >> lora(r=3) >> {constraint}", layer, dtype, moved=False),
        )
        if "double=true" in base and constraint == "regrid":
            start, weight = model_of(layer, dtype).layer.weight, model.layer.frozen_weight()[0]
            quantized = before.layer.base.native(dtype)
            assert bool(((weight - start).abs() <= (quantized - start).abs() * (1 + rounding(dtype, IN))).all()), base
        else:
            assert torch.equal(model(x), before(x)), (base, constraint)


@pytest.mark.parametrize("text", ["dora(r=3)", "lora(r=3) >> dora(r=3) >> ia3"])
def test_before_training_dora_starts_at_the_weights_that_regrid_starts_from(text: str) -> None:
    quantizer = "int(bits=2, group=16, symmetric=true)"
    for constraint in GRID_CONSTRAINTS:
        model = chained(f"{quantizer} >> {text} >> {constraint}", dtype=torch.float64, moved=False)
        assert (
            difference(
                model(input_of(dtype=torch.float64)),
                chained(quantizer, dtype=torch.float64)(input_of(dtype=torch.float64)),
            )
            <= 1e-10
        )


# ---- gradients


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("adapter", ADAPTERS + MIXTURES)
def test_gradients_reach_the_declared_parameters_and_nothing_else(adapter: str, layer: str) -> None:
    for base in FEW_BASES[turn(adapter, layer) % 2 :: 2]:
        model = chained(joined(base, adapter), layer)
        chain_layer = model.layer
        declared = {
            f"layer.links.{place}.{name}": shape
            for place, state in enumerate(chain_layer.states)
            for name, shape in state.link.parameter_shapes(chain_layer.site).items()
        }
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert {name: tuple(p.shape) for name, p in trained.items()} == declared
        frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in trained}
        model(input_of(layer)).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in trained:
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())


# ---- the fast path is the definition

UNUSUAL = [
    "lora(r=3) >> bottleneck(r=5)",
    "wanda(0.5) >> lora(r=3) >> remask >> bottleneck(r=5) >> bottleneck(r=2)",
    "wanda(0.5) >> nf4(block=32) >> lora(r=3) >> remask",
    "nf4(block=32) >> lora(r=3) >> regrid >> ia3 >> regrid(start=codes)",
    "wanda(0.5) >> remask >> lora(r=3)",
    "nf4(block=32) >> regrid",
]
OPEN = [
    *(joined(base, adapter) for adapter in ADAPTERS + MIXTURES for base in FEW_BASES),
    *(joined(base, a) for a in ("lora(r=3)", "dora(r=3, alpha=6)", "loha(r=5)") for base in BASES),
]


def compare_with_definition(text: str, layer: str, dtype: torch.dtype, tolerance: float) -> None:
    model, x = chained(text, layer, dtype), input_of(layer, dtype).requires_grad_()
    fast = model(x)
    slow = by_definition(model.layer, x)
    assert difference(fast, slow) <= tolerance
    fast_gradients, slow_gradients = gradients(model, fast, x), gradients(model, slow, x)
    for name, wanted in slow_gradients.items():
        assert difference(fast_gradients[name], wanted) <= tolerance, name


@pytest.mark.parametrize("text", list(dict.fromkeys(OPEN + CLOSED + UNUSUAL)))
def test_fast_path_is_the_definition(text: str) -> None:
    """Outputs and all gradients, float64, to 1e-10."""
    compare_with_definition(text, "linear", torch.float64, 1e-10)


@pytest.mark.parametrize("layer", OTHER_LAYERS)
@pytest.mark.parametrize(
    "text",
    [*ADAPTERS, *(f"wanda(0.5) >> nf4(block=32) >> {a}" for a in ADAPTERS), *MIXTURES, *CLOSED[::4], *UNUSUAL],
)
def test_fast_path_is_the_definition_on_other_layers(text: str, layer: str) -> None:
    compare_with_definition(text, layer, torch.float64, 1e-10)


@pytest.mark.parametrize("text", [joined(base, a) for a in ADAPTERS + MIXTURES for base in FEW_BASES] + CLOSED)
def test_fast_path_is_near_the_definition_in_bfloat16(text: str) -> None:
    """Three roundings to 8 bits, of each factor and of each output."""
    for layer in ["linear", "conv2d-groups"]:
        compare_with_definition(text, layer, torch.bfloat16, rounding(torch.bfloat16, IN, steps=3))


# ---- merge


@each_layer
@pytest.mark.parametrize("text", [*WEIGHT_ADAPTERS, *MIXTURES, "magnitude(0.5) >> ia3"])
def test_an_open_chain_merges_to_rounding_into_the_stock_layer(text: str, layer: str) -> None:
    dtype = DTYPES[turn(text.removeprefix("magnitude(0.5) >> "), layer) % 3]
    model, x = chained(text, layer, dtype), input_of(layer, dtype)
    before, weight = model(x), model.layer.effective_weight()[0]
    report = dovetail.merge(model, probe={"x": x})
    assert difference(model(x), before) <= rounding(dtype, IN, steps=3)
    # Exact but for rounding to a dtype that is narrower than the one that adapters are kept in.
    assert report.exact == (report.max_abs_weight_diff == 0)
    assert report.exact or dtype == torch.bfloat16
    assert report.max_abs_weight_diff <= 2**-8 * weight.abs().max()
    assert_stock(model.layer, layer, dtype)


@pytest.mark.parametrize("text", CLOSED)
def test_a_closed_chain_merges_bit_for_bit(text: str) -> None:
    for dtype in DTYPES:
        merge_bit_for_bit(text, "linear", dtype)


@pytest.mark.parametrize("layer", OTHER_LAYERS)
def test_a_closed_chain_merges_bit_for_bit_on_other_layers(layer: str) -> None:
    for place, text in list(enumerate(CLOSED))[OTHER_LAYERS.index(layer) % 2 :: 2]:
        merge_bit_for_bit(text, layer, DTYPES[place % 3])


@pytest.mark.parametrize(
    "text", ["magnitude(0.5) >> lora(r=3) >> remask", "int(bits=4, group=8) >> lora(r=3) >> regrid"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_closed_chain_merges_bit_for_bit_on_transposed_inputs(text: str, dtype: torch.dtype) -> None:
    """FSMT and fairseq's other models call their layers with (tokens, batch, features), transposed."""
    model = chained(text, "linear", dtype)
    x = torch.randn(3, 12, IN, generator=torch.Generator().manual_seed(3)).to(dtype).transpose(0, 1)
    with torch.no_grad():
        before = model(x)
        dovetail.merge(model)
        assert torch.equal(model(x), before)


def merge_bit_for_bit(text: str, layer: str, dtype: torch.dtype) -> None:
    model, x = chained(text, layer, dtype), input_of(layer, dtype)
    before, base = model(x), model.layer.base
    mask = None if base.mask_bits is None else base.mask_rows(slice(None))
    base_sparsity = float((base.matrix() == 0).double().mean())
    chain_sparsity = float((model.layer.effective_weight()[0] == 0).double().mean())
    report = dovetail.merge(model, probe={"x": x})
    assert torch.equal(model(x), before)
    assert report.exact
    assert (report.max_abs_weight_diff, report.max_abs_logit_diff, report.relative_weight_error) == (0, 0, 0)
    assert report.off_grid == 0
    matrix = model.layer.weight.t() if layer == "gpt2-conv1d" else model.layer.weight.flatten(1)
    assert_closed(matrix, mask, base.quantized)
    assert report.sparsity_before == pytest.approx(chain_sparsity)
    assert report.sparsity_after == report.sparsity_before
    assert report.sparsity_after == pytest.approx(float((matrix == 0).double().mean()))
    if mask is not None:
        assert report.sparsity_after >= float((~mask).double().mean())
        if base.quantized is None:
            assert report.sparsity_after == pytest.approx(base_sparsity)
    assert_stock(model.layer, layer, dtype)


def assert_stock(merged: nn.Module, layer: str, dtype: torch.dtype) -> None:
    """As a fresh layer of that kind: type, settings, bias, the weight's layout."""
    stock = model_of(layer, dtype).layer
    assert type(merged) is type(stock)
    assert repr(merged) == repr(stock)
    assert {n: (p.shape, p.stride(), p.dtype) for n, p in merged.state_dict().items()} == {
        n: (p.shape, p.stride(), p.dtype) for n, p in stock.state_dict().items()
    }
    assert all(type(p) is nn.Parameter for p in merged.parameters())


# ---- training


TRAINED = [
    *((text, torch.optim.AdamW, torch.float32) for text in CLOSED),
    *((text, torch.optim.AdamW, torch.bfloat16) for text in CLOSED[::2]),
    *((text, torch.optim.SGD, torch.float32) for text in CLOSED[1::4]),
]


@pytest.mark.parametrize(("text", "optimizer", "dtype"), TRAINED)
def test_zeros_and_grid_survive_training_and_merge(text: str, optimizer: type, dtype: torch.dtype) -> None:
    model, x = chained(text, dtype=dtype, moved=False), input_of(dtype=dtype)
    layer: ChainLinear = model.layer
    mask = None if layer.base.mask_bits is None else layer.base.mask_rows(slice(None))
    grid, start = layer.base.quantized, layer.effective_weight()[0].detach().clone()
    stepper = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        stepper.zero_grad()
        (model(x) - 1).square().mean().backward()
        stepper.step()
        assert_closed(layer.frozen_weight()[0], mask, grid)
    if optimizer is torch.optim.AdamW:
        assert not torch.equal(layer.frozen_weight()[0], start), "training moved nothing"
    sparsity = float((layer.frozen_weight()[0] == 0).float().mean())
    before = model(x)
    report = dovetail.merge(model)
    assert torch.equal(model(x), before)
    assert report.off_grid == 0
    assert report.sparsity_after == pytest.approx(sparsity)
    assert_closed(model.layer.weight, mask, grid)


def assert_closed(weight: Tensor, mask: Tensor | None, grid) -> None:
    if mask is not None:
        assert bool((weight[~mask] == 0).all())
    if grid is not None:
        assert grid.off_grid(weight) == 0


@pytest.mark.parametrize("pruner", [*PRUNERS, "magnitude(0.5) >> wanda(0.2)", "wanda(0.3) >> magnitude(0.6)"])
def test_sparsity_is_the_same_before_and_after(pruner: str) -> None:
    report = dovetail.merge(chained(f"{pruner} >> lora(r=3) >> ia3 >> remask"))
    assert report.sparsity_before == report.sparsity_after
    assert report.sparsity_after > 0.25


# ---- save and load


SAVED = [*(joined(base, a) for a in ADAPTERS for base in FEW_BASES), *QUANTIZERS, *CLOSED]


@pytest.mark.parametrize(("text", "dtype"), [(text, DTYPES[1 + (at + at // 4) % 2]) for at, text in enumerate(SAVED)])
def test_state_dict_loads_into_a_fresh_model_bit_for_bit(text: str, dtype: torch.dtype) -> None:
    model, x = chained(text, dtype=dtype), input_of(dtype=dtype)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh = chained(text, dtype=dtype, moved=False)
    fresh.load_state_dict(saved, strict=True)
    assert torch.equal(fresh(x), model(x))
    assert fresh.state_dict().keys() == saved.keys()
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(
    "text",
    ["dora(r=3)", "ia3(side=in) >> dora(r=2)", "wanda(0.5) >> lora(r=3) >> remask", "nf4(block=32) >> dora(r=3)"],
)
def test_state_dict_replaces_other_weights_and_what_was_cached_of_them(text: str) -> None:
    model, x = chained(text), input_of()
    other = model_of(seed=9)
    dovetail.apply(other, text, targets="layer", calibration=[{"x": x}])
    other(x)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))


# ---- dropout, recomputation

DROPOUT = [
    "lora(r=3, dropout=0.5)",
    "vera(r=16, dropout=0.5)",
    "ia3 >> lora(r=3, dropout=0.5) >> ia3(side=in) >> lora(r=2)",
    "lora(r=3, dropout=0.5) >> dora(r=3)",
    "loha(r=5) >> lora(r=3, dropout=0.5)",
    "nf4(block=32) >> lora(r=3, dropout=0.3)",
]


@pytest.mark.parametrize("text", DROPOUT)
def test_dropout_is_active_in_training_only(text: str) -> None:
    model, x = chained(text, dtype=torch.float64), input_of(dtype=torch.float64)
    assert difference(model(x), by_definition(model.layer, x)) <= 1e-10
    model.train()
    torch.manual_seed(0)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    # On average it is the chain without dropout.
    mean = model(x.expand(2000, *x.shape)).mean(0)
    model.eval()
    assert difference(mean, model(x)) < 0.1


@pytest.mark.parametrize("text", [*ADAPTERS, *MIXTURES, *CLOSED[::3], *DROPOUT])
def test_gradient_checkpointing_gives_the_same_bits(text: str) -> None:
    for layer in ["linear"] if "dropout" in text else ["linear", "gpt2-conv1d", "conv2d"]:
        model = chained(text, layer).train()
        found = []
        for how in ("plain", "reentrant", "non-reentrant"):
            x = input_of(layer).requires_grad_()
            torch.manual_seed(3)
            model.zero_grad()
            y = model(x) if how == "plain" else checkpoint(model, x, use_reentrant=how == "reentrant")
            y.square().sum().backward()
            found.append([y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        for plain, *others in zip(*found, strict=True):
            assert all(torch.equal(plain, other) for other in others), layer


def test_dropout_on_a_convolution_is_refused() -> None:
    """A convolution's W' is recomputed by definition, and the definition knows no dropout."""
    model = model_of("conv2d")
    layer = model.layer
    with pytest.raises(dovetail.DovetailError, match=r"(?s)lora.*dropout=0\.1.*dropout=0"):
        dovetail.apply(model, "lora(r=3, dropout=0.1)", targets="layer")
    assert model.layer is layer


# ---- saved tensors


def saved_nbytes(text: str, width: int = 256, tokens: int = 96) -> tuple[int, int]:
    """Bytes that autograd keeps between forward and backward, and the largest tensor among them (elements)."""
    model = One(nn.Linear(width, width))
    x = torch.randn(2, tokens // 2, width, requires_grad=True)
    dovetail.apply(model, text, targets="layer", calibration=[{"x": x.detach()}])
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    storages = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    return sum(storages), max(t.untyped_storage().nbytes() // t.itemsize for t in kept.values())


@pytest.mark.parametrize(
    "text",
    [
        "wanda(0.5) >> lora(r=8) >> remask",
        "nf4 >> lora(r=8) >> regrid",
        "int(bits=4, group=64) >> lora(r=8) >> regrid(start=codes)",
        "wanda(0.5) >> fp8 >> lora(r=8) >> remask >> regrid",
    ],
)
def test_closing_saves_no_more_than_plain_lora(text: str) -> None:
    lora, _ = saved_nbytes("lora(r=8)")
    closed, largest = saved_nbytes(text)
    assert closed <= 1.05 * lora
    assert largest < 256 * 256


@pytest.mark.parametrize("text", ["loha(r=16)", "nf4 >> dora(r=8) >> ia3", "wanda(0.5) >> lora(r=8) >> remask >> ia3"])
def test_nothing_of_the_weights_size_is_saved(text: str) -> None:
    assert saved_nbytes(text)[1] < 256 * 256


def test_copies_of_a_chained_model_are_apart() -> None:
    for text in ["nf4(block=32) >> vera(r=16) >> regrid", "wanda(0.5) >> lora(r=3) >> remask", "ia3 >> dora(r=3)"]:
        model, x = chained(text), input_of()
        before, other = model(x), copy.deepcopy(model)
        assert torch.equal(other(x), before)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 1
        assert torch.equal(model(x), before)
        assert other.layer.base.scratch is not model.layer.base.scratch
        dovetail.merge(model)
        assert not isinstance(model.layer, ChainLinear)
        assert isinstance(other.layer, ChainLinear)
        assert any(isinstance(state.link, Constraint) for state in other.layer.states) == ("re" in text)
