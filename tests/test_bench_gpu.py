"""The benchmark for GPUs runs whole at sizes that say nothing: a lent GPU's time is not spent on its faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT

pytest.importorskip("peft")
TABLES = {"kernels", "step", "peak memory", "decode", "apply", "merge", "whole"}


def test_it_runs_whole_at_a_tiny_size_and_says_what_was_not_measured(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu.py", "--tiny", "--output", str(tmp_path / "gpu.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {each["table"] for each in found["results"]} == TABLES
    assert found["not_measured"] == []
    for each in found["results"]:
        if each["table"] == "kernels":  # there is no kernel without a GPU
            assert each["ours"] is None
        else:
            assert each["ours"] > 0
        bitsandbytes = "bitsandbytes" in each["peer_name"]
        assert (each["peer"] is None) == (bitsandbytes or not each["peer_name"])
        assert (each["ratio"] is None) == (None in (each["ours"], each["peer"]))
    assert "not measured" in done.stdout


def test_without_a_gpu_its_real_sizes_are_not_measured() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "bench/gpu.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout
