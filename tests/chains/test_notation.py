"""Chains as text: printing and reading agree, Python's >> gives the same, errors point at the column."""

from __future__ import annotations

import random
from typing import Any

import pytest

import dovetail
from dovetail.chains.link import MAX_LENGTH, Chain, arguments
from dovetail.chains.notation import chain
from dovetail.chains.registry import links
from dovetail.errors import ChainError, DovetailError
from random_links import random_link


@pytest.mark.parametrize("name", links())
def test_a_link_reads_back_as_it_prints(name: str) -> None:
    pick = random.Random(name)
    for _ in range(60):
        link = random_link(name, pick)
        again = chain(str(link))
        assert again.links == (link,)
        assert str(again) == str(link)
        # All arguments by name, in any order, whatever the canonical form leaves out.
        named = [f"{key}={_literal(value)}" for key, value in arguments(link).items()]
        pick.shuffle(named)
        assert chain(f"{name}({', '.join(named)})").links == (link,)
        assert chain(f"{name}({', '.join(_literal(v) for v in arguments(link).values())})").links == (link,)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def test_chain_in_python_equals_its_text() -> None:
    pick = random.Random(0)
    for _ in range(50):
        made = [random_link(pick.choice(list(links())), pick) for _ in range(pick.randint(2, 6))]
        in_python = made[0] >> made[1]
        for link in made[2:]:
            in_python = in_python >> link
        assert chain(in_python) == chain(str(in_python)) == Chain(tuple(made))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("lora", "lora(r=8)"),
        ("lora()", "lora(r=8)"),
        ("lora(16)", "lora(r=16)"),
        ("lora(16,)", "lora(r=16)"),
        ("lora( r = 16 , alpha=32 )", "lora(r=16, alpha=32)"),
        ("lora(scaling='rs')", "lora(r=8, scaling=rs)"),
        ('fp8(scale="tensor")', "fp8(scale=tensor)"),
        ("wanda", "wanda(0.5)"),
        ("wanda(sparsity=.25)", "wanda(0.25)"),
        ("wanda(5e-1)", "wanda(0.5)"),
        ("lora(alpha=none)", "lora(r=8)"),
        ("nf4(double=True)>>ia3>>\nregrid", "nf4(double=true) >> ia3 >> regrid"),
        ("lora(r=+4)", "lora(r=4)"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(chain(text)) == canonical
    assert str(chain(canonical)) == canonical


def test_python_and_text_are_the_same() -> None:
    from dovetail.links.adapt import IA3, LoRA
    from dovetail.links.constrain import Regrid, Remask
    from dovetail.links.prune import Wanda

    text = "wanda(0.5) >> lora(r=16, alpha=32) >> ia3 >> remask"
    assert Wanda(0.5) >> LoRA(16, alpha=32) >> IA3() >> Remask() == chain(text)
    assert Wanda() >> (LoRA(16, 32) >> IA3()) >> Remask() == chain(text)
    assert (LoRA() >> chain("ia3 >> regrid")).links == (LoRA(), IA3(), Regrid())
    assert str(Wanda() >> LoRA()) == "wanda(0.5) >> lora(r=8)"
    assert chain(LoRA()) == chain("lora") == dovetail.chain(chain("lora"))
    assert len(chain(text)) == 4
    assert [link.name for link in chain(text)] == ["wanda", "lora", "ia3", "remask"]
    assert [link.name for link in chain(text).adapters] == ["lora", "ia3"]


# Text, column that the error points at (from 1), words in the message.
BAD = [
    ("", 1, ["the end", "a link's name must stand here"]),
    ("   ", 4, ["the end"]),
    (">> lora", 1, ["'>>'"]),
    ("lora >>", 8, ["the end", "a link's name"]),
    ("lora >> >> ia3", 9, ["'>>'"]),
    ("lora ia3", 6, ["'ia3'", "links are joined by >>"]),
    ("lora > ia3", 6, ["'>'"]),
    ("lroa(r=8)", 1, ["unknown link 'lroa'", "did you mean lora?"]),
    ("nf4 >> qlora", 8, ["unknown link 'qlora'", "did you mean nf4 >> lora?"]),
    ("lora(rank=8)", 6, ["unknown argument 'rank'", "lora takes r, alpha, dropout, scaling"]),
    ("lora(r=8, alpa=2)", 11, ["unknown argument 'alpa'", "did you mean alpha?"]),
    ("remask(x=1)", 8, ["unknown argument 'x'", "remask takes no arguments"]),
    ("remask(1)", 8, ["one argument too many", "remask takes no arguments"]),
    ("wanda(0.5, uniform, none, row, 2)", 32, ["one argument too many", "wanda takes sparsity, allocation"]),
    ("lora(r=8, r=9)", 13, ["r a second time"]),
    ("lora(8, r=9)", 11, ["r a second time"]),
    ("lora(r=8", 9, ["the end", "closed by ')'"]),
    ("lora(r=8 alpha=2)", 10, ["'alpha'", "separated by ','"]),
    ("lora(r=)", 8, ["')'", "a value must stand here"]),
    ("lora(r=8))", 10, ["')'"]),
    ("lora(r=8.5)", 8, ["r=8.5"]),
    ("lora(r=many)", 8, ["r=many"]),
    ("lora(r=true)", 8, ["r=true"]),
    ("lora(r=none)", 8, ["r=none"]),
    ("lora(scaling=sr)", 14, ["scaling=sr", "'linear' or 'rs'"]),
    ("lora(alpha=[1, 2])", 12, ["alpha=[1, 2]"]),
    ("lora(alpha=[1, 2)", 17, ["']'"]),
    ("lora(r=0)", 1, ["r=0", "from 1 to 65536"]),
    ("ia3 >> lora(dropout=1.5)", 8, ["dropout=1.5", "[0, 1)"]),
    ("wanda(1.0)", 1, ["sparsity=1.0", "[0, 1)"]),
    ("wanda(50%)", 9, ["'%'"]),
    ("int(bits=5)", 1, ["bits=5", "2, 3, 4 or 8"]),
    ("int(group=-1)", 1, ["group=-1"]),
    ('lora(scaling="rs)', 14, ["'\"'"]),
    ("lora(r=8) # comment", 11, ["'#'"]),
    ("lora(alpha=1e999)", 12, ["alpha", "finite"]),
    ("lora(alpha=nan)", 12, ["alpha=nan"]),
    ("lora(r=" + "9" * 5000 + ")", 8, ["digits"]),
    ("lora(alpha=" + "[" * 5000, None, ["list"]),
]


@pytest.mark.parametrize(("text", "column", "words"), BAD, ids=[text[:30] for text, _, _ in BAD])
def test_errors_say_what_is_wrong_and_where(text: str, column: int | None, words: list[str]) -> None:
    with pytest.raises(ChainError) as caught:
        chain(text)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert caught.value.found
    assert caught.value.rule
    if column is not None:
        assert f"^ column {column}" in message
        _, line, pointer, *_ = message.splitlines()
        assert text.strip() == "" or pointer.index("^") <= len(line)
        if 0 < column <= len(text) <= 60:
            assert line[pointer.index("^")] == text.replace("\n", " ")[column - 1]


def test_a_very_long_text_is_refused_at_once() -> None:
    with pytest.raises(ChainError, match="1000000 characters"):
        chain("a" * 1_000_000)
    longest = " >> ".join(["ia3"] * (MAX_LENGTH // 7))
    assert len(chain(longest)) == MAX_LENGTH // 7


def test_the_pointer_stays_in_sight_in_a_long_chain() -> None:
    text = " >> ".join(["lora(r=8)"] * 40 + ["nonesuch"])
    with pytest.raises(ChainError) as caught:
        chain(text)
    _, line, pointer, *_ = str(caught.value).splitlines()
    assert line[pointer.index("^") :].startswith("nonesuch")
    assert len(line) <= 121
    assert f"column {text.index('nonesuch') + 1}" in pointer


def test_errors_are_of_one_form() -> None:
    with pytest.raises(DovetailError) as caught:
        chain("lora(r=8) >> iaa3")
    assert str(caught.value) == (
        "chain\n"
        "lora(r=8) >> iaa3\n"
        "             ^ column 14\n"
        "  found: unknown link 'iaa3'\n"
        f"  rule:  links: {', '.join(sorted(links()))}\n"
        "  fix:   did you mean ia3?"
    )


def test_an_empty_chain_cannot_be_made() -> None:
    with pytest.raises(ChainError, match="no link"):
        Chain(())
