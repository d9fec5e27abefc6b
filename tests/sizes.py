"""Part of `make check`: report the size of every room of src; fail where the embedded model is too large.

Lines are counted by what they hold: code (without blank lines, comments and docstrings) and docstrings.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/dovetail"
MAX_MODEL_NBYTES = 8 * 2**20


def docstring_lines(text: str) -> set[int]:
    """Return the numbers of the lines that docstrings take."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for part in body if isinstance(body, list) else []:
            if (
                isinstance(part, ast.Expr)
                and isinstance(part.value, ast.Constant)
                and isinstance(part.value.value, str)
            ):
                found |= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return found


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold a token of code; docstrings count as code here."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found


def main() -> int:
    rooms: dict[str, list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        inside = path.relative_to(PACKAGE).parts
        row = rooms.setdefault(inside[0] if len(inside) > 1 else "(root)", [0, 0, 0, 0])
        docs = docstring_lines(text)
        for place, number in enumerate((1, len(text.splitlines()), len(code_lines(text) - docs), len(docs))):
            row[place] += number
    rooms["all"] = [sum(row[place] for row in rooms.values()) for place in range(4)]
    print(f"{'room':<14}{'files':>6}{'lines':>8}{'code':>8}{'docs':>8}")
    for name, (files, lines, code, docs) in rooms.items():
        print(f"{name:<14}{files:>6}{lines:>8}{code:>8}{docs:>8}")
    nbytes = sum(p.stat().st_size for p in (PACKAGE / "tasks/playground/model").glob("*.safetensors"))
    if nbytes > MAX_MODEL_NBYTES:
        print(f"the playground's model has {nbytes} bytes; at most {MAX_MODEL_NBYTES} are allowed")
    return int(nbytes > MAX_MODEL_NBYTES)


if __name__ == "__main__":
    sys.exit(main())
