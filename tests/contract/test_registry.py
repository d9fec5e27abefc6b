"""The registry: every link has samples, says what it is, and what it says of itself is so."""

from __future__ import annotations

import pytest
import torch

from dovetail import chain
from dovetail.chains.link import Adapter, Constraint, OutputAdapter, Pruner, Quantizer, Site
from dovetail.chains.registry import links
from samples import ADAPTERS, PRUNERS, QUANTIZERS, SAMPLES, WEIGHT_ADAPTERS, chained, input_of, zeros


@pytest.mark.parametrize("name", links())
def test_every_link_has_samples_and_describes_itself(name: str) -> None:
    assert name in SAMPLES, f"give {name} a line in tests/samples.py"
    cls = links()[name]
    kinds = [kind for kind in (Pruner, Quantizer, Adapter, Constraint) if issubclass(cls, kind)]
    assert len(kinds) == 1
    assert cls.name == name
    assert cls.summary
    assert cls.source
    assert cls.differentiable == (kinds[0] in (Adapter, Constraint))
    assert cls.mergeable != issubclass(cls, OutputAdapter)
    for text in SAMPLES[name]:
        assert [link.name for link in chain(text)] == [name]


def test_no_sample_without_a_link() -> None:
    assert set(SAMPLES) == set(links())


@pytest.mark.parametrize("text", WEIGHT_ADAPTERS)
def test_what_an_adapter_says_it_keeps_is_what_it_keeps(text: str) -> None:
    (link,) = chain(text)
    pruned = chained(f"wanda(0.5) >> {text}").layer
    assert bool((pruned.effective_weight()[0][zeros(pruned)] == 0).all()) == link.keeps_zeros
    quantized = chained(f"int(bits=4, group=8) >> {text}").layer
    off_grid = quantized.base.quantized.off_grid(quantized.effective_weight()[0].detach())
    assert (off_grid == 0) == link.keeps_grid


@pytest.mark.parametrize("text", ADAPTERS)
def test_init_gives_what_parameter_shapes_says(text: str) -> None:
    (link,) = chain(text)
    site = Site("layer", 24, 32, has_bias=True)
    values = link.init(site, torch.randn(24, 32), torch.Generator().manual_seed(0))
    assert {name: tuple(v.shape) for name, v in values.items()} == link.parameter_shapes(site)


@pytest.mark.parametrize("text", QUANTIZERS)
def test_a_quantizer_that_says_it_has_a_zero_keeps_zeros_and_says_what_it_stores(text: str) -> None:
    (link,) = chain(text)
    layer = chained(f"wanda(0.5) >> {text}").layer
    dense = chained("wanda(0.5)").layer
    assert bool((layer.base.matrix()[zeros(dense)] == 0).all()) == link.keeps_zeros
    assert link.stored_nbytes(layer.site) == layer.base.quantized.nbytes


@pytest.mark.parametrize("text", PRUNERS)
def test_a_pruner_reaches_its_sparsity_and_moves_the_others_only_if_it_says_so(text: str) -> None:
    (link,) = chain(text)
    layer, before = chained(text).layer, chained("lora(r=3)").layer.base.matrix()
    after = layer.base.matrix()
    assert int((after == 0).sum()) >= round(link.sparsity * after.numel()) - after.shape[0]
    assert torch.equal(after[after != 0], before[after != 0]) != link.moves_weights
    assert layer(input_of()).shape == (2, 5, 24)
