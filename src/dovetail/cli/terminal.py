"""What commands share: options, tasks by name, and how they print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dovetail.tasks.task import Task

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]


def find_task(name: str) -> Task:
    """A playground task by name, or the task of a recipe's data."""
    from dovetail.runs.recipe import Recipe
    from dovetail.tasks.find import load_task
    from dovetail.tasks.spec import Data

    is_file = name.endswith((".yaml", ".yml"))
    return load_task(Recipe.load(name).data if is_file else Data(task=name))


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(value: Any) -> None:
    """On standard output, indented."""
    print(json.dumps(value, indent=2))


def quiet() -> None:
    """Keep the bars, advice and warnings of other libraries off the terminal; call this before they are imported."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore")
