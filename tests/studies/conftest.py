"""Studies in tests run their cells in the process of the test: starting processes takes longer than the runs."""

from __future__ import annotations

import pytest

from dovetail.studies import cells, runner


def in_this_process(todo, jobs):
    """Do cells one after the other, as `run_cells` does in other processes."""
    for job in todo:
        yield job.slug
        yield cells.Job.model_validate_json(job.model_dump_json()).done()


@pytest.fixture(autouse=True, scope="session")
def _cells_run_here():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_cells", in_this_process)
        yield
