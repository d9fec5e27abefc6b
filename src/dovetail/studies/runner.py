"""Run a study: every run of its matrix once, then the tables, the cost and the curve. Finished runs are kept.

DIR/study.yaml       the study with the full recipe of every row
DIR/runs/SLUG/       a run directory each (`dovetail.run`)
DIR/merging/         whether each run is mergeable, verified once
DIR/planned/         what the configuration of each recipe determines, computed once
DIR/cost.json        the cost table, measured once
DIR/study.json       everything that the files of `dovetail.studies.output` show

Several processes may work on one study, on one machine or on many, if they share the folder and a storage: each takes
the next cell that no other one has (`dovetail.studies.claims`), and each writes the tables when all cells have ended.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from dovetail import processes
from dovetail.checkpoint.config import grid_of
from dovetail.errors import DovetailError, InUse, RecipeError
from dovetail.files import check_folder, only_writer
from dovetail.progress import note
from dovetail.runs.folder import RECIPE
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import REPORT, Report
from dovetail.runs.steps import base_now, data_of
from dovetail.studies.cells import (
    MERGING,
    PLANNED,
    RUNS,
    SHARED,
    InOrder,
    Job,
    Outcome,
    Turns,
    run_cells,
    threads_of,
)
from dovetail.studies.comparison import compare
from dovetail.studies.cost import KEPT, measure
from dovetail.studies.matrix import Line, Matrix, Run, expand, unique_runs
from dovetail.studies.measures import Cell, cell, diverged_at
from dovetail.studies.output import write_tables
from dovetail.studies.report import Cost, Event, Failure, Illegal, Result, Spread, StudyReport
from dovetail.studies.spec import Study
from dovetail.studies.summary import summary
from dovetail.studies.verify import MERGED, Judgement, check_mergeable, last_stage, precision
from dovetail.tasks.find import load_task, number_of_labels
from dovetail.training.identity import records_identity

_OTHER = "pass another --output, or --no-resume to delete all runs"

STUDY = "study.yaml"


def study(
    recipe: Study | str | Path | Mapping[str, Any],
    *,
    output: str | Path,
    storage: str | None = None,
    resume: bool = True,
    jobs: int = 1,
    progress: bool = True,
    on_run: Callable[[Event], None] | None = None,
) -> StudyReport:
    """Run the matrix of a study and write its tables (`docs/study.md`).

    recipe    a Study, its path, or a mapping with its keys
    output    folder for everything; finished runs of an earlier start are kept, an unfinished run is resumed
    storage   the URL of a database. All processes with the same storage and the same folder, which must be shared, work
              on one study: none does a run that another one does or has done, and each returns the whole report
    resume    False deletes the runs of an earlier start
    jobs      number of concurrent runs. Each is a process of its own, with one thread if there are several
    progress  whether to show progress bars
    on_run    called when a run begins and when it ends

    Raises a DovetailError for a bad study before anything runs, and for finished runs that were made with another
    recipe, other data or another base. The table lists the runs that fail later.
    """
    asked = Study.read(recipe)
    processes.refuse("study", RecipeError)
    if jobs < 1:
        raise RecipeError("study", found=f"jobs={jobs}", rule="jobs must be at least 1", fix="pass --jobs 1")
    folder = Path(output)
    work = _Work(asked, expand(asked), folder, jobs, progress, on_run)
    if storage is None:
        with only_writer(folder):
            work.begin(resume)
            failed = work.run(InOrder())
            return work.report(failed)
    from dovetail.searches.storage import check_url
    from dovetail.studies.claims import delete_claims, open_claims

    check_url(storage)
    with _waiting_for(folder):
        work.begin(resume)
        if not resume:
            delete_claims(storage, folder)
    with open_claims(storage, folder) as claims:
        failed = work.run(claims)
    with _waiting_for(folder):
        return work.report(failed)


@contextmanager
def _waiting_for(folder: Path) -> Iterator[None]:
    """Be the only writer of the folder while the block runs; wait for another process that is."""
    told = ""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_writer(folder))
                break
            except InUse as error:
                if error.found != told:
                    note(f"{folder}: waiting for {error.found}")
                told = error.found
                time.sleep(1)
        yield


class _Work:
    """What one process does for a study: it claims the folder, does the runs that are left, and writes the tables."""

    def __init__(
        self, asked: Study, matrix: Matrix, folder: Path, jobs: int, progress: bool,
        on_run: Callable[[Event], None] | None,
    ) -> None:  # fmt: skip
        self.asked, self.matrix, self.folder, self.jobs = asked, matrix, folder, jobs
        self.progress, self.on_run = progress, on_run
        self.runs = list(unique_runs(matrix.lines))

    def begin(self, resume: bool) -> None:
        """Create the folder, or accept that of an earlier start."""
        _claim(self.folder, resume)
        self.asked.dump(self.folder / STUDY)

    def run(self, turns: Turns) -> dict[str, Outcome]:
        """Do the runs that are left, and return those that failed."""
        bases = _Bases(self.folder)
        todo = [one for one in self.runs if not _finished(one, self.folder, bases)]
        shown = {one.slug for line in self.matrix.lines if line.stage is None for one in line.runs}
        cells = [
            Job(
                slug=one.slug, recipe=one.recipe, study=self.folder.absolute(), verify=one.slug in shown,
                count=one.recipe.seed == self.runs[0].recipe.seed,
                threads=threads_of(self.jobs), progress=self.progress and self.jobs == 1,
            )
            for one in todo
        ]  # fmt: skip
        failed: dict[str, Outcome] = {}
        with closing(_events(self.runs, cells, self.folder, self.jobs, failed, turns, bases)) as events:
            for event in events:
                if self.on_run is not None:
                    self.on_run(event)
        return failed

    def report(self, failed: Mapping[str, Outcome]) -> StudyReport:
        """Write the tables of all runs."""
        asked, lines, folder = self.asked, self.matrix.lines, self.folder
        results = [_result(line, folder, failed) for line in lines]
        if self.on_run is not None and asked.cost:
            total = len(self.runs)
            self.on_run(Event("measures", "storage, tuning and inference", total, total))
        report = _report(asked, lines, results, folder, _cost(asked, lines, results, folder, self.progress))
        illegal = [Illegal(row=one.row, point=one.point, why=one.why) for one in self.matrix.refused]
        report = report.model_copy(update={"illegal": illegal})
        report.save(folder)
        write_tables(report, folder)
        return report


class _Bases:
    """The bases of the runs of a study: the weights at a path must not be replaced between runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, dict[str, str]] = {}

    def read(self, run: Run) -> None:
        """Read the base of a run as it is now, unless it is known."""
        key = _base_of(run.recipe)
        if key not in self._known:
            self._known[key] = base_now(run.recipe, load_task(run.recipe.data))

    def check(self, run: Run, identity: Mapping[str, str]) -> None:
        """Raise RecipeError where a run was made with another base than the others.

        identity   of the run; the first one of a base that was not read tells what the base is
        """
        known = self._known.setdefault(_base_of(run.recipe), dict(identity))
        for part in ("model", "tokenizer"):
            if part in identity and part in known and identity[part] != known[part]:
                found = f"{run.slug}, made with another {part} than {run.recipe.model} has now"
                rule = "all runs of a study must have the same base; the files at a path must not be replaced"
                raise RecipeError(f"output {self._folder}", found=found, rule=rule, fix=_OTHER)


def _base_of(recipe: Recipe) -> str:
    """Return what the weights of a base depend on, as its path says it."""
    task = load_task(recipe.data)
    held = recipe.model_dump_json(include={"model", "dtype", "trust_remote_code"})
    return f"{held} {grid_of(recipe.chain)} {task.kind} {number_of_labels(task, recipe.data.num_labels)}"


def _claim(folder: Path, resume: bool) -> None:
    """Create the folder, or accept the folder of an earlier start."""
    if not (folder / STUDY).is_file():
        check_folder(folder)
    if not resume:
        for name in (RUNS, MERGING, SHARED, PLANNED):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / KEPT).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _finished(run: Run, folder: Path, bases: _Bases) -> bool:
    """Return whether the run is finished; raise RecipeError where it was made with another recipe, data or base."""
    place = folder / RUNS / run.slug
    if not (place / REPORT).is_file():
        return False
    try:
        differing = run.recipe.difference(Recipe.load(place / RECIPE))
        identity = Report.load(place).identity
    except DovetailError as error:
        rule = "a resumed study must have the runs of this version of Dovetail"
        found = f"{run.slug}, which cannot be read: {error.where}: {error.found}"[:500]
        raise RecipeError(f"output {folder}", found=found, rule=rule, fix=_OTHER) from None
    if differing is not None:
        key, mine, made = differing
        found = f"{run.slug}, made with {key}: {str(made)[:200]}, now {str(mine)[:200]}"
        rule = "a resumed study must have the recipes that it was started with"
        raise RecipeError(f"output {folder}", found=found, rule=rule, fix=_OTHER)
    task = load_task(run.recipe.data)
    made, now = identity.get(data_of(task)), records_identity(task.splits)
    if made not in (None, now):
        rule = "a resumed study must have the data that it was started with"
        raise RecipeError(f"output {folder}", found=f"{run.slug}, made with other data", rule=rule, fix=_OTHER)
    if identity:  # an earlier version did not write it
        bases.read(run)
        bases.check(run, identity)
    return True


def _events(
    runs: Sequence[Run], cells: Sequence[Job], folder: Path, jobs: int, failed: dict[str, Outcome], turns: Turns,
    bases: _Bases,
) -> Generator[Event, None, None]:  # fmt: skip
    """Do the cells that are left, and yield how each begins and ends; `failed` is filled."""
    number = {run.slug: place for place, run in enumerate(runs, 1)}
    named = {run.slug: run for run in runs}
    waiting = {cell.slug for cell in cells}
    seconds: list[float] = []

    def ended(slug: str, state: Literal["done", "kept"]) -> Event:
        report = Report.load(folder / RUNS / slug)
        bases.check(named[slug], report.identity)
        seconds.append(report.seconds)
        score = report.score(report.row(last_stage(report)))
        return Event(
            state, slug, number[slug], len(runs), report.task.metric, score, report.seconds, left_seconds=left()
        )

    def left() -> float | None:
        return sum(seconds) / len(seconds) * len(waiting) / jobs if seconds else None

    for one in runs:
        if one.slug not in waiting:
            yield ended(one.slug, "kept")
    with closing(run_cells(cells, jobs, turns)) as outcomes:
        for found in outcomes:
            if isinstance(found, str):
                yield Event("begins", found, number[found], len(runs), left_seconds=left())
                continue
            found.check()
            waiting.discard(found.slug)
            if found.problem:
                failed[found.slug] = found
                place = number[found.slug], len(runs)
                yield Event("failed", found.slug, *place, problem=found.problem, left_seconds=left())
            else:
                yield ended(found.slug, "done")


def _result(line: Line, folder: Path, failed: Mapping[str, Outcome]) -> Result:
    """Make a line of the table from the folders of its runs."""
    done = [one for one in line.runs if one.slug not in failed]
    reports = {one.slug: Report.load(folder / RUNS / one.slug) for one in done}
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
        stored = precision(folder / RUNS / done[0].slug, first, stage)
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
            *(
                Failure(seed=one.recipe.seed, problem=failed[one.slug].problem, kind=failed[one.slug].kind)
                for one in line.runs
                if one.slug in failed
            ),
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
            found = Report.load(folder / RUNS / one.slug)
            seconds, around = seconds + found.seconds, found.environment
    cells = [found for line, result in zip(lines, results, strict=True) for found in _cells(line, result, folder)]
    report = StudyReport(
        title=asked.title,
        task=task.name,
        metric=task.metric,
        metrics={line.task: load_task(line.runs[0].recipe.data).metric for line in lines},
        split=recipe.evaluate.split or "test",
        model=", ".join(dict.fromkeys(line.runs[0].recipe.model for line in lines)),
        seeds=list(asked.seeds),
        vary={axis: list(values) for axis, values in asked.vary.items()},
        results=results,
        cost=cost,
        compare=compare(results, asked.compared),
        seconds=seconds,
        environment=around,
        cells=cells,
    )
    return report.model_copy(update={"summary": summary(report)})


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
