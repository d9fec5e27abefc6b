"""The commands from a file of one's own to a model in use: init, chat, push."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovetail.cli.terminal import Json, console, print_json, quiet
from dovetail.progress import Bar, note

if TYPE_CHECKING:
    from dovetail.runs.chat import Chat

_EXITS = ("/exit", "/quit")


def register(app: typer.Typer) -> None:
    """Add these commands to the program."""
    app.command(epilog="Example: dovetail init playground answers.jsonl --output recipe.yaml")(init)
    app.command(epilog='Example: dovetail chat runs/answers --system "Answer in one sentence."')(chat)
    app.command(epilog="Example: dovetail push runs/answers my-name/answers --private")(push)


def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="playground, a folder, FILE.gguf, package:NAME/FOLDER or a hub id.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="JSON Lines, JSON, CSV or Parquet; or a folder, such as with train.csv and test.csv."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.yaml"
    ),
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="Format of the data (docs/data.md). \\[default: by the columns]"),
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option("--field", metavar="FIELD=COLUMN", help="The column that holds a field, such as prompt=question."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Plan for 24GB or 80GiB. \\[default: what is free here]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at a model and a data file, and write a commented recipe that runs."""
    quiet()
    from rich.markup import escape

    from dovetail.errors import DataError
    from dovetail.runs.folder import choose_output
    from dovetail.runs.propose import propose
    from dovetail.tasks.task import HEAD_KINDS

    fields = {}
    for text in field or []:
        name, equals, column = text.partition("=")
        if not (name and equals and column):
            rule = "a field must be FIELD=COLUMN"
            raise DataError("--field", found=text, rule=rule, fix="write it as prompt=question")
        fields[name] = column
    with Bar("init", delay=1.0) as bar:
        made = propose(
            model, data, output=output, format=format, fields=fields, memory=memory,
            on_step=lambda text: bar.advance(note=text),
        )  # fmt: skip
    run = choose_output(None, data.name.split(".")[0] or "own")
    commands = [f"dovetail run {output} --output {run}"]
    commands += [f"dovetail chat {run}"] if made.kind not in HEAD_KINDS else []
    if as_json:
        print_json({"recipe": str(output), "kind": made.kind, **made.facts, "next": commands})
        return
    shown = console()
    for name, text in made.facts.items():
        shown.print(f"{name:<9} {escape(text)}", soft_wrap=True)
    shown.print(f"\nwrote [bold]{escape(str(output))}[/bold]; next:", soft_wrap=True)
    for command in commands:
        shown.print(f"  {escape(command)}", soft_wrap=True)


def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run, a model (also a packed one), or the adapter folder of a run."),
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="FOLDER", help="A saved adapter, attached to the model first.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt, for models with a chat template.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of an answer.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, metavar="T", help="Of sampling; 0 takes the most likely token always."),
    ] = 0.7,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of sampling.")] = 0,
) -> None:
    """Talk to a model in the terminal: a line is a turn. Ctrl-D or /exit ends, Ctrl-C stops an answer."""
    quiet()
    import torch

    from dovetail.checkpoint.config import best_device
    from dovetail.runs.chat import Chat
    from dovetail.runs.result import load_result

    with Bar(f"load {model}"):
        loaded, tokenizer = load_result(model, adapter=adapter)
    torch.nn.Module.to(loaded, best_device())
    talk = Chat(
        loaded, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )  # fmt: skip
    if not talk.templated:
        note("the tokenizer has no chat template: each text is continued as it stands; end a line with \\ to go on")
    _converse(talk)


def _converse(talk: Chat) -> None:
    """Answer lines of standard input until it ends or says so."""
    forgotten = 0
    while (text := _asked()) is not None:
        if not text.strip():
            continue
        try:
            answer = talk.say(text, lambda part: print(part, end="", flush=True))
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(stopped; this turn is forgotten)", file=sys.stderr)
            continue
        print(flush=True)
        if not answer.strip():
            note("the model answered with nothing")
        if talk.forgotten > forgotten:
            forgotten = talk.forgotten
            note(f"the conversation is longer than the model's context: its first {forgotten} messages are left out")


def _asked() -> str | None:
    """Return the next text; None at the end. A line that ends with a backslash continues on the next line."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives input() its history and its arrow keys)

    lines = []
    while True:
        try:
            line = input(("> " if not lines else ". ") if sys.stdin.isatty() else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        if not lines and line.strip() in _EXITS:
            return None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; created if there is none.")],
    part: Annotated[str, typer.Option("--part", metavar="PART", help="model (merged), packed or adapter.")] = "model",
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    as_json: Json = False,
) -> None:
    """Upload the result of a run to the Hugging Face hub, with its model card."""
    quiet()
    from dovetail.runs.push import push as upload

    address = upload(run, repo, part=part, private=private)
    if as_json:
        print_json({"commit": address})
    else:
        print(address)
