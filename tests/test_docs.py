"""The documents tell the truth: samples run, the tree is the tree, the table is the registry."""

import re
import subprocess
import sys

import torch

import dovetail
from dovetail.chains.registry import _REGISTERED as REGISTRY
from dovetail.compression.apply import chain_layers
from families import batch, logits, make
from places import ROOT


def test_the_sample_method_stands_in_the_document_and_works():
    text = (ROOT / "tests/sample_method.py").read_text(encoding="utf-8")
    assert text.strip() in (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
    import sample_method

    try:
        model = make("llama").eval()
        inputs = batch(model)
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
    finally:
        del REGISTRY[sample_method.LoRAFA.name]
        del sys.modules["sample_method"]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", readme(), re.DOTALL)
    assert code is not None
    assert len([line for line in code.group(1).splitlines() if line.strip()]) <= 12
    run = subprocess.run(
        [sys.executable, "-c", code.group(1)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "exact" in run.stdout


def test_the_readmes_tree_is_the_tree():
    tree = re.search(r"```\nsrc/dovetail/\n(.*?)\nbench/", readme(), re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"[\w/]+\.py|\b\w+/", tree.group(1)))
    folder = ROOT / "src/dovetail"
    modules = {p.name for p in folder.glob("*.py") if p.name != "__init__.py"} | {
        f"{p.name}/" for p in folder.iterdir() if (p / "__init__.py").exists()
    }
    missing = modules - named
    assert not missing, f"not in the README's tree: {sorted(missing)}"
    inside = {p.name for p in folder.rglob("*.py")} | {f"{p.name}/" for p in folder.rglob("*") if p.is_dir()}
    gone = {n for n in named if n not in inside}
    assert not gone, f"in the README's tree alone: {sorted(gone)}"


def test_the_readmes_table_is_the_registry():
    from dovetail.cli.tables import markdown_table

    assert markdown_table() in readme(), "dovetail.cli.tables.markdown_table() gives the table"
