"""Chains as text: `wanda(0.5) >> nf4 >> lora(r=16, alpha=32) >> ia3`, the same in Python, YAML and on the command line.

    chain = link (">>" link)*
    link  = name [ "(" [argument ("," argument)*] ")" ]
    argument = [name "="] value
    value = number | true | false | none | word | "text" | "[" value ("," value)* "]"

Errors point at the column. `str(chain)` prints the canonical form, which parses back to an equal chain.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

import pydantic

from dovetail.chains.link import WORDS, Chain, Link, format_value
from dovetail.chains.registry import links
from dovetail.errors import ChainError

MAX_LENGTH = 10_000
"""Characters. A chain comes from outside; reading it takes bounded time."""

MAX_DIGITS = 100

_TOKEN = re.compile(
    r"""\s*(?:(?P<op>>>|[(),=\[\]])|(?P<text>"[^"]*"|'[^']*')
    |(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w:])|(?P<word>[\w][\w:.\-]*)|(?P<end>$))""",
    re.VERBOSE,
)


def chain(text: str | Chain | Link) -> Chain:
    """Reads a chain.

    text     the notation; a chain or a link is taken as it is
    errors   ChainError with the column, what was found, the rule and the closest right name

    >>> str(chain("lora(r=16,alpha=32)>>ia3"))
    'lora(r=16, alpha=32) >> ia3'
    """
    if isinstance(text, Chain):
        return text
    if isinstance(text, Link):
        return Chain((text,))
    if len(text) > MAX_LENGTH:
        raise ChainError("chain", found=f"{len(text)} characters", rule=f"a chain has at most {MAX_LENGTH}")
    return _Parser(text).chain()


@cache
def _types(cls: type[Link]) -> dict[str, pydantic.TypeAdapter[Any]]:
    hints = get_type_hints(cls)
    return {f.name: pydantic.TypeAdapter(hints[f.name]) for f in fields(cls)}


class _Parser:
    """Recursive descent over the tokens; `at` is the column (from 0) of the token in hand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = self.stop = 0
        self.next()

    def error(self, found: str, rule: str, fix: str = "", at: int | None = None) -> ChainError:
        column = self.at if at is None else at
        line = self.text.replace("\n", " ").replace("\t", " ")
        low = max(0, column - 60)
        pointer = f"{line[low : column + 60]}\n{' ' * (column - low)}^ column {column + 1}"
        return ChainError(f"chain\n{pointer}", found=found, rule=rule, fix=fix)

    def next(self) -> None:
        match = _TOKEN.match(self.text, self.stop)
        if match is None:
            rest = self.text[self.stop :].lstrip()
            self.at = len(self.text) - len(rest)
            raise self.error(repr(rest[:1]), "a chain is made of link names, arguments in (…) and >>")
        self.kind = str(match.lastgroup)
        self.token = match.group(self.kind)
        self.at, self.stop = match.start(self.kind), match.end()

    def accept(self, token: str) -> bool:
        if self.kind == "op" and self.token == token:
            self.next()
            return True
        return False

    def expect(self, token: str, rule: str) -> None:
        if not self.accept(token):
            raise self.error(self.shown(), rule)

    def shown(self) -> str:
        return repr(self.token) if self.token else "the end"

    def chain(self) -> Chain:
        links = [self.link()]
        while self.accept(">>"):
            links.append(self.link())
        if self.kind != "end":
            raise self.error(self.shown(), "links are joined by >>")
        return Chain(tuple(links))

    def link(self) -> Link:
        at, name = self.at, self.token
        if self.kind != "word":
            raise self.error(self.shown(), "a link's name stands here", "see `dovetail methods`")
        known = links()
        if name not in known:
            raise self.error(f"unknown link {name!r}", "links: " + ", ".join(sorted(known)), _closest(name, known))
        self.next()
        cls = known[name]
        values: dict[str, Any] = {}
        if self.accept("("):
            names = [f.name for f in fields(cls)]
            while not self.accept(")"):
                self.argument(cls, names, values)
                if not self.accept(","):
                    self.expect(")", "arguments are separated by ',' and closed by ')'")
                    break
        try:
            return cls(**values)
        except ChainError as error:
            raise self.error(error.found, error.rule, error.fix, at) from None

    def argument(self, cls: type[Link], names: list[str], values: dict[str, Any]) -> None:
        at, first = self.at, self.token
        is_word = self.kind == "word"
        value = self.value()
        if is_word and self.kind == "op" and self.token == "=":
            if first not in names:
                rule = f"{cls.name} takes " + (", ".join(names) if names else "no arguments")
                raise self.error(f"unknown argument {first!r}", rule, _closest(first, names), at)
            self.next()
            name, at, value = first, self.at, self.value()
        elif len(values) < len(names):
            name = names[len(values)]
        else:
            raise self.error(
                "one argument too many", f"{cls.name} takes " + (", ".join(names) or "no arguments"), "", at
            )
        if name in values:
            raise self.error(f"{name} a second time", "an argument is given once", "", at)
        try:
            values[name] = _types(cls)[name].validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            rule = "; ".join(e["msg"][0].lower() + e["msg"][1:] for e in error.errors()[:1])
            raise self.error(f"{name}={format_value(value)}", f"{name}: {rule}", "", at) from None

    def value(self) -> Any:
        if self.accept("["):
            items = []
            while not self.accept("]"):
                if self.kind == "op" and self.token == "[":
                    raise self.error("a list in a list", "a list holds numbers, words and texts")
                items.append(self.value())
                if not self.accept(","):
                    self.expect("]", "a list is closed by ']'")
                    break
            return tuple(items)
        kind, token = self.kind, self.token
        if kind not in ("number", "word", "text"):
            raise self.error(self.shown(), "a value stands here: a number, true, false, none, a word or a list")
        if kind == "number":
            if len(token) > MAX_DIGITS or not math.isfinite(float(token)):
                raise self.error(f"{token[:20]}…", f"a number is finite and has at most {MAX_DIGITS} digits")
            self.next()
            return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
        self.next()
        if kind == "text":
            return token[1:-1]
        return WORDS.get(token.lower(), token) if token.lower() in WORDS else token


def _closest(name: str, among: Any) -> str:
    near = difflib.get_close_matches(name.lower(), list(among), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else ""
