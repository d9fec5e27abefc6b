"""The registry: every link has samples, says what it is, and what it says of itself is so."""

from __future__ import annotations

import pytest
import torch

from dovetail import chain
from dovetail.chains.link import Adapter, Constraint, OutputAdapter, Pruner, Quantizer
from dovetail.chains.registry import links
from samples import PRUNERS, SAMPLES, chained, input_of


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


@pytest.mark.parametrize("text", PRUNERS)
def test_a_pruner_reaches_its_sparsity_and_moves_the_others_only_if_it_says_so(text: str) -> None:
    (link,) = chain(text)
    layer, before = chained(text).layer, chained("lora(r=3)").layer.base.matrix()
    after = layer.base.matrix()
    assert int((after == 0).sum()) >= round(link.sparsity * after.numel()) - after.shape[0]
    assert torch.equal(after[after != 0], before[after != 0]) != link.moves_weights
    assert layer(input_of()).shape == (2, 5, 24)
