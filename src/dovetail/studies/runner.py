"""Run a study: every run of its matrix once, then the tables, the cost and the curve. Finished runs are kept.

DIR/study.yaml       the study with the full recipe of every row
DIR/runs/SLUG/       a run directory each (`dovetail.run`)
DIR/merging/         whether each run is mergeable, verified once
DIR/planned/         what the configuration of each recipe determines, computed once
DIR/cost.json        the cost table, measured once
DIR/study.json       everything that the files of `dovetail.studies.output` show
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dovetail.errors import DovetailError, RecipeError
from dovetail.files import check_folder, only_writer
from dovetail.runs.flow import run
from dovetail.runs.folder import RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Report
from dovetail.runs.steps import data_of
from dovetail.studies.cost import KEPT, measure
from dovetail.studies.matrix import Line, Matrix, Run, Study, expand, unique_runs
from dovetail.studies.measures import Cell, cell, diverged_at
from dovetail.studies.output import write_tables
from dovetail.studies.report import Cost, Difference, Event, Failure, Illegal, Result, Spread, StudyReport
from dovetail.studies.verify import MERGED, Judgement, check_mergeable, last_stage, precision
from dovetail.tasks.find import load_task
from dovetail.training.identity import records_identity

_OTHER = "pass another --output, or --no-resume to delete all runs"

STUDY = "study.yaml"


def study(
    recipe: Study | str | Path | Mapping[str, Any],
    *,
    output: str | Path,
    resume: bool = True,
    jobs: int = 1,
    progress: bool = True,
    on_run: Callable[[Event], None] | None = None,
) -> StudyReport:
    """Run the matrix of a study and write its tables (`docs/study.md`).

    recipe    a Study, its path, or a mapping with its keys
    output    folder for everything; finished runs of an earlier start are kept, an unfinished run is resumed
    resume    False deletes the runs of an earlier start
    jobs      number of concurrent runs, each in its own process with one thread; 1 runs them in this process
    progress  whether to show progress bars
    on_run    called when a run begins and when it ends

    Raises a DovetailError for a bad study before anything runs. The table lists the runs that fail later.
    """
    asked = Study.read(recipe)
    if jobs < 1:
        raise RecipeError("study", found=f"jobs={jobs}", rule="jobs must be at least 1", fix="pass --jobs 1")
    matrix, folder = expand(asked), Path(output)
    with only_writer(folder):
        _claim(folder, resume)
        return _study(asked, matrix, folder, jobs, progress, on_run)


def _study(
    asked: Study, matrix: Matrix, folder: Path, jobs: int, progress: bool, on_run: Callable[[Event], None] | None
) -> StudyReport:
    """Do the runs that are left, and write the tables."""
    lines = matrix.lines
    runs = list(unique_runs(lines))
    todo = [run for run in runs if not _finished(run, folder)]
    for one in todo:  # results of an earlier run of that name
        (folder / "merging" / f"{one.slug}.json").unlink(missing_ok=True)
    asked.dump(folder / STUDY)
    failed: dict[str, str] = {}
    for event in _events(runs, todo, folder, jobs, progress):
        if event.state == "failed":
            failed[event.name] = event.problem
        if on_run is not None:
            on_run(event)
    results = [_result(line, folder, failed) for line in lines]
    if on_run is not None and asked.cost:
        on_run(Event("measures", "storage, tuning and inference", len(runs), len(runs)))
    report = _report(asked, lines, results, folder, _cost(asked, lines, results, folder, progress))
    illegal = [Illegal(row=one.row, point=one.point, why=one.why) for one in matrix.refused]
    report = report.model_copy(update={"illegal": illegal})
    report.save(folder)
    write_tables(report, folder)
    return report


def _claim(folder: Path, resume: bool) -> None:
    """Create the folder, or accept the folder of an earlier start."""
    if not (folder / STUDY).is_file():
        check_folder(folder)
    if not resume:
        for name in ("runs", "merging"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / KEPT).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _finished(run: Run, folder: Path) -> bool:
    """Return whether the run is finished; raise RecipeError where it was made with another recipe."""
    place = folder / "runs" / run.slug
    if not (place / REPORT).is_file():
        return False
    differing = run.recipe.difference(Recipe.load(place / RECIPE))
    if differing is not None:
        key, mine, made = differing
        found = f"{run.slug}, made with {key}: {str(made)[:200]}, now {str(mine)[:200]}"
        rule = "a resumed study must have the recipes that it was started with"
        raise RecipeError(f"output {folder}", found=found, rule=rule, fix=_OTHER)
    task = load_task(run.recipe.data)
    made, now = Report.load(place).identity.get(data_of(task)), records_identity(task.splits)
    if made not in (None, now):
        rule = "a resumed study must have the data that it was started with"
        raise RecipeError(f"output {folder}", found=f"{run.slug}, made with other data", rule=rule, fix=_OTHER)
    return True


def _events(runs: list[Run], todo: list[Run], folder: Path, jobs: int, progress: bool) -> Iterator[Event]:
    """Do the runs that are left, and yield how each ends."""
    total, number = len(runs), {run.slug: place for place, run in enumerate(runs, 1)}
    waiting = {run.slug for run in todo}

    def ended(slug: str, problem: str) -> Event:
        if problem:
            return Event("failed", slug, number[slug], total, problem=problem)
        report = Report.load(folder / "runs" / slug)
        score = report.score(report.row(last_stage(report)))
        state = "done" if slug in waiting else "kept"
        return Event(state, slug, number[slug], total, report.task.metric, score, report.seconds)

    for one in runs:
        if one.slug not in waiting:
            yield ended(one.slug, "")
    if jobs == 1:
        for one in todo:
            yield Event("begins", one.slug, number[one.slug], total)
            yield ended(one.slug, _run(one, folder, progress))
        return
    # Fresh processes: a forked one would share the state of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(todo)) or 1, mp_context=context, initializer=_begin_process) as pool:
        futures = {pool.submit(_run, one, folder, False): one.slug for one in todo}
        try:
            for future in as_completed(futures):
                yield ended(futures[future], _problem(future))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _problem(future: Future[str]) -> str:
    try:
        return future.result()
    except BrokenProcessPool:
        return (
            "its process or a concurrent one was killed, perhaps for lack of memory; start the study again to resume it"
        )


def _begin_process() -> None:
    """Use one thread, and silence other libraries: several processes share the terminal."""
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def _run(one: Run, folder: Path, progress: bool) -> str:
    """Do one run; return the error as text, or ""."""
    try:
        run(one.recipe, output=folder / "runs" / one.slug, progress=progress)
    except RecipeError:  # the folder holds something else than this study
        raise
    except (DovetailError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError where memory is full
        return f"{type(error).__name__}: {error}"
    return ""


def _result(line: Line, folder: Path, failed: Mapping[str, str]) -> Result:
    """Make a line of the table from the folders of its runs."""
    done = [one for one in line.runs if one.slug not in failed]
    reports = {one.slug: Report.load(folder / "runs" / one.slug) for one in done}
    tried = done if line.stage is None else []
    verdicts = [_verdict(one, folder) for one in tried]
    mergeable = None
    if verdicts and verdicts[0].mergeable is not None:
        mergeable = all(verdict.mergeable for verdict in verdicts)
    stage, stored, lossy = line.stage or "", "", None
    if done:
        first = reports[done[0].slug]
        merged = any(row.name == MERGED for row in first.stages)
        stage = line.stage or (MERGED if merged and mergeable is not False else last_stage(first))
        stored = precision(folder / "runs" / done[0].slug, first, stage)
        if merged and mergeable is False:
            lossy = Spread.of(_scores(reports, MERGED))
    stable = {slug: report for slug, report in reports.items() if not diverged_at(report, stage)}
    zeros = [1 - report.row(stage).footprint.nonzero_fraction for report in reports.values()]
    return Result(
        row=line.row,
        point=line.point,
        task=line.task,
        chain=line.runs[0].recipe.chain,
        stage=stage,
        sparsity=sum(zeros) / len(zeros) if zeros else None,
        mergeable=mergeable,
        why=next((verdict.why for verdict in verdicts if verdict.why), ""),
        precision=stored,
        figure=Spread.of(_scores(reports, stage)),
        merged_lossy=lossy,
        failed=[
            *(Failure(seed=one.recipe.seed, problem=failed[one.slug]) for one in line.runs if one.slug in failed),
            *(
                Failure(seed=one.recipe.seed, problem=f"its score at the stage {stage} is not finite")
                for one in done
                if reports[one.slug].score(reports[one.slug].row(stage)) is None
            ),
        ],
        runs=[one.slug for one in line.runs],
        stable=Spread.of(_scores(stable, stage)) if len(stable) < len(reports) else None,
    )


def _scores(reports: Mapping[str, Report], stage: str) -> list[float]:
    found = [report.score(report.row(stage)) for report in reports.values()]
    return [math.inf if value is None else value for value in found]


def _cost(asked: Study, lines: list[Line], results: list[Result], folder: Path, progress: bool) -> list[Cost]:
    """Return the cost table of the rows under `cost`, with the first seed; only a new run is measured again."""
    chosen = [
        (line, result.mergeable is True)
        for line, result in zip(lines, results, strict=True)
        if line.row in asked.cost and line.stage is None and not result.failed
    ]
    return measure(chosen, folder, progress=progress)


def _report(
    asked: Study, lines: list[Line], results: list[Result], folder: Path, cost: list[Cost]
) -> StudyReport:  # fmt: skip
    recipe = lines[0].runs[0].recipe
    task = load_task(recipe.data)
    seconds, around = 0.0, {}
    for one in unique_runs(lines):
        with suppress(DovetailError):  # a failed run has no report
            found = Report.load(folder / "runs" / one.slug)
            seconds, around = seconds + found.seconds, found.environment
    return StudyReport(
        title=asked.title,
        task=task.name,
        metric=task.metric,
        split=recipe.evaluate.split or "test",
        model=", ".join(dict.fromkeys(line.runs[0].recipe.model for line in lines)),
        seeds=list(asked.seeds),
        vary={axis: list(values) for axis, values in asked.vary.items()},
        results=results,
        cost=cost,
        compare=_differences(asked, results),
        seconds=seconds,
        environment=around,
        cells=[found for line, result in zip(lines, results, strict=True) for found in _cells(line, result, folder)],
    )


def _cells(line: Line, result: Result, folder: Path) -> list[Cell]:
    """Return the measures of the runs of a line that ended."""
    cells = []
    for one in line.runs:
        if (folder / "runs" / one.slug / REPORT).is_file():
            mergeable = None if line.stage else _verdict(one, folder).mergeable
            cells.append(cell(line, one, result.stage, folder, mergeable))
    return cells


def _verdict(one: Run, folder: Path) -> Judgement:
    return check_mergeable(folder / "runs" / one.slug, folder / "merging" / f"{one.slug}.json")


def _differences(asked: Study, results: list[Result]) -> list[Difference]:
    """Return row minus row, point by point, with paired seeds, where all runs have a score."""
    found = []
    for first, second in asked.compared:
        for ours, theirs in product(results, results):
            same = all(ours.point.get(axis, value) == value for axis, value in theirs.point.items())
            a, b = ours.figure, theirs.figure
            scored = a.n == b.n > 0 and not ours.failed and not theirs.failed
            if (ours.row, theirs.row) == (first, second) and same and scored:
                figure = Spread.of([x - y for x, y in zip(a.values, b.values, strict=True)])
                found.append(Difference(row=first, minus=second, point=ours.point | theirs.point, figure=figure))
    return found
