"""Scores that runs share: computed once, and the very scores that each run would have computed."""

from __future__ import annotations

import json
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from dovetail.chains.notation import chain
from dovetail.compression.apply import apply
from dovetail.runs import rows
from dovetail.runs.flow import run
from dovetail.runs.shared import Scored, SharedScores
from small_models import llama
from small_runs import small_recipe


def test_runs_of_one_folder_score_an_untuned_model_once(tmp_path, monkeypatch):
    recipe, scored, real = small_recipe(tmp_path, merge="none", train={"max_steps": 1}), [], rows.evaluate

    def counted(model, *args, **kwargs):
        scored.append(model)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(rows, "evaluate", counted)

    def scores(name, chain_text, count, **more):
        scored.clear()
        made = run({**recipe, "chain": chain_text, **more}, output=tmp_path / name, progress=False, shared=shared)
        assert len(scored) == count
        return [(row.name, row.metrics, row.footprint) for row in made.stages]

    shared = tmp_path / "shared"
    scores("a", "nf4 >> lora(r=2)", 3)
    found = scores("b", "nf4 >> ia3", 1)  # tuned
    assert scores("c", "nf4(double=true) >> ia3", 2)[0] == found[0]
    scores("d", "nf4 >> ia3", 1, seed=1)
    scores("e", "nf4 >> ia3", 3, evaluate={"limit": 4})
    shared = None
    assert scores("alone", "nf4 >> ia3", 3) == found


@pytest.mark.parametrize(
    ("chain_text", "files"),
    [
        ("gptq(bits=4, group=32) >> lora(r=2) >> regrid", 1),
        ("nf4 >> lora(r=2) >> ia3", 1),
        ("nf4 >> lora(r=2, init=loftq)", 0),
        ("wanda(0.5) >> int(bits=4, group=32) >> lora(r=2)", 0),
        ("ia3 >> nf4 >> lora(r=2)", 0),
    ],
)  # fmt: skip
def test_quantized_layers_are_made_once(tmp_path, monkeypatch, chain_text, files):
    recipe = small_recipe(tmp_path, merge="none", train={"max_steps": 2}, chain=chain_text)

    def weights(name):
        made = run(recipe, output=tmp_path / name, progress=False, shared=shared)
        return load_file(tmp_path / name / "adapter" / "adapter.safetensors"), [row.metrics for row in made.stages]

    shared = None
    alone, scores = weights("alone")
    shared = tmp_path / "shared"
    first = weights("first")
    assert len(list(shared.glob("*.safetensors"))) == files
    if files:
        monkeypatch.setattr("dovetail.compression.apply.compress", lambda *args, **kwargs: pytest.fail("made again"))
    for found, same in (first, weights("second")):
        assert same == scores
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_another_configuration_or_version_shares_nothing(tmp_path, monkeypatch):
    chain_text = "gptq(bits=4, group=32) >> lora(r=2) >> regrid"
    recipe = small_recipe(tmp_path, merge="none", train={"max_steps": 1}, chain=chain_text)

    def shared_files(name):
        run(recipe, output=tmp_path / name, progress=False, shared=tmp_path / "shared")
        return [len(list((tmp_path / "shared").glob(f"*.{kind}"))) for kind in ("json", "safetensors")]

    assert shared_files("first") == shared_files("second") == [2, 1]
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    assert shared_files("configuration") == [4, 2]
    monkeypatch.setattr("dovetail.runs.report.record.version", lambda name: "0.0")
    assert shared_files("version") == [6, 3]


def test_one_process_computes_and_others_wait(tmp_path):
    model = llama()
    shared, made = SharedScores(tmp_path / "x", {"data": "1"}), []

    def score():
        made.append(1)
        return Scored(metrics={"t": {"m": 0.5}}, outputs=["x"])

    threads = [Thread(target=shared.of, args=(model, score)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    with pytest.raises(ZeroDivisionError):
        SharedScores(tmp_path / "x", {"data": "2"}).of(model, lambda: 1 / 0)
    SharedScores(tmp_path / "x", {"data": "2"}).of(model, score)
    apply(model, chain("nf4"))
    shared.of(model, score)
    assert len(made) == 3
