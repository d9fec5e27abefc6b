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
from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any, get_type_hints

import pydantic

from dovetail.chains.link import WORDS, Chain, Link, argument_fields, check_length, format_value
from dovetail.chains.registry import links
from dovetail.errors import ChainError

MAX_DIGITS = 100

_TOKEN = re.compile(
    r"""\s*(?:(?P<op>>>|[(),=\[\]])|(?P<text>"[^"]*"|'[^']*')
    |(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w:])|(?P<word>[\w][\w:.\-]*)|(?P<end>$))""",
    re.VERBOSE,
)


def chain(text: str | Chain | Link) -> Chain:
    """Read a chain from its notation.

    text     the notation; a chain or a link is returned unchanged
    errors   ChainError with the column, what was found, the rule and the closest right name

    >>> str(chain("lora(r=16,alpha=32)>>ia3"))
    'lora(r=16, alpha=32) >> ia3'
    """
    if isinstance(text, Chain):
        return text
    if isinstance(text, Link):
        return Chain((text,))
    if not isinstance(text, str):
        rule, fix = "a chain is text, a Chain or a link", 'write it as text, such as "nf4 >> lora(r=16) >> regrid"'
        raise ChainError("chain", found=f"{type(text).__name__}: {text!r:.60}", rule=rule, fix=fix)
    check_length(text)
    return _Parser(text).chain()


@cache
def _types(cls: type[Link]) -> dict[str, pydantic.TypeAdapter[Any]]:
    hints = get_type_hints(cls)
    return {name: pydantic.TypeAdapter(hints[f.name]) for name, f in argument_fields(cls).items()}


class _Parser:
    """Recursive descent over the tokens; `at` is the column (from 0) of the token in hand."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = self.stop = 0
        self.next()

    def error(self, found: str, rule: str, fix: str, at: int | None = None) -> ChainError:
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
            rule = "a chain is made of link names, arguments in (…) and >>"
            raise self.error(repr(rest[:1]), rule, self.instead_of(rest[0]))
        self.kind = str(match.lastgroup)
        self.token = match.group(self.kind)
        self.at, self.stop = match.start(self.kind), match.end()

    def instead_of(self, character: str) -> str:
        """Return the fix for a character that is not part of the notation."""
        if character == "%" and self.kind == "number" and len(self.token) <= MAX_DIGITS:
            return f"write {float(self.token) / 100:g} for {self.token}%"
        if character in "-|+>&/<":
            return "write >> between two links"
        if character in "\"'":
            return "close the text with the same quotation mark"
        return "write ',' between two arguments" if character in ";:" else f"remove {character!r}"

    def accept(self, token: str) -> bool:
        if self.kind == "op" and self.token == token:
            self.next()
            return True
        return False

    def expect(self, token: str, rule: str) -> None:
        if not self.accept(token):
            fix = f"add '{token}'" if self.kind == "end" else f"write ',' or '{token}' before {self.shown()}"
            raise self.error(self.shown(), rule, fix)

    def shown(self) -> str:
        return repr(self.token) if self.token else "the end"

    def chain(self) -> Chain:
        links = [self.link()]
        while self.accept(">>"):
            links.append(self.link())
        if self.kind != "end":
            fix = f"write >> before {self.shown()}" if self.kind == "word" else f"remove {self.shown()}"
            if self.token in "[(":
                fix = f"write the arguments in parentheses, once: {links[-1].name}(…)"
            raise self.error(self.shown(), "links are joined by >>", fix)
        return Chain(tuple(links))

    def link(self) -> Link:
        at, name = self.at, self.token
        if self.kind != "word":
            fix = "add a link, or remove the last >>" if self.kind == "end" else f"write a link before {self.shown()}"
            if not self.text.strip():
                fix = "write a link: lora(r=16)"
            rule = "a link's name must stand here; `dovetail methods` lists them"
            raise self.error(self.shown(), rule, fix)
        known = links()
        if name not in known:
            raise self.error(f"unknown link {name!r}", "links: " + ", ".join(sorted(known)), _suggested(name, known))
        self.next()
        cls = known[name]
        values: dict[str, Any] = {}
        if self.accept("("):
            names = list(argument_fields(cls))
            while not self.accept(")"):
                self.argument(cls, names, values)
                if not self.accept(","):
                    self.expect(")", "arguments are separated by ',' and closed by ')'")
                    break
        try:
            return cls(**{argument_fields(cls)[name].name: value for name, value in values.items()})
        except ChainError as error:
            raise self.error(error.found, error.rule, error.fix or _default(cls, list(values)[:1]), at) from None

    def argument(self, cls: type[Link], names: list[str], values: dict[str, Any]) -> None:
        at, first = self.at, self.token
        is_word = self.kind == "word"
        value = self.value()
        if is_word and self.kind == "op" and self.token == "=":
            if first not in names:
                rule = f"{cls.name} takes " + (", ".join(names) or "no arguments")
                fix = _closest(first, names) or (f"use one of {', '.join(names)}" if names else f"write {cls.name}")
                raise self.error(f"unknown argument {first!r}", rule, fix, at)
            self.next()
            name, at, value = first, self.at, self.value()
        elif len(values) < len(names):
            name = names[len(values)]
        else:
            rule = f"{cls.name} takes " + (", ".join(names) or "no arguments")
            raise self.error("one argument too many", rule, "remove it", at)
        if name in values:
            raise self.error(f"{name} a second time", "an argument is given once", f"remove one {name}", at)
        try:
            values[name] = _types(cls)[name].validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            rule = "; ".join(e["msg"][0].lower() + e["msg"][1:] for e in error.errors()[:1])
            raise self.error(f"{name}={format_value(value)}", f"{name}: {rule}", _default(cls, [name]), at) from None

    def value(self) -> Any:
        if self.accept("["):
            items = []
            while not self.accept("]"):
                if self.kind == "op" and self.token == "[":
                    raise self.error("a list in a list", "a list holds numbers, words and texts", "write one list")
                items.append(self.value())
                if not self.accept(","):
                    self.expect("]", "a list is closed by ']'")
                    break
            return tuple(items)
        kind, token = self.kind, self.token
        if kind not in ("number", "word", "text"):
            rule = "a value must stand here: a number, true, false, none, a word or a list"
            fix = "add the value and ')'" if self.kind == "end" else f"add a value before {self.shown()}"
            raise self.error(self.shown(), rule, fix)
        if kind == "number":
            if len(token) > MAX_DIGITS or not math.isfinite(float(token)):
                rule = f"a number is finite and has at most {MAX_DIGITS} digits"
                raise self.error(f"{token[:20]}…", rule, "write a shorter number")
            self.next()
            return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
        self.next()
        return token[1:-1] if kind == "text" else WORDS.get(token.lower(), token)


_ALIASES = {
    "qlora": "nf4 >> lora", "nf": "nf4", "bnb": "nf4", "bitsandbytes": "nf4", "fp": "fp8", "rtn": "int(bits=4)",
    "awq": "gptq(bits=4)", "hqq": "int(bits=4)", "quantize": "int(bits=4)", "quant": "int(bits=4)",
    "prune": "wanda(0.5)", "sparse": "wanda(0.5)", "obs": "sparsegpt(0.5)", "rslora": "lora(scaling=rs)",
    "sparsepeft": "lora >> remask", "sqft": "lora >> remask >> regrid", "adapter": "bottleneck", "mask": "remask",
    "grid": "regrid",
}  # fmt: skip
"""Names of other libraries and papers -> the nearest links here."""


def _suggested(name: str, known: Mapping[str, type[Link]]) -> str:
    """Return the fix for an unknown link: the links nearest in meaning, or else in spelling."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    with_bits = re.fullmatch(r"(int|w|q|gptq|rtn|awq|hqq)(\d+)(?:bit|bits|a16)?", plain)
    if with_bits and (with_bits[2] in ("2", "3", "4", "8")) and {"int", "gptq"} <= known.keys():
        return f"did you mean {'gptq' if with_bits[1] in ('gptq', 'awq') else 'int'}(bits={with_bits[2]})?"
    if plain in _ALIASES:
        return f"did you mean {_ALIASES[plain]}?"
    return _closest(name, known) or "use one of them; `dovetail methods` describes each"


def _default(cls: type[Link], names: list[str]) -> str:
    """Return the fix for an argument that is out of its range or of another type."""
    for name, field in argument_fields(cls).items():
        if name in names and field.default is not MISSING:
            return f"write {name}={format_value(field.default)}, its default, or another value by the rule"
    return f"see the arguments of {cls.name} in `dovetail methods`"


def _closest(name: str, among: Any) -> str:
    near = difflib.get_close_matches(name.lower(), list(among), n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else ""
