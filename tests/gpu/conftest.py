"""Every test of this folder needs an accelerator: skipped, with one reason, where there is none.

DOVETAIL_TEST_DEVICE=cpu runs them on the CPU, against itself: to see that the tests are right where no GPU is at hand.
Only the tests of Triton's kernels need CUDA or, with TRITON_INTERPRET=1, nothing (`tests/links/test_interpreted.py`).
"""

import pytest

from accelerators import FOUND


@pytest.fixture(autouse=True)
def _needs_an_accelerator():
    if FOUND is None:
        pytest.skip("no accelerator")
