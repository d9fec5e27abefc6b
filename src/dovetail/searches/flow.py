"""A search from beginning to end: `search(recipe)`.

OUTPUT.partial/search.yaml   the recipe
OUTPUT.partial/search.db     the study, where no other storage is named (SQLite)
OUTPUT.partial/...           everything that OUTPUT will hold

Any number of processes may work on one search, on one machine or on many: they share the study. They all work on the
folder of the output too, if they see the same one; the first one that finds all trials finished writes the report, and
renames the folder.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from dovetail import processes
from dovetail.checkpoint.config import best_device
from dovetail.errors import DovetailError, OutputError, RecipeError, SearchError
from dovetail.files import check_folder, on_full_disk, only_writer, write_whole, writing
from dovetail.progress import Bar, note
from dovetail.runs.folder import PAGE, choose_output
from dovetail.runs.recipe import Recipe
from dovetail.runs.report.record import host_environment
from dovetail.runs.search_settings import ChainSettings, LayerSettings
from dovetail.runs.steps import base_now
from dovetail.searches.page import page
from dovetail.searches.report import JSON, SearchReport, Trial, best, front
from dovetail.searches.space import Preview, SearchSpace
from dovetail.searches.storage import check_url, quiet_optuna
from dovetail.searches.study import delete_study, finished, open_study, work
from dovetail.tasks.find import load_task
from dovetail.training.identity import records_identity

RECIPE, BEST, FRONT, STUDY = "search.yaml", "best.yaml", "front", "search.db"
_JOIN_SECONDS = 60
"""Time that the other processes have to put their trials back after Ctrl-C."""


def search(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    storage: str | None = None,
    workers: int = 1,
    resume: bool = True,
    progress: bool = True,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchReport:
    """Search what a recipe leaves open, and write the best candidates as recipes (`docs/search.md`).

    recipe    a Recipe with a `search` part of kind chains, its path, or a mapping with its keys
    output    the folder of the results; by default the recipe's, else runs/NAME, with a number appended if that exists.
              Its last part is the name of the study
    storage   the URL of a database; by default SQLite in the folder of the results. Every process with the same recipe,
              output and storage works on the same trials
    workers   processes on this machine, including this one; each has its share of torch's threads
    resume    continue a search that was stopped; False deletes its trials. Raises DovetailError where the search is
              finished already and resume is False; else its report is returned
    progress  show bars for long work
    on_trial  called with each trial that this process finished

    Raises a DovetailError for bad input, as early as possible; SearchError for a storage that cannot be reached, and
    for a study of another recipe. A candidate whose training diverges is a failed trial.
    """
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "search"
    recipe = Recipe.read(recipe)
    processes.refuse("search", SearchError)
    _check(workers, storage)
    output = choose_output(output or recipe.output, name)
    if done := _done(output, recipe, resume):
        _check_inputs(done, _identity(recipe), output)
        return done
    with Bar(f"check {output.name}", shown=progress):
        space = open_space(recipe)
        identity = _identity(recipe)
    partial = space.folder = output.with_name(output.name + ".partial")
    new, seen = _begin(partial, output, recipe, resume), []
    url = storage or f"sqlite:///{(partial / STUDY).absolute()}"
    try:
        with quiet_optuna(), on_full_disk(output):
            if not resume and storage is not None:
                delete_study(storage, output.name)
            with (
                open_study(url, output.name, space, identity) as study,
                Bar(f"search {output.name}", space.trainings, shown=progress) as bar,
                _more_workers(workers - 1, recipe, output.name, url, identity, partial),
            ):

                def advance(trial: Trial) -> None:
                    seen.append(trial)
                    bar.advance()
                    if on_trial is not None:
                        on_trial(trial)

                work(study, space, on_trial=advance)
                trials = finished(study, space)
            return _finish(partial, output, recipe, space, trials, identity, progress)
    except OutputError:
        raise  # the search continues once there is room
    except DovetailError:
        if new and not seen:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def preview(recipe: Recipe | str | Path | Mapping[str, Any]) -> Preview:
    """Return what a search will cost: a few training steps of its largest candidate are measured."""
    return open_space(Recipe.read(recipe)).preview()


def open_space(recipe: Recipe) -> SearchSpace:
    """Return the space of a recipe's kind of search; RecipeError for a recipe without one."""
    match recipe.search:
        case ChainSettings():
            from dovetail.searches.chains import ChainSpace

            return ChainSpace(recipe)
        case LayerSettings():
            from dovetail.searches.layers import LayerSpace

            return LayerSpace(recipe)
        case _:
            found = "no search" if recipe.search is None else f"kind {recipe.search.kind}"
            rule = "dovetail search needs a search of kind layers or chains"
            raise RecipeError("search", found=found, rule=rule, fix="set search.kind, or use `dovetail run`")


def _check(workers: int, storage: str | None) -> None:
    if workers < 1:
        raise SearchError("search", found=f"workers={workers}", rule="workers must be at least 1", fix="pass 1")
    if storage is not None:
        check_url(storage)


def _identity(recipe: Recipe) -> dict[str, str]:
    """Return what all workers and all starts must share. The weights of the base are read."""
    text, task = recipe.model_dump_json(exclude={"output"}), load_task(recipe.data)
    return {
        "recipe": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
        "data": records_identity(task.splits),
        **base_now(recipe, task),
    }


# The folder.


def _done(output: Path, recipe: Recipe, resume: bool) -> SearchReport | None:
    """Return the report of a search with this recipe that is finished; else raise where the folder is not empty."""
    if not (output / JSON).is_file() or not resume:
        check_folder(output)
        return None
    differing = Recipe.load(output / RECIPE).difference(recipe)
    if differing is not None:
        found = f"a finished search with another {differing[0]}: {str(differing[1])[:200]}"
        rule = "a finished search is not run again"
        raise RecipeError(f"output {output}", found=found, rule=rule, fix="choose another --output")
    return SearchReport.load(output)


def _check_inputs(done: SearchReport, identity: Mapping[str, str], output: Path) -> None:
    """Raise RecipeError where a finished search was made with another base or other data than there are now."""
    other = [name for name, made in done.identity.items() if identity[name] != made]
    if other:
        rule = "a finished search must have the model and the data that it was made with"
        found = f"a finished search that was made with another {' and another '.join(other)}"
        raise RecipeError(f"output {output}", found=found, rule=rule, fix="choose another --output")


def _begin(partial: Path, output: Path, recipe: Recipe, resume: bool) -> bool:
    """Create the folder to work in, or accept that of an earlier start or of another process; return whether it is new.

    Raises RecipeError where the folder belongs to another search, or to none.
    """
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    where, fix = f"output {output}", "choose another --output, or pass --no-resume to delete the unfinished search"
    if partial.is_dir() and any(partial.iterdir()) and not (partial / RECIPE).is_file():
        rule = "this name is reserved for the unfinished search"
        raise RecipeError(where, found=f"{partial.name} beside it, which is no search", rule=rule, fix=fix)
    if (partial / RECIPE).is_file():
        differing = Recipe.load(partial / RECIPE).difference(recipe)
        if differing is not None:
            found = f"{partial.name}, an unfinished search with another {differing[0]}: {str(differing[1])[:200]}"
            rule = "a search must continue with the recipe that it started with"
            raise RecipeError(where, found=found, rule=rule, fix=fix)
        return False
    with writing(output):
        partial.mkdir(parents=True, exist_ok=True)
        recipe.dump(partial / RECIPE)
    return True


def _finish(
    partial: Path, output: Path, recipe: Recipe, space: SearchSpace, trials: list[Trial],
    identity: Mapping[str, str], progress: bool,
) -> SearchReport:  # fmt: skip
    """Train the best candidates and write the report, or wait for the process that does so."""
    with Bar(f"report of {output.name}", shown=progress):
        while True:
            if done := _done(output, recipe, True):
                return done
            with ExitStack() as stack:
                try:
                    stack.enter_context(only_writer(output))
                except OutputError:
                    raise
                except DovetailError:  # another process writes it
                    time.sleep(1)
                    continue
                if (output / JSON).is_file():
                    continue
                report = _report(partial, recipe, space, trials, identity, progress)
                partial.replace(output)
                return report


def _report(
    partial: Path, recipe: Recipe, space: SearchSpace, trials: list[Trial], identity: Mapping[str, str], progress: bool
) -> SearchReport:
    """Train what the recipe asks for at the end, and write all files of the report."""
    settings, objectives = space.settings, space.objectives
    shown = front(trials, objectives)
    if not shown:
        problem = next((trial.problem for trial in trials if trial.problem), "every trial was pruned")
        rule = "a search must have a trial that is complete"
        raise SearchError(f"search {partial.stem}", found=problem[:500], rule=rule, fix="lower train.lr_scale")
    report = SearchReport(
        kind=settings.kind,
        model=recipe.model,
        sampler=settings.sampler,
        seed=recipe.seed,
        task=space.task,
        objectives=objectives,
        trials=trials,
        front=[trial.number for trial in shown],
        best=best(trials, objectives, settings.alpha).number,
        headline="",
        finish={},
        seconds=sum(trial.seconds for trial in trials),
        environment=host_environment(best_device()),
        identity=dict(identity),
    )
    report = report.model_copy(update={"finish": space.finish(partial, report, progress=progress)})
    report = report.model_copy(update={"headline": space.headline(report)})
    shutil.rmtree(partial / FRONT, ignore_errors=True)
    (partial / FRONT).mkdir()
    for trial in shown:
        report.recipe(trial).dump(partial / FRONT / f"{trial.number}.yaml")
    report.recipe(report.best).dump(partial / BEST)
    write_whole(partial / PAGE, page(report, recipe, space.sections(report)))
    report.save(partial)
    return report


# Processes.


@contextmanager
def _more_workers(
    count: int, recipe: Recipe, name: str, url: str, identity: dict[str, str], folder: Path
) -> Iterator[None]:
    """Run this many processes beside the block, and wait for them. After an error or Ctrl-C they are stopped."""
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")  # a forked process would share the state of torch's threads
    share = max(1, threads // (count + 1))
    processes: list[BaseProcess] = []
    torch.set_num_threads(share)
    try:
        for _ in range(count):
            process = context.Process(target=_begin_worker, args=(recipe, name, url, identity, share, folder))
            process.start()
            processes.append(process)
        yield
        for process in processes:
            process.join()
            if process.exitcode:
                note(f"worker process {process.pid} ended with code {process.exitcode}; its trial was repeated")
    finally:
        _stop(processes)
        torch.set_num_threads(threads)


def _stop(processes: list[BaseProcess]) -> None:
    """Ask processes to put their trials back, and end those that do not."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    deadline = time.monotonic() + _JOIN_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _begin_worker(recipe: Recipe, name: str, url: str, identity: dict[str, str], threads: int, folder: Path) -> None:
    """Work on the study until it is finished; the process has no output but notes and errors."""
    import sys
    import warnings

    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    space = open_space(recipe)
    space.folder = folder
    try:
        with quiet_optuna(), open_study(url, name, space, identity) as study:
            work(study, space)
    except KeyboardInterrupt:
        sys.exit(130)
    except DovetailError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
