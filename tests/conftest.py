"""One thread for every test and the processes that it starts: the models are tiny, and the machines shared.

Two variables are for `tests/portable.py`: DOVETAIL_TEST_THREADS is the number of threads, and DOVETAIL_TEST_WITHOUT
names a package that tests must not find, as if it were not installed.
"""

import gc
import os
from importlib.machinery import PathFinder

gc.disable()  # until everything is imported: a quarter of the time of the imports

THREADS = os.environ.get("DOVETAIL_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS  # before torch is imported

if missing := os.environ.get("DOVETAIL_TEST_WITHOUT"):
    find_spec = PathFinder.find_spec

    def find_other_spec(fullname: str, *arguments, **keywords):
        return None if fullname.split(".")[0] == missing else find_spec(fullname, *arguments, **keywords)

    PathFinder.find_spec = staticmethod(find_other_spec)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(THREADS))


def pytest_collection_finish():
    """Collect garbage from now on, and never what was imported or collected as a test."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _garbage_is_of_one_module():
    """Exempt what is left of earlier modules, and what they imported, from the collections that each Trainer forces."""
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path):
    """Leave helper modules to the tests that import them: some register links, some need other packages."""
    helper = collection_path.suffix == ".py" and not collection_path.name.startswith(("test_", "conftest"))
    return True if helper else None
