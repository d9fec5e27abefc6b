"""Links of other packages: an installed one is found by its entry point; what a link declares is what it gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import dovetail
from dovetail.chains import registry
from dovetail.chains.statistics import InputStatistics, Statistic
from dovetail.links import register
from dovetail.links.quantize.affine import AffineQuantizer, AffineWeight
from dovetail.links.quantize.integer import Int
from families import batch, logits, make
from places import ROOT

SAMPLE = ROOT / "examples/link_package"

SCRIPT = """
import torch
import dovetail
from dovetail.chains.layer.linear import chain_layers
from transformers import LlamaConfig, LlamaForCausalLM

def logits(model, inputs):
    return model(**inputs).logits

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)).eval()
inputs = {"input_ids": torch.arange(24).view(2, 12)}
dovetail.apply(model, "wanda(0.5) >> nf4 >> lora_fa(r=4) >> remask >> regrid", calibration=[inputs])
start = logits(model, inputs).detach()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
for _ in range(3):
    optimizer.zero_grad()
    logits(model, inputs).square().mean().backward()
    optimizer.step()
tuned = logits(model, inputs).detach()
assert not torch.equal(start, tuned)
report = dovetail.merge(model)
assert report.exact
assert report.max_abs_logit_diff == 0
assert not chain_layers(model)
assert torch.equal(logits(model, inputs), tuned)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the sample package is installed."""
    source, site = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("site")
    shutil.copytree(SAMPLE, source)  # setuptools builds beside the sources
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(site), str(source)], check=True)
    path = os.pathsep.join([str(site), *(p for p in sys.path if p)])
    return os.environ | {"PYTHONPATH": path}


def test_the_command_line_finds_an_installed_link(installed: dict[str, str]) -> None:
    run = [sys.executable, "-m", "dovetail", "methods", "--json"]
    found = subprocess.run(run, env=installed, capture_output=True, text=True, check=True)
    (row,) = [row for row in json.loads(found.stdout) if row["name"] == "lora_fa"]
    assert row["kind"] == "adapter"


def test_an_installed_link_trains_and_merges(installed: dict[str, str]) -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=installed, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_sample_is_what_the_document_shows() -> None:
    page = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
    for name in ("dovetail_lora_fa.py", "pyproject.toml"):
        assert (SAMPLE / name).read_text(encoding="utf-8").strip() in page


def test_an_entry_point_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value, dist = "broken", "no_such_module", None

        def load(self) -> None:
            raise ImportError("no module named 'no_such_module'")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()])
    registry._load.cache_clear()
    with pytest.raises(dovetail.DovetailError, match=r"links of broken(.|\n)*no_such_module cannot be imported"):
        dovetail.chain("lora(r=2)")


@pytest.fixture
def scaled_int(monkeypatch: pytest.MonkeyPatch) -> str:
    """A calibrated quantizer of another package, registered for one test; it needs no Gram matrix."""
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry.links()))

    @register("scaled_int")
    @dataclass(frozen=True)
    class ScaledInt(AffineQuantizer):
        """Integers of the weight, its inputs dampened by their mean magnitude."""

        statistics: ClassVar[frozenset[Statistic]] = frozenset({"magnitude"})

        def quantize(self, weight_oi: torch.Tensor, inputs: InputStatistics | None = None) -> AffineWeight:
            assert inputs is not None
            assert inputs.gram_ii is None
            quantized = Int(self.bits, self.group).quantize(weight_oi * (1 + inputs.magnitude_i))
            quantized.identity = f"scaled_int(bits={self.bits}, group={self.group}, symmetric={self.symmetric})"
            return quantized

    return "scaled_int"


@pytest.mark.parametrize("before", ["", "wanda(0.5) >> "])
def test_an_adapter_over_a_calibrated_quantizer_is_saved_and_loaded(before, scaled_int, tmp_path) -> None:
    model, other = make("llama").eval(), make("llama").eval()
    inputs = batch(model)
    dovetail.apply(model, f"{before}{scaled_int}(bits=4, group=32) >> lora(r=2)", calibration=[inputs])
    dovetail.save_adapter(model, tmp_path)
    dovetail.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, inputs), logits(model, inputs))


def test_mean_magnitudes_are_those_of_the_inputs() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found = InputStatistics(6, {"magnitude"}, dtype=x.dtype, device=x.device)
    for part in x.split(20):
        found.add(part)
    torch.testing.assert_close(found.magnitude_i, x.abs().mean(0))
    torch.testing.assert_close(found.norm_i, x.norm(dim=0))
