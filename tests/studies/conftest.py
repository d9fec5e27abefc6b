"""Studies in tests run their cells in the process of the test: starting processes takes longer than the runs."""

from __future__ import annotations

import pytest

from dovetail.studies import runner
from small_runs import cells_in_this_process


@pytest.fixture(autouse=True, scope="session")
def _cells_run_here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_cells", cells_in_this_process)
        yield
