"""What the commands share: options, tasks by name, printing, and how they stop."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

    from dovetail.tasks.task import Task

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead of a table.")]
LayersFile = Annotated[
    Path | None,
    typer.Option("--layers", metavar="FILE", help="YAML: pattern of layers -> their chain; or a recipe with `layers`."),
]
Targets = Annotated[
    str,
    typer.Option("--targets", metavar="TARGETS", help="Layers: labels (query, value, up, ...), globs or all-linear."),
]


INTERRUPTED, PIPE_CLOSED = 130, 141
"""Exit codes after Ctrl-C, and when the reader of a pipe has gone: what a shell reports for SIGINT and SIGPIPE."""


class Commands(TyperGroup):
    """A group of commands: Ctrl-C and a closed pipe end it without a traceback; its help shows no type for a flag."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the group itself."""
        return _untyped_flags(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by name."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _untyped_flags(command.get_params(ctx))
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command and flush what it printed."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):  # Python flushes both at its exit
                os.dup2(nothing, stream.fileno())
            raise typer.Exit(PIPE_CLOSED) from None


def _untyped_flags(parameters: list[Any]) -> list[Any]:
    """Remove the type that typer shows beside a flag, `<bool>`: a flag takes no value."""
    for parameter in parameters:
        if parameter.param_type_name == "option" and parameter.is_flag:
            parameter.metavar = ""
    return parameters


@contextmanager
def resumable(command: list[str]) -> Iterator[None]:
    """On Ctrl-C, print where the work stopped and the command that resumes it, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        place = f" at {error.args[0]}" if error.args else ""  # dovetail.progress puts it there
        print(f"\nstopped{place}\nresume with: dovetail {shlex.join(command)}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def find_task(name: str) -> Task:
    """Return a playground task by name, or the task of a recipe's data."""
    from dovetail.runs.recipe import Recipe
    from dovetail.tasks.find import load_task
    from dovetail.tasks.spec import Data

    is_file = name.endswith((".yaml", ".yml"))
    return load_task(Recipe.load(name).data if is_file else Data(task=name))


def console() -> Console:
    """Return the console that tables are printed on."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with code 1
            raise BrokenPipeError

    return Piped(highlight=False)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on standard output."""
    print(json.dumps(value, indent=2))


def quiet() -> None:
    """Keep the bars, advice and warnings of other libraries off the terminal; call this before they are imported."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
