"""Laws of the notation: a chain reads back as it prints, and every text is read or refused with a rule."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.chains.link import MAX_LENGTH, Chain
from dovetail.chains.notation import chain
from dovetail.chains.registry import links
from dovetail.errors import ChainError
from random_links import random_link

law = settings(derandomize=True, deadline=None, max_examples=150)
chains = st.builds(
    lambda names, seed: Chain(tuple(random_link(name, random.Random(f"{seed}{at}")) for at, name in enumerate(names))),
    st.lists(st.sampled_from(sorted(links())), min_size=1, max_size=5),
    st.integers(0, 2**32),
)
tokens = st.sampled_from(
    [*links(), ">>", "(", ")", "[", "]", ",", "=", "->", ">", "r", "bits", "4", "0.5", "-1", "1e9", "true", "none",
     "rs", '"2:4"', "'", '"', " ", "\n", "é", "50%", "int4", "awq"]
)  # fmt: skip
texts = st.one_of(st.text(max_size=60), st.lists(tokens, max_size=12).map("".join))


@law
@given(chains)
def test_chain_reads_back_as_it_prints(made: Chain) -> None:
    assert chain(str(made)) == made
    assert str(chain(str(made))) == str(made)


@law
@given(chains, st.sampled_from(["", " ", "\n  ", "\t"]))
def test_space_around_links_changes_nothing(made: Chain, space: str) -> None:
    assert chain(space + str(made).replace(" >> ", f"{space}>>{space}") + space) == made


@law
@given(texts)
def test_any_text_is_read_or_refused_with_a_rule(text: str) -> None:
    told = None
    try:
        made = chain(text)
    except ChainError as error:
        told = (error.where, error.found, error.rule)
    else:
        assert chain(str(made)) == made
    assert told is None or all(told)


@law
@given(st.sampled_from(sorted(links())), st.data())
def test_name_with_one_wrong_letter_is_refused_with_the_right_one(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:at] + "x" + name[at + 1 :]
    if wrong in links() or len(name) < 4:
        return
    with pytest.raises(ChainError) as caught:
        chain(wrong)
    assert caught.value.fix


@law
@given(chains, st.integers(1, 300))
def test_a_chain_that_can_be_made_reads_back_however_long(made: Chain, times: int) -> None:
    if len(str(made)) * times + 4 * (times - 1) > MAX_LENGTH:
        with pytest.raises(ChainError, match="characters"):
            Chain(made.links * times)
    else:
        assert chain(str(Chain(made.links * times))) == Chain(made.links * times)


@pytest.mark.parametrize("number", [800, 1601, 3000])
def test_a_text_that_prints_longer_than_it_can_be_read_is_refused(number: int) -> None:
    with pytest.raises(ChainError, match="characters"):
        chain(">>".join(["lora"] * number))


@pytest.mark.parametrize("value", [None, 5, 1.5, True, [], ["lora"], b"lora", {"chain": "lora"}, object()])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ChainError, match="a chain is text"):
        chain(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        chain("lora") >> value  # type: ignore[operator]
