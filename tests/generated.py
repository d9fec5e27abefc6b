"""Write the generated parts of the documents: README.md's tree and table of methods, messages, reference.

`python tests/generated.py` writes them, as `make fix` does. `tests/test_docs.py` checks that they are up to date.
"""

from __future__ import annotations

import ast
import os
import re
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/dovetail"
WIDTH = 120
INDENT = 16


def rooms() -> list[str]:
    """Return the package's rooms in the order of processing, which is the import contract read from below."""
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.importlinter]")[1]
    layers = re.search(r"layers = \[(.*?)\]", contract, re.DOTALL)
    assert layers is not None
    names = [name for layer in re.findall(r'"(.+?)"', layers.group(1)) for name in layer.split(" | ")]
    return [name for name in reversed(names) if (PACKAGE / name).is_dir()]


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def modules(folder: Path) -> str:
    return " · ".join(sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__"))


def tree() -> str:
    """Return the tree of `src/dovetail`: each room, the first line of its `__init__`, its modules and folders."""
    loose = ["__init__.py", "__main__.py"]
    loose += sorted(path.name for path in PACKAGE.glob("*.py") if path.name not in loose)
    lines = ["src/dovetail/", "  " + " ".join(loose)]
    for room in rooms():
        folder = PACKAGE / room
        lines.append(f"  {room + '/':<{INDENT - 2}}{first_line(folder / '__init__.py')}")
        inside = [modules(folder)] if modules(folder) else []
        for nested in sorted({path.parent for path in folder.rglob("*.py") if path.parent != folder}):
            if modules(nested):
                inside.append(f"{nested.relative_to(folder)}/ {modules(nested)}")
        for entry in inside:
            lines += textwrap.wrap(
                entry, WIDTH, initial_indent=" " * INDENT, subsequent_indent=" " * (INDENT + 2),
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines)


def markdown_table() -> str:
    """Return the table of links as the README has it."""
    from dovetail.cli.tables import method_rows

    lines = ["| link | kind | keeps | what it does |", "|---|---|---|---|"]
    for row in method_rows():
        keeps = ", ".join(what for what in ("zeros", "grid") if row[f"keeps_{what}"]) or "–"
        lines.append(f"| `{row['notation']}` | {row['kind']} | {keeps} | {row['summary']} ({row['source']}) |")
    return "\n".join(lines)


def written(text: str) -> str:
    """Return the README with its generated parts made new."""
    text = re.sub(r"src/dovetail/\n.*?(?=\nbench/)", lambda _: tree(), text, count=1, flags=re.DOTALL)
    return re.sub(r"\| link \| kind .*?(?=\n\n)", lambda _: markdown_table(), text, count=1, flags=re.DOTALL)


def with_messages(text: str) -> str:
    """Return a page whose `text` blocks hold the errors that the `python` blocks before them raise.

    The blocks share their names and run in the current folder, whose path is left out of the messages.
    """
    from dovetail.errors import DovetailError

    names: dict[str, object] = {"__name__": "page"}

    def replaced(found: re.Match[str]) -> str:
        skipped, code, between, quoted = found.groups()
        if skipped:
            return found.group()
        try:
            exec(code, names)
        except DovetailError as error:
            if quoted is None:
                raise
            message = f"{type(error).__name__}: {error}".replace(f"{Path.cwd()}/", "")
            return f"```python\n{code}```{between}```text\n{message}\n```"
        assert quoted is None, f"raises nothing:\n{code}"
        return found.group()

    block = r"(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)```(?:(\n\n)```text\n(.*?)```)?"
    return re.sub(block, replaced, text, flags=re.DOTALL)


def extension_names() -> list[str]:
    """Return the public names of `dovetail.links` that no other page of the reference has, in their order there."""
    import dovetail.links

    names = (name for name, value in vars(dovetail.links).items() if not isinstance(value, ModuleType))
    return [f"links.{name}" for name in names if not name.startswith("_") and name not in dovetail.__all__]


def with_names(text: str) -> str:
    """Return the reference of the extension API with its list of names made new."""
    head = text.partition("\n::: ")[0]
    return head + "".join(f"\n::: dovetail.{name}\n" for name in extension_names())


PAGES = {"README.md": written, "docs/troubleshooting.md": with_messages, "docs/reference/links.md": with_names}


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for page, made in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            text = made(text)
            os.chdir(ROOT)
        (ROOT / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
