"""A full disk ends a run with one message that names the folder; the same command then goes on to the same result."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dovetail.compression.apply import apply
from dovetail.errors import OutputError
from dovetail.runs.flow import run
from dovetail.runs.report.record import Report
from dovetail.training.train import train
from small_models import SUMS, llama, make_tokenizer, parameters, same
from small_runs import small_recipe

SETTINGS = {"max_steps": 2, "batch_size": 8, "checkpoint_every": 1, "progress": False}


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Let every write beyond this many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """Return the parameters after a training that nothing stopped."""
    whole = apply(llama(), "lora(r=4)")
    train(whole, make_tokenizer(), SUMS, **SETTINGS)
    return parameters(whole)


@pytest.mark.parametrize("nbytes", [int(100 * 1.54**step) for step in range(14)])
def test_a_training_goes_on_after_a_full_disk(nbytes: int, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The limit meets another file each time: settings, trained parameters, optimizer, state, report."""
    folder = tmp_path / "run"
    with files_of_at_most(nbytes), pytest.raises(OutputError, match="MB are free") as full:
        train(apply(llama(), "lora(r=4)"), make_tokenizer(), SUMS, output_dir=folder, **SETTINGS)
    assert str(folder) in full.value.where
    model, started = apply(llama(), "lora(r=4)"), (folder / "settings.json").exists()
    train(model, make_tokenizer(), SUMS, output_dir=folder, resume=started, **SETTINGS)
    assert same(parameters(model), expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Report, Path]:
    """Return a recipe, the report of a run of it that nothing stopped, and the run's folder."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = small_recipe(folder)
    return recipe, run(recipe, output=folder / "run", progress=False), folder / "run"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nbytes", [1000, 20_000, 60_000])
def test_a_run_goes_on_after_a_full_disk(
    nbytes: int, whole: tuple[dict[str, Any], Report, Path], tmp_path: Path
) -> None:
    recipe, expected, folder = whole
    with files_of_at_most(nbytes), pytest.raises(OutputError, match="MB are free") as full:
        run(recipe, output=tmp_path / "run", progress=False)
    assert str(tmp_path / "run") in full.value.where
    found = run(recipe, output=tmp_path / "run", progress=False)
    assert found.merge == expected.merge
    one, other = (load_file(place / "model" / "model.safetensors") for place in (tmp_path / "run", folder))
    assert all(torch.equal(one[key], other[key]) for key in other)
