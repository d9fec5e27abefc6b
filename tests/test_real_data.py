"""The examples on a real pretrained encoder and real GLUE data, a few steps of each.

The data lies beside the checkout (`../shared/data`); where it doesn't, these tests say so and are skipped.
"""

from pathlib import Path

import pytest
import yaml

from dovetail.runs.flow import run
from places import ROOT

DATA = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data isn't here: {DATA.name} beside the checkout")


@pytest.mark.parametrize(("example", "metric"), [("minilm_stsb", "pearson"), ("minilm_cola", "matthews")])
def test_examples_run_on_real_input(example: str, metric: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / f"{example}.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for split in ("train", "validation"):
        recipe["data"][split] = str((path.parent / recipe["data"][split]).resolve())
    recipe["data"]["limit"] = {"train": 64, "validation": 32}
    recipe["train"] |= {"max_steps": 2, "batch_size": 8}
    recipe["calibration"] = {"samples": 8}
    report = run(recipe, output=tmp_path / "run", progress=False)
    names = [row.name for row in report.stages]
    assert names[0] == "base"
    assert "tuned" in names
    task = recipe["data"]["name"]
    assert all(metric in row.metrics[task] for row in report.stages)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").exists()
    if example == "minilm_cola":
        assert names == ["base", "pruned", "quantized", "tuned"]
        assert report.merge is None
        quantized = report.stages[2].footprint
        assert quantized.bits_per_weight == 4.5
        assert quantized.nonzero_fraction < 0.5
    else:
        assert names == ["base", "tuned", "merged"]
        assert report.merge is not None
        assert report.merge.exact


@pytest.mark.parametrize(
    "chain",
    [
        "wanda(0.5) >> lora(r=8) >> ia3 >> remask",
        "wanda(0.5) >> gptq(bits=4, group=128) >> lora(r=12, elastic=[12, 8, 4]) >> remask >> regrid",
        "sparsegpt(0.5) >> gptq(bits=4, group=0, act_order=false) >> loha(r=2) >> remask >> regrid",
    ],
)
def test_a_real_encoder_merges_bit_for_bit(chain: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / "minilm_stsb.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) | {"chain": chain}
    for split in ("train", "validation"):
        recipe["data"][split] = str((path.parent / recipe["data"][split]).resolve())
    recipe["data"]["limit"] = {"train": 16, "validation": 16}
    recipe["train"] |= {"max_steps": 2, "batch_size": 8}
    recipe["calibration"] = {"samples": 16}
    recipe["targets"] = ["*.layer.0.attention.*", "*.layer.5.*"]  # every shape: the solvers take a second a layer
    report = run(recipe, output=tmp_path / "run", progress=False)
    assert report.merge is not None
    assert report.merge.exact
    assert (report.merge.max_abs_logit_diff, report.merge.max_abs_weight_diff, report.merge.off_grid) == (0, 0, 0)
    assert report.merge.sparsity_before == report.merge.sparsity_after >= 0.5
    assert report.checkpoint is not None
    assert report.checkpoint.max_abs_logit_diff == 0
