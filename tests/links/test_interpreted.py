"""Triton's kernels in Triton's interpreter: the laws of `tests/gpu/test_kernels.py`, on the CPU, in another process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from accelerators import TRITON
from places import ROOT


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_the_kernels_keep_their_laws_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when triton is imported, perhaps long ago
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu/test_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.lower(), done.stdout


def test_without_triton_or_a_gpu_no_kernel_is_imported() -> None:
    code = (
        "import sys, torch\n"
        "from dovetail.links.quantize.integer import Int\n"
        "grid = Int().quantize(torch.randn(1024, 1024))\n"
        "grid.dequantize(torch.empty(1024, 1024)); grid.product(torch.randn(1, 1024))\n"
        "assert 'triton' not in sys.modules and 'dovetail.links.quantize.kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
