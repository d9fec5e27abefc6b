"""Links of other packages: an installed one is found by its entry point; what a link declares is what it gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch

import dovetail
import dovetail.testing
from dovetail.chains import registry
from dovetail.chains.check import check
from dovetail.chains.layer.linear import chain_layers
from dovetail.chains.link import identity_of
from dovetail.chains.statistics import InputStatistics, Statistic
from dovetail.errors import ChainError, DovetailError
from dovetail.links import register
from dovetail.links.quantize.affine import AffineQuantizer, AffineScaleForm, AffineWeight, GroupQuantizer, affine_range
from dovetail.links.quantize.integer import Int
from families import batch, logits, make, move
from places import ROOT
from small_tokenizers import words

SAMPLE = ROOT / "examples/link_package"

SCRIPT = """
import sys

import torch

import dovetail
from dovetail.cli.main import main
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
sys.argv = ["dovetail", "methods", "--json"]
main()
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


def test_an_installed_link_is_listed_trains_and_merges(installed: dict[str, str]) -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=installed, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    (row,) = [row for row in json.loads(found.stdout) if row["name"] == "lora_fa"]
    assert row["kind"] == "adapter"


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


@pytest.fixture
def midrise(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose quantizer stores float zero points and every form of scales."""

    class Installed:
        name, value, dist = "midrise", "midrise_package", None

        def load(self) -> None:
            @register("midrise")
            @dataclass(frozen=True)
            class MidRise(GroupQuantizer):
                """Integers around the middle of a group's range, which is a float, or around zero."""

                scale: AffineScaleForm = "float16"
                zero: Literal["integer", "float16"] = "float16"

                widths: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
                summary: ClassVar[str] = "integers around the middle of the range"
                source: ClassVar[str] = "this test"

                @property
                def has_zero(self) -> bool:
                    return self.zero == "integer"

                def quantize(self, weight_oi: torch.Tensor, inputs: InputStatistics | None = None) -> AffineWeight:
                    groups = self._groups(weight_oi.shape[1], self.name)
                    weight_32 = weight_oi.float().contiguous()
                    span, zero = affine_range(weight_32, groups, bits=self.bits, symmetric=False, where=self.name)
                    if zero is not None and not self.has_zero:
                        zero = zero + 0.375
                    return AffineWeight.from_scales(
                        weight_32,
                        span,
                        zero,
                        bits=self.bits,
                        identity=identity_of(self),
                        scale=self.scale,
                        zero=self.zero,
                    )

                def empty(self, shape: tuple[int, int]) -> AffineWeight:
                    return AffineWeight.empty(
                        shape, groups=self._groups(shape[1], self.name), bits=self.bits, symmetric=False,
                        identity=identity_of(self), scale=self.scale, zero=self.zero,
                    )  # fmt: skip

    monkeypatch.setattr(registry, "_REGISTERED", dict(registry.links()))
    monkeypatch.setattr(registry, "entry_points", lambda group: [Installed()])
    registry._load.cache_clear()


FORMS = [
    ("midrise(bits=4, group=8)", 16),
    ("midrise(bits=1, group=8, scale=float32)", 32),
    ("midrise(bits=3, group=8, scale=e8m0, zero=integer)", 8),
    ("midrise(bits=2, group=8, scale=double)", 8),
]


@pytest.mark.parametrize(("text", "bits_per_scale"), FORMS)
def test_a_grid_of_another_package_keeps_the_contract(text: str, bits_per_scale: int, midrise: None, tmp_path) -> None:
    dovetail.testing.check_link(text)
    model = make("llama").eval()
    dovetail.apply(model, f"{text.replace('group=8', 'group=32')} >> lora(r=2) >> regrid")
    move(model)
    inputs = batch(model)
    assert dovetail.merge(model, packed=True).exact
    dovetail.save_packed(model, tmp_path, tokenizer=words())
    again = dovetail.load(tmp_path)[0]
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert dovetail.footprint(again) == dovetail.footprint(model)
    grid = chain_layers(again)["model.layers.0.mlp.up_proj"].base.quantized
    assert grid is not None
    scales = sum(8 * t.nbytes for name, t in grid.named_buffers() if name.startswith("scale"))
    blocks = grid.shape[0] * grid.shape[1] // grid.block
    assert scales // blocks == bits_per_scale


@pytest.mark.parametrize(
    ("text", "where", "rule"),
    [
        ("wanda(0.5) >> midrise", "midrise, link 2", "a quantizer after a pruner must represent zero exactly"),
        ("midrise >> wanda(0.5)", "wanda, link 2", "a quantizer before a pruner must represent zero exactly"),
        ("midrise >> lora >> remask", "remask, link 3", "re-imposes the mask of a pruner"),
        (
            "magnitude(0.5) >> lora >> remask >> midrise >> lora >> remask >> regrid",
            "midrise, link 4",
            "represent zero",
        ),
    ],
)
def test_a_grid_without_a_zero_is_refused_beside_a_pruner(text: str, where: str, rule: str, midrise: None) -> None:
    with pytest.raises(ChainError, match=rule) as caught:
        check(text)
    assert caught.value.where.startswith(where)
    if not text.endswith("lora >> remask"):
        check(text.replace("midrise", "midrise(zero=integer)"))


def test_a_weight_on_a_grid_without_a_zero_cannot_be_pruned(midrise: None) -> None:
    (link,) = dovetail.chain("midrise(group=8)")
    assert isinstance(link, GroupQuantizer)
    quantized = link.quantize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(DovetailError, match="a grid without an exact zero"):
        quantized.with_zeros(torch.ones(4, 16, dtype=torch.bool))


def test_mean_magnitudes_are_those_of_the_inputs() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    found = InputStatistics(6, {"magnitude"}, dtype=x.dtype, device=x.device)
    for part in x.split(20):
        found.add(part)
    torch.testing.assert_close(found.magnitude_i, x.abs().mean(0))
    torch.testing.assert_close(found.norm_i, x.norm(dim=0))
