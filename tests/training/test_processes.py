"""Several processes train one model together: one process's losses and weights, equal bits in all, one writer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dovetail import merge, processes, run, search
from dovetail.cli.main import main
from dovetail.compression.apply import apply
from dovetail.errors import DovetailError, TrainError
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import Report
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.training.callbacks import Watch
from dovetail.training.checkpoints import last_checkpoint
from dovetail.training.train import train
from dovetail.training.trainer import BatchOrder, RankBatches
from small_models import SUMS, VALUES, bert, llama, make_tokenizer, quiet, training_killed_at
from small_runs import small_recipe

CHAIN = "wanda(0.5) >> int(bits=4, group=32) >> lora(r=2) >> remask >> regrid"
SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 6,
    "gradient_accumulation": 2,
    "lr_scale": 20,
    "evaluate_every": 3,
    "evaluate_limit": 6,
}
CALIBRATION = [{"input_ids": torch.arange(4, 16).view(2, 6)}]


def launched(number: int, work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Run the work in processes of this one; return what each returned, or the class of its error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def one(rank: int) -> None:
        os.environ |= {
            "WORLD_SIZE": str(number), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        torch.set_num_threads(1)
        torch.save(work(folder), folder / f"{rank}.pt")

    started = [context.Process(target=one, args=(rank,)) for rank in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0] * number
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(number)]


def trained(folder: Path, *, chain: str | None = CHAIN, resume: bool = False, **settings: Any) -> tuple[Any, ...]:
    """Train and merge; return losses, scores and the merged weights."""
    model = llama()
    if processes.rank():
        with torch.no_grad():
            model.lm_head.weight.mul_(2)  # as if it had calculated something else: the first process decides
    if chain is not None:
        apply(model, chain, calibration=CALIBRATION)
    output = folder / "run"
    report = train(
        model, make_tokenizer(), SUMS, calibration=CALIBRATION, output_dir=output, resume=resume and output.exists(),
        progress=False, **SETTINGS | settings,
    )  # fmt: skip
    if chain is not None:
        merge(model)
    losses = [loss for stage in report.stages for _, loss in stage.losses]
    scores = [scores for stage in report.stages for _, scores in stage.evaluations]
    return losses, scores, model.state_dict()


def close(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def same_bits(found: list[tuple[Any, ...]]) -> None:
    for other in found[1:]:
        assert other[:2] == found[0][:2]
        assert other[2].keys() == found[0][2].keys()
        assert all(torch.equal(other[2][name], value) for name, value in found[0][2].items())


@pytest.mark.parametrize(
    ("number", "chain"), [(2, CHAIN), (4, "ia3 >> nf4 >> lora(r=4, elastic=[4, 2]) >> regrid"), (2, None)]
)
def test_losses_of_one_process_and_equal_bits(number: int, chain: str | None, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = trained(alone, chain=chain)

    def work(folder: Path) -> Any:
        return trained(folder, chain=chain)

    found = launched(number, work, tmp_path)
    same_bits(found)
    close(found[0], expected)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.suffix) == ["alone", "run"]


@pytest.mark.parametrize("later", [2, 1])
def test_a_stopped_run_goes_on_in_another_number_of_processes(later: int, tmp_path: Path) -> None:
    expected = launched(2, trained, tmp_path)
    again = tmp_path / "again"
    again.mkdir()

    def stopped(folder: Path) -> Any:
        with training_killed_at(6):  # of 8, after the checkpoint of the second step
            trained(folder, checkpoint_every=2)
        return True

    assert launched(2, stopped, again) == [True, True]
    found = launched(later, lambda folder: trained(folder, resume=True, checkpoint_every=2), again)
    same_bits(found)
    if later == 2:
        same_bits([expected[0], found[0]])
    else:
        close(found[0], expected[0])


def scored(folder: Path) -> Any:
    """Score tasks of every kind; return scores and outputs."""
    said: dict[str, list[str]] = {}
    records = SUMS.split("validation")
    texts = [{"text": record["prompt"] + record["answer"]} for record in records]
    choices = [{"prompt": r["prompt"], "choices": [" two", r["answer"]], "label": 1} for r in records]
    tasks = [
        Task("sums", "generation", "exact_match", {"test": records}),
        Task("texts", "text", "perplexity", {"test": texts}),
        Task("choices", "choice", "accuracy", {"test": choices}),
    ]
    language = evaluate(llama(), make_tokenizer(), tasks, batch_size=3, in_parts=True, on_outputs=said.__setitem__)
    values = Task("values", "regression", "pearson", {"test": VALUES.split("train")[:7]})
    head = evaluate(bert(1), make_tokenizer(), values, batch_size=2, in_parts=True, on_outputs=said.__setitem__)
    return language, head, said


def test_scores_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    expected = scored(tmp_path)
    assert launched(3, scored, tmp_path) == [expected] * 3


def test_a_launcher_that_shards_or_rounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_MIXED_PRECISION", "fp16")]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(DovetailError, match=f"{name}={value}"):
                quiet(llama(), SUMS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    processes.check_launcher()


def test_an_error_in_the_first_process_ends_the_others(tmp_path: Path) -> None:
    """Also where the first one goes on after it, so that no connection breaks."""

    def broken() -> None:
        raise ValueError("no space")

    def work(folder: Path) -> Any:
        processes.start()
        try:
            processes.from_first(broken)
        except (ValueError, DovetailError) as error:
            return str(error), processes.from_first(lambda: "goes on")

    first, second = launched(2, work, tmp_path)
    assert first == ("no space", "goes on")
    assert "an error in the first process" in second[0]
    assert second[1] == "goes on"


@pytest.mark.parametrize("other", ["seed", "evaluate_every", "data"])
def test_other_settings_or_records_than_the_first_process_has_are_refused(other: str, tmp_path: Path) -> None:
    def work(folder: Path) -> Any:
        model: Any = apply(llama(), "lora(r=2)")
        number = processes.rank()
        records = SUMS.split("train")[:: -1 if other == "data" and number else 1]
        data = replace(SUMS, splits={"train": records, "validation": records})
        settings: dict[str, Any] = {"max_steps": 1, "batch_size": 2} | ({} if other == "data" else {other: number + 1})
        with pytest.raises(TrainError) as error:
            train(model, make_tokenizer(), data, progress=False, **settings)
        return str(error.value)

    found = launched(2, work, tmp_path)
    assert "other settings or records in another process" in found[0]
    assert f"another {other} than in the first process" in found[1]


def test_a_folder_that_the_first_process_refuses_is_refused_in_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/settings.json").write_text("{}")

    def work(folder: Path) -> Any:
        with pytest.raises(DovetailError) as error:
            trained(folder, chain="lora(r=2)")
        return str(error.value), processes.from_first(lambda: "goes on")

    found = launched(2, work, tmp_path)
    assert "an earlier run" in found[0][0]
    assert "an error in the first process" in found[1][0]
    assert found[0][1] == found[1][1] == "goes on"


@pytest.mark.parametrize(
    ("given", "said"),
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
     ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT")],
)  # fmt: skip
def test_half_of_a_launcher_is_refused(given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DovetailError, match=said):
        quiet(llama(), SUMS)


def test_every_row_is_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    order = BatchOrder([3, 1, 2, 5, 4, 1, 1], batch_size=3, step_rows=3, grouped=True, seed="a")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(RankBatches(order)))
    assert [len(part) for part in parts] == [3, 3]
    assert parts[0][2] == [list(order)[6]]
    assert parts[1][2] == [-1 - list(order)[6]]  # not counted
    rows = [row for part in parts for batch in part for row in batch if row >= 0]
    assert sorted(rows) == list(range(7))


def test_what_several_processes_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TrainError, match="batch_size=2 and 4 processes"):
        quiet(llama(), SUMS, batch_size=2)
    searched = small_recipe(tmp_path, chain="lora(r=4, elastic=[4, 2])", search={})
    with pytest.raises(DovetailError, match="one of several processes"):
        run(Recipe.read(searched))
    with pytest.raises(DovetailError, match="one of several processes"):
        search(searched)


def command_line(arguments: list[str], killed: bool) -> None:
    """Run in each process what `torchrun -m dovetail` runs there."""
    torch.set_num_threads(1)
    end = Watch.on_step_end

    def end_or_die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        end(self, args, state, control, **kwargs)
        if killed and state.global_step == 4 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Watch.on_step_end = end_or_die
    sys.argv = ["dovetail", *arguments]
    with suppress(SystemExit):
        main()


def test_a_killed_process_ends_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "batch_size": 4, "checkpoint_every": 2}
    recipe = Recipe.read(small_recipe(tmp_path, chain="nf4 >> lora(r=2) >> regrid", train=settings))
    recipe.dump(tmp_path / "recipe.yaml")
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    launcher = elastic_launch(  # what torchrun does, with processes that need not import everything again
        LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="a",
            max_restarts=0, start_method="fork", monitor_interval=0.1,
        ),
        command_line,
    )  # fmt: skip
    with pytest.raises(ChildFailedError, match="command_line FAILED"):  # whichever ended first
        launcher(arguments, True)
    partial = tmp_path / "run.partial"
    assert last_checkpoint(partial / "training/stage-1") == partial / "training/stage-1/checkpoint-2"
    launcher(arguments, False)
    report = Report.load(tmp_path / "run")
    assert len(report.training[0].losses) == 6
    assert report.merge is not None
    assert report.merge.exact
    assert not partial.exists()
    torch.set_num_threads(1)
    alone = run(recipe, output=tmp_path / "alone", progress=False)
    assert [loss for _, loss in report.training[0].losses] == pytest.approx(
        [loss for _, loss in alone.training[0].losses], rel=1e-5
    )
    assert [row.name for row in report.stages] == [row.name for row in alone.stages]
    assert [row.metrics for row in report.stages[:2]] == [row.metrics for row in alone.stages[:2]]  # base, quantized
