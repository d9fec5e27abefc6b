"""The device that the tests of `tests/gpu` run on, if there is one."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter, on the CPU."""
TRITON = importlib.util.find_spec("triton") is not None
ASKED = "cpu" if INTERPRETED else os.environ.get("DOVETAIL_TEST_DEVICE")
FOUND = torch.device(ASKED) if ASKED else torch.accelerator.current_accelerator(check_available=True)
DEVICE = FOUND or torch.device("cpu")
"""CPU where there is no accelerator, whose tests are skipped then."""
