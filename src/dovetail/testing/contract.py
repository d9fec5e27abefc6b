"""The contract of a link as a function: what Dovetail's own links are tested for, for links of other packages.

    import dovetail.testing

    def test_my_link():
        dovetail.testing.check_link("my_link(r=4)", "my_link(r=4, alpha=8)")

Each check runs on one small layer, 24 x 32, and raises AssertionError with the chain and the rule that does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dovetail.chains.layer.applied import applied
from dovetail.chains.layer.linear import ChainLinear, chain_layers
from dovetail.chains.link import Adapter, Constraint, Link, OutputAdapter, Pruner, Quantizer
from dovetail.chains.notation import chain
from dovetail.checkpoint.merge import merge
from dovetail.compression.apply import apply

OUT, IN = 24, 32
TOLERANCE = 1e-10
"""Of float64 results, relative to the largest."""


class _OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def check_link(*samples: str | Link) -> None:
    """Check configurations of a link against the contract of every link.

    samples  configurations of registered links, as notation or as instances: a few that differ in what they compute

    Checked of every sample: the notation reads back as it prints; the layer's forward pass and gradients equal the
    link's definition (`fold`, `project`, `output`) in float64; a state dict loads into a fresh layer bit for bit.
    Of an adapter: it starts as the identity (or, where `starts` says otherwise, nearer to the weight than its base is),
    and gradients reach every declared parameter and nothing else; merging
    changes no output (or, of an output adapter, is refused); what it declares with `keeps_zeros` and `keeps_grid` is
    what it keeps. Of a pruner and a quantizer: zeros and values on the grid survive training behind `remask` and
    `regrid` and the merge, bit for bit; the bytes that a quantizer promises are those it stores; zeros survive a
    quantizer that declares `keeps_zeros` and `has_zero`; `has_zero` is what its grid says. Of a constraint: a chain
    that ends in it merges bit for bit.

    Raises ChainError for a sample that is not legal notation, AssertionError for a rule that does not hold.
    """
    for sample in samples:
        text = str(chain(sample))
        made = chain(text).links
        _require(len(made) == 1 and str(made[0]) == text, text, "a sample is one link that reads back as it prints")
        link = made[0]
        if isinstance(link, Adapter):
            _check_adapter(link, text)
        elif isinstance(link, Pruner):
            _check_closed(f"{text} >> lora(r=3) >> remask")
            layer = _layer(text)
            before, after = _model(torch.float64).layer.weight, layer.base.matrix()
            moved = not torch.equal(after[after != 0], before[after != 0])
            _require(moved == link.moves_weights, text, "moves_weights tells whether the kept weights change")
        elif isinstance(link, Quantizer):
            _check_quantizer(link, text)
        elif isinstance(link, Constraint):
            base = "magnitude(0.5)" if link.restores == "zeros" else "int(bits=4, group=8)"
            _check_closed(f"{base} >> lora(r=3) >> {text}")


def _check_adapter(link: Adapter, text: str) -> None:
    x = _input(torch.float64)
    if link.moves is not None:
        _check_moves(link, text)
        return
    if link.starts == "identity":
        for base in ("", "magnitude(0.5) >> ", "int(bits=4, group=8) >> "):
            plain = _layer(base.removesuffix(" >> ")) if base else _model(torch.float64).layer
            _require(_near(_layer(base + text)(x), plain(x)), base + text, "an adapter starts as the identity")
    else:
        _check_decomposition(link, text)
    text = f"int(bits=4, group=8) >> {text}" if link.starts == "quantizer" else text
    layer = _layer(text)
    declared = link.parameter_shapes(layer.site)
    values = {name: tuple(p.shape) for name, p in layer.states[0].named_parameters()}
    _require(values == declared, text, f"init returns the parameters of parameter_shapes: {declared}, not {values}")
    _move(layer)
    frozen = {name: t.clone() for name, t in layer.state_dict().items() if not name.startswith("links.")}
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        trained = name.removeprefix("links.0.") in declared
        reached = parameter.grad is not None and bool(parameter.grad.any())
        _require(reached == trained, text, f"gradients reach the declared parameters and nothing else: {name}")
    _require(_same(frozen, layer.state_dict()), text, "a backward pass changes no frozen tensor")
    _check_definition(text)
    _check_saved(text)
    if isinstance(link, OutputAdapter):
        _require(not link.mergeable, text, "an adapter of outputs declares mergeable = False")
        return
    if link.starts == "quantizer":
        _check_closed(f"{text} >> regrid")
        return
    model = _model(torch.float64, text)
    _move(model)
    before = model(x)
    merge(model)
    _require(_near(model(x), before), text, "merging changes no output")
    quantized = _layer(f"int(bits=4, group=8) >> {text}")
    _move(quantized)
    if link.starts == "identity":
        pruned = _layer(f"magnitude(0.5) >> {text}")
        _move(pruned)
        zeros = bool((pruned.effective_weight()[0][pruned.base.matrix() == 0] == 0).all())
        _require(zeros == link.keeps_zeros, text, "keeps_zeros tells whether zeros of the base stay zero")
    grid = quantized.base.quantized
    on_grid = grid is not None and grid.off_grid(quantized.effective_weight()[0].detach()) == 0
    _require(on_grid == link.keeps_grid, text, "keeps_grid tells whether weights stay on the base's grid")


def _check_moves(link: Adapter, text: str) -> None:
    """Check that a link that moves the grid starts as the base, trains, and merges bit for bit with the same codes."""
    bases = {
        "scales": ("int(bits=4, group=8)", "gptq(bits=3, group=16, symmetric=true)", "nf4(block=32)", "fp8",
                   "hqq(bits=2, group=8)", "magnitude(0.5) >> int(bits=4, group=8)"),
        "zeros": ("hqq(bits=4, group=8)", "hqq(bits=2, group=4)", "hqq(bits=8, group=8)"),
    }  # fmt: skip
    for base in bases[link.moves or "scales"]:
        layer, plain = _layer(f"{base} >> {text}"), _layer(base)
        x = _input(torch.float64)
        start = torch.equal(layer.used_weight(), plain.used_weight())
        _require(start, f"{base} >> {text}", "a link that moves the grid starts as the base, bit for bit")
        _require(_near(layer(x), plain(x)), f"{base} >> {text}", "an adapter starts as the identity")
        _move(layer)
        frozen = {name: t.clone() for name, t in layer.state_dict().items() if not name.startswith("links.")}
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.any())
            _require(reached == name.startswith("links."), text, f"gradients reach the declared parameters: {name}")
        _require(_same(frozen, layer.state_dict()), text, "a backward pass changes no frozen tensor")
        grid = layer.grid()
        _require(grid is not None and layer.base.quantized is not None, text, "the base is quantized")
        assert grid is not None
        assert layer.base.quantized is not None
        (now, _), (before, _) = grid.codes_of(0, OUT), layer.base.quantized.codes_of(0, OUT)
        _require(torch.equal(now, before), text, "the codes stay")
        _check_closed(f"{base} >> {text}")


def _check_decomposition(link: Adapter, text: str) -> None:
    """Check that base and parameters are nearer to the weight than the base alone, and that the base is made again."""
    weight = _model(torch.float64).layer.weight.detach()
    if link.starts == "weight":
        error = (_layer(text).effective_weight()[0].detach() - weight).abs().max()
        _require(float(error) <= TOLERANCE, text, "without a quantizer, the start is the weight")
    for quantizer in ("int(bits=4, group=8)", "gptq(bits=3, group=8)", "hqq(bits=2, group=8)"):
        layer, plain = _layer(f"{quantizer} >> {text}"), _layer(quantizer)
        near = torch.linalg.matrix_norm(layer.effective_weight()[0] - weight)
        far = torch.linalg.matrix_norm(plain.base.matrix() - weight)
        _require(bool(near < far), f"{quantizer} >> {text}", "the start is nearer to the weight than the base alone")
    for closed in (f"int(bits=4, group=8) >> {text} >> regrid", f"nf4 >> {text} >> regrid(start=codes)"):
        _check_closed(closed)
    _check_closed(f"magnitude(0.5) >> int(bits=4, group=8) >> {text} >> remask >> regrid")
    model = _model(torch.float32, f"int(bits=4, group=8) >> {text}")
    taken = applied(model).taken
    again = _model(torch.float32)
    apply(again, f"int(bits=4, group=8) >> {text}", targets="layer", taken=taken)
    one, two = (chain_layers(each)["layer"].base.state_dict() for each in (model, again))
    _require(_same(one, two), text, "the base is made again from what was taken, bit for bit")


def _check_quantizer(link: Quantizer, text: str) -> None:
    _check_closed(f"{text} >> lora(r=3) >> regrid")
    layer = _layer(text)
    stored = layer.base.quantized
    _require(stored is not None, text, "a quantizer gives the layer a quantized base")
    assert stored is not None
    _require(link.stored_nbytes(layer.site) == stored.nbytes, text, "stored_nbytes is what the grid stores")
    _require(stored.off_grid(stored.dequantize(torch.empty(OUT, IN))) == 0, text, "its own values are on the grid")
    has_zero = stored.zero_codes(0, OUT) is not None
    _require(link.has_zero == has_zero, text, "has_zero tells whether the grid has a code of zero")
    if link.keeps_zeros and link.has_zero:
        pruned, behind = _layer("magnitude(0.5)"), _layer(f"magnitude(0.5) >> {text}")
        zero = pruned.base.matrix() == 0
        _require(not bool(behind.base.matrix()[zero].any()), text, "keeps_zeros: zeros are quantized to zero")
        _check_closed(f"magnitude(0.5) >> {text} >> lora(r=3) >> remask >> regrid")


def _check_closed(text: str) -> None:
    """Zeros and grid survive four steps of training and the merge, which changes no bit."""
    _check_definition(text)
    _check_saved(text)
    model, x = _model(torch.float32, text), _input(torch.float32)
    layer = model.layer
    assert isinstance(layer, ChainLinear)
    zero = None if layer.base.mask_bits is None else ~layer.base.mask_rows(slice(None))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    before, grid = model(x), layer.grid()
    report = merge(model)
    weight = model.layer.weight
    _require(report.exact and torch.equal(model(x), before), text, "a closed chain merges bit for bit")
    _require(zero is None or not bool(weight[zero].any()), text, "zeros survive training and merge")
    _require(grid is None or grid.off_grid(weight) == 0, text, "weights stay on the grid through training and merge")


def _check_definition(text: str) -> None:
    """Check that the forward pass and all gradients equal those of the links' definitions."""
    layer, x = _layer(text), _input(torch.float64).requires_grad_()
    _move(layer)
    weight, bias = layer.effective_weight()
    slow = nn.functional.linear(x, weight, bias)
    for state in layer.states:
        if isinstance(state.link, OutputAdapter):
            slow = state.link.output(slow, state.values())
    fast = layer(x)
    _require(_near(fast, slow), text, "the forward pass equals the definition")
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    scale = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).view_as(fast)
    for one, two in zip(*(torch.autograd.grad((y * scale).sum(), wanted) for y in (fast, slow)), strict=True):
        _require(_near(one, two), text, "the gradients equal those of the definition")


def _check_saved(text: str) -> None:
    model, x = _model(torch.float32, text), _input(torch.float32)
    _move(model)
    fresh = _model(torch.float32, text)
    fresh.load_state_dict(model.state_dict(), strict=True)
    _require(torch.equal(fresh(x), model(x)), text, "a state dict loads into a fresh layer bit for bit")
    _require(_same(model.state_dict(), fresh.state_dict()), text, "a loaded layer saves the same tensors")


def _model(dtype: torch.dtype, text: str = "") -> _OneLayer:
    model = _OneLayer()
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * _seeded(tuple(parameter.shape), place))
    model.to(dtype).eval()
    if text:
        apply(model, text, targets="layer", calibration=[{"x": _input(dtype, 5 + batch)} for batch in range(8)])
    return model


def _layer(text: str) -> ChainLinear:
    layer = _model(torch.float64, text).layer
    assert isinstance(layer, ChainLinear)
    return layer


def _input(dtype: torch.dtype, seed: int = 1) -> Tensor:
    return _seeded((2, 5, IN), seed).to(dtype)


def _seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _move(module: nn.Module) -> None:
    """Move every trainable parameter away from where it starts."""
    for place, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
        parameter += 0.1 * _seeded(tuple(parameter.shape), 2 + place).to(parameter.dtype)


def _near(found: Tensor, wanted: Tensor) -> bool:
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def _require(holds: bool, text: str, rule: str) -> None:
    if not holds:
        raise AssertionError(f"{text}: {rule}")
