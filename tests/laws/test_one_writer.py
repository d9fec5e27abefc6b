"""An output has one writer at a time: a second run, training or study on it is refused, and changes nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dovetail.compression.apply import apply
from dovetail.errors import DovetailError
from dovetail.runs.flow import run
from dovetail.studies import runner
from dovetail.studies.runner import study
from dovetail.training.train import train
from small_models import SUMS, llama, make_tokenizer
from small_runs import cells_in_this_process, small_recipe

_HOLD = """
import sys
from pathlib import Path
from dovetail.files import only_writer

with only_writer(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(path: Path, *, kill: bool = False) -> Iterator[int]:
    """Let another process hold the lock of this output; yield its number. kill: let it die with the lock."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        if kill:
            other.kill()
            other.wait()
        yield other.pid
        other.kill()


def _run(folder: Path, output: Path) -> object:
    return run(small_recipe(folder), output=output, progress=False)


def _train(folder: Path, output: Path) -> object:
    model = apply(llama(), "lora(r=2)")
    return train(model, make_tokenizer(), SUMS, output_dir=output, max_steps=1, progress=False)


def _study(folder: Path, output: Path) -> object:
    recipe = small_recipe(folder)
    rows = [{"name": "one", "chain": recipe.pop("chain")}]
    return study({"title": "Small", "common": recipe, "rows": rows}, output=output, progress=False)


WRITERS = [_run, _train, _study]
PLACES = ["out", "new/deep/out", "a b"]


def _content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "base" not in path.parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", WRITERS)
def test_a_second_writer_is_refused(write: Callable[[Path, Path], object], place: str, tmp_path: Path) -> None:
    output = tmp_path / "there" / place
    with held(output) as holder:
        before = _content(tmp_path / "there")
        with pytest.raises(DovetailError, match=f"process {holder} on .*, which is writing to it"):
            write(tmp_path, output)
        assert _content(tmp_path / "there") == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", WRITERS)
def test_a_lock_ends_with_its_process(
    write: Callable[[Path, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_cells", cells_in_this_process)
    output = tmp_path / "out"
    with held(output, kill=True):
        write(tmp_path, output)
    assert output.is_dir()
    assert not output.with_name(".out.lock").exists()


_TAKE = """
import os, sys
from pathlib import Path
from dovetail.errors import DovetailError
from dovetail.files import only_writer

folder, taken = Path(sys.argv[1]), 0
for _ in range(500):
    try:
        with only_writer(folder / "out"):
            os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))
            (folder / "mine").unlink()
            taken += 1
    except DovetailError as error:
        assert "is writing to it" in str(error), error
print(taken)
"""


def test_of_several_writers_at_once_one_writes(tmp_path: Path) -> None:
    """Three processes take the lock as often as they can; each makes a file that only one holder at a time can make."""
    others = [subprocess.Popen([sys.executable, "-c", _TAKE, tmp_path], stdout=subprocess.PIPE) for _ in range(3)]
    taken = [int(other.communicate()[0]) for other in others]
    assert [other.returncode for other in others] == [0, 0, 0]
    assert sum(taken) > 3
    assert not list(tmp_path.iterdir())
