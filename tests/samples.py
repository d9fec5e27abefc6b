"""What the contract suite runs over: a few configurations of every link, of every layer and of every base.

A newly registered link needs one line in SAMPLES (`test_registry.py` says so); everything else follows from its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import dovetail
from dovetail.chains.layer.linear import ChainLinear
from dovetail.chains.link import Adapter, Constraint, Link, OutputAdapter, Pruner, Quantizer
from dovetail.chains.registry import links
from dovetail.models.layouts import ConvLayout

IN, OUT = 32, 24

SAMPLES: dict[str, tuple[str, ...]] = {
    "magnitude": ("magnitude(0.5)", "magnitude(0.3, per=row)", 'magnitude(0.75, pattern="1:4")'),
    "wanda": ("wanda(0.5)", 'wanda(0.5, pattern="2:4")'),
    "ria": ("ria(0.5)",),
    "sparsegpt": ("sparsegpt(0.5)", 'sparsegpt(pattern="2:4")'),
    "gptq": ("gptq(bits=4, group=8)", "gptq(bits=3, group=0, symmetric=true, act_order=false)"),
    "int": (
        "int(bits=4, group=8)",
        "int(bits=2, group=16, symmetric=true)",
        "int(bits=3, group=0)",
        "int(bits=8, group=0, symmetric=true)",
    ),
    "hqq": ("hqq(bits=4, group=8)", "hqq(bits=2, group=8)", "hqq(bits=3, group=8, zero=exact)"),
    "nf4": ("nf4(block=32)", "nf4(block=64, double=true)"),
    "nf": ("nf(bits=3, block=32)", "nf(bits=2, double=true)", "nf(bits=8)"),
    "keep": ("keep", "keep(format=Q4_K)"),
    "mxfp4": ("mxfp4",),
    "nvfp4": ("nvfp4",),
    "fp4": ("fp4(block=32)", "fp4(block=64, double=true)"),
    "fp8": ("fp8", "fp8(scale=tensor)"),
    "lora": ("lora(r=3)", "lora(r=4, alpha=6, scaling=rs)", "lora(r=5, alpha=2, elastic=[5, 3, 2])"),
    "adalora": ("adalora(r=3, budget=2)", "adalora(r=4, budget=2, alpha=6)"),
    "dora": ("dora(r=3, alpha=6)", "dora(r=4, scaling=rs, elastic=[4, 2, 1])"),
    "ia3": ("ia3", "ia3(side=in)"),
    "loha": ("loha(r=2, alpha=3)", "loha(r=5)", "loha(r=5, elastic=[5, 2])"),  # as a low rank, and recomputed
    "scales": ("scales",),
    "vera": ("vera(r=16)", "vera(r=16, elastic=[16, 12, 8])"),
    "bottleneck": ("bottleneck(r=5)",),
    "remask": ("remask",),
    "regrid": ("regrid", "regrid(start=codes)"),
}


def of_kind(kind: type[Link] | tuple[type[Link], ...], *, but: type[Link] | None = None) -> list[str]:
    """All sample configurations of the registered links of a kind."""
    names = [n for n, cls in links().items() if issubclass(cls, kind) and not (but and issubclass(cls, but))]
    return [text for name in names for text in SAMPLES.get(name, ())]


KEPT = SAMPLES["keep"]
"""Quantizers of a model that is quantized already; refused on the models here."""
PRUNERS, QUANTIZERS = of_kind(Pruner), [text for text in of_kind(Quantizer) if text not in KEPT]
PRUNABLE = [text for text in QUANTIZERS if not text.startswith("hqq") or "zero=exact" in text]
"""Quantizers whose grid has an exact zero, written down a second time."""
GRID_ADAPTERS = [text for text in of_kind(Adapter) if dovetail.chain(text).links[0].moves]
"""Adapters that train the grid of a quantized base, and nothing else."""
ADAPTERS = [text for text in of_kind(Adapter) if text not in GRID_ADAPTERS]
WEIGHT_ADAPTERS = [text for text in of_kind(Adapter, but=OutputAdapter) if text not in GRID_ADAPTERS]
ZERO_CONSTRAINTS = [text for text in of_kind(Constraint) if links()[text.split("(")[0]].restores == "zeros"]
GRID_CONSTRAINTS = [text for text in of_kind(Constraint) if links()[text.split("(")[0]].restores == "grid"]

STARTS = [
    "lora(r=3, init=lqlora, iterations=3)",
    "lora(r=4, alpha=6, scaling=rs, init=pissa)",
    "dora(r=3, init=loftq, iterations=2)",
]
"""Adapters that do not start as the identity."""

MIXTURES = [
    "lora(r=3) >> ia3",
    "ia3 >> lora(r=3) >> ia3(side=in)",
    "lora(r=3) >> vera(r=16) >> dora(r=3) >> ia3",
    "ia3(side=in) >> dora(r=2) >> dora(r=3)",
    "loha(r=2) >> lora(r=3) >> ia3",
    "loha(r=5) >> dora(r=2)",
]
"""Several adapters that go into one form (or, the last, that don't)."""

BASES = ["", *PRUNERS, *QUANTIZERS, "wanda(0.5) >> nf4(block=32)", "int(bits=4, group=8) >> magnitude(0.5)"]
FEW_BASES = ["", "wanda(0.5)", "nf4(block=32)", "magnitude(0.4) >> int(bits=4, group=8)"]

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), (2, 5, IN)),
    "linear-no-bias": (lambda: nn.Linear(IN, OUT, bias=False), (3, IN)),
    "gpt2-conv1d": (lambda: Conv1D(OUT, IN), (2, 5, IN)),
    "conv1d": (lambda: nn.Conv1d(8, OUT, 4, stride=2, padding=1, dilation=2), (2, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(2, OUT, 4, padding="same", dilation=2, bias=False), (2, 2, 6, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(16, OUT, 2, groups=2, stride=(1, 2), padding=(1, 0)), (2, 16, 5, 4)),
}
"""Name -> (layer, input shape); each weight is a matrix of 24 x 32."""
OTHER_LAYERS = [name for name in LAYERS if name != "linear"]


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def seeded(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model_of(layer: str = "linear", dtype: torch.dtype = torch.float32, seed: int = 0) -> One:
    """The model of one layer with weights of ordinary size, a bias that isn't zero, and a row of zeros."""
    model = One(LAYERS[layer][0]())
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(0.2 * seeded(tuple(parameter.shape), seed=seed + place))
        oi = model.layer.weight.t() if layer == "gpt2-conv1d" else model.layer.weight
        oi[3] = 0
    return model.to(dtype).eval()


def input_of(layer: str = "linear", dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return seeded(LAYERS[layer][1], dtype, seed)


def joined(*parts: str) -> str:
    """A chain's text of its parts, empty ones left out."""
    return " >> ".join(part for part in parts if part)


def chained(text: str, layer: str = "linear", dtype: torch.dtype = torch.float32, *, moved: bool = True) -> One:
    """The model of one layer under a chain; `moved`: its parameters away from where they start."""
    model = model_of(layer, dtype)
    calibration = [{"x": input_of(layer, dtype, seed=5 + batch)} for batch in range(8)]
    dovetail.apply(model, text, targets="layer", calibration=calibration)
    if moved:
        move(model)
    return model


def move(model: nn.Module, by: float = 0.1, seed: int = 2) -> None:
    """Adds noise to every trainable parameter."""
    with torch.no_grad():
        for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += by * seeded(tuple(parameter.shape), parameter.dtype, seed + place)


def by_definition(layer: ChainLinear, x: Tensor) -> Tensor:
    """What the layer answers by the links' definitions and ordinary autograd."""
    weight, bias = layer.effective_weight()
    y = layer.layout.call(x, layer.layout.native(weight), bias)
    for state in layer.states:
        if isinstance(state.link, OutputAdapter):
            axis = 1 if isinstance(layer.layout, ConvLayout) else -1
            y = state.link.output(y.transpose(axis, -1), state.values()).transpose(axis, -1)
    return y


def zeros(layer: nn.Module) -> Tensor:
    """Where the layer's weight is zero; (o, i) for a layer under a chain, of its base."""
    return layer.base.matrix() == 0 if isinstance(layer, ChainLinear) else layer.weight == 0


def closed_chains() -> Iterator[str]:
    """Adapters, closed so that nothing is lost, over every kind of base."""
    for adapter in [*WEIGHT_ADAPTERS, MIXTURES[0], MIXTURES[2]]:
        yield f"wanda(0.5) >> {adapter} >> remask"
        yield f"wanda(0.5) >> int(bits=4, group=8) >> {adapter} >> remask >> regrid"
    for quantizer in QUANTIZERS:
        for constraint in GRID_CONSTRAINTS:
            yield f"{quantizer} >> lora(r=3) >> {constraint}"
    for start in STARTS:
        yield f"int(bits=4, group=8) >> {start} >> regrid"
    yield f"wanda(0.5) >> nf4(block=32) >> {STARTS[1]} >> remask >> regrid(start=codes)"
    yield "magnitude(0.4) >> nf4(block=32) >> lora(r=3) >> regrid >> remask"
    yield "nf4(block=32) >> magnitude(0.4) >> lora(r=3) >> remask >> regrid"
    yield "magnitude(0.4) >> nf4(block=32) >> lora(r=3) >> remask >> ia3 >> regrid"  # recomputed
    yield "wanda(0.5) >> lora(r=3) >> ia3 >> remask"
