"""Studies in tests run their cells in the process of the test: starting processes takes longer than the runs."""

from __future__ import annotations

import time

import pytest

from dovetail.studies import cells, runner


def in_this_process(todo, jobs, turns):
    """Do cells one after the other, as `run_cells` does in other processes."""
    left = list(todo)
    while left:
        found = turns.take(left)
        if isinstance(found, cells.Outcome):
            yield found
        elif found is None:
            time.sleep(0.05)
        else:
            yield found.slug
            outcome = cells.Job.model_validate_json(found.model_dump_json()).done()
            turns.end(outcome)
            yield outcome


@pytest.fixture(autouse=True, scope="session")
def _cells_run_here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_cells", in_this_process)
        yield
