"""Minimal pairs: a good sentence and the same with one fault of grammar."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from dovetail.tasks.playground.words import (
    ANIMALS,
    COLORS,
    COMPARATIVES,
    COUNTS,
    PEOPLE,
    PLACES,
    SEEING,
    SIZES,
    THINGS,
    VERBS,
    article,
)

# Sheep and deer have no plural form of their own, so a wrong number would not show.
NOUNS = [(a.name, a.plural) for a in ANIMALS if a.name != a.plural] + [(one, many) for one, many, _ in PEOPLE]

LINKS = ("near", "behind", "with")


class Pair(NamedTuple):
    """Two sentences that differ in one fault."""

    good: str
    bad: str


def _either(template: str, good: str, bad: str) -> Pair:
    return Pair(template.format(good), template.format(bad))


def agreement(rng: Random) -> Pair:
    """Make a pair on the agreement of verb and subject, with other nouns between them."""
    subject, *between = rng.sample(NOUNS, rng.choice((2, 3)))
    number = rng.randrange(2)
    base, third, _ = rng.choice(VERBS)
    good, bad = (base, third) if number else (third, base)
    links = "".join(f" {rng.choice(LINKS)} the {rng.choice(noun)}" for noun in between)
    template = f"The {subject[number]}{links} {{}} {rng.choice(PLACES)}."
    return _either(template, good, bad)


def determiner(rng: Random) -> Pair:
    """Make a pair on determiners: this fox, these foxes."""
    noun, number = rng.choice(NOUNS), rng.randrange(2)
    one, many = rng.choice((("This", "These"), ("That", "Those")))
    base, third, _ = rng.choice(VERBS)
    good, bad = (many, one) if number else (one, many)
    template = f"{{}} {rng.choice(SIZES)} {noun[number]} {base if number else third} {rng.choice(PLACES)}."
    return _either(template, good, bad)


def count(rng: Random) -> Pair:
    """Make a pair on counts: three pens, one pen."""
    one, many = rng.choice(THINGS)
    owner = rng.choice(NOUNS)[0]
    place = rng.choice(PLACES)
    if rng.random() < 0.5:
        return _either(f"The {owner} has {rng.choice(COUNTS)} {rng.choice(COLORS)} {{}} {place}.", many, one)
    return _either(f"The {owner} has one {rng.choice(COLORS)} {{}} {place}.", one, many)


def indefinite(rng: Random) -> Pair:
    """Make a pair on indefinite articles: an egg, a pen."""
    thing = rng.choice(THINGS)[0]
    right = article(thing)
    wrong = f"a {thing}" if right.startswith("an ") else f"an {thing}"
    return _either(f"The {rng.choice(NOUNS)[0]} sees {{}} {rng.choice(PLACES)}.", right, wrong)


def reflexive(rng: Random) -> Pair:
    """Make a pair on reflexive pronouns: the queen helps herself, the kings help themselves."""
    one, many, own = rng.choice(PEOPLE)
    base, third = rng.choice(SEEING)
    link = f"{rng.choice(LINKS)} the {rng.choice(rng.choice(NOUNS))}"
    if rng.random() < 0.3:
        return _either(f"The {many} {link} {base} {{}}.", "themselves", own)
    other = "himself" if own == "herself" else "herself"
    return _either(f"The {one} {link} {third} {{}}.", own, other)


def order(rng: Random) -> Pair:
    """Make a pair on word order: the big red ball, not the big ball red."""
    noun = rng.choice(THINGS)[0]
    size, color, place = rng.choice(SIZES), rng.choice(COLORS), rng.choice(PLACES)
    bad = rng.choice((f"{size} {noun} {color}", f"{noun} {size} {color}", f"{color} {size} {noun}"))
    return _either(f"The {{}} is {place}.", f"{size} {color} {noun}", bad)


def tense(rng: Random) -> Pair:
    """Make a pair on tense: yesterday it ran, now it runs, tomorrow it will run."""
    noun = rng.choice(NOUNS)[0]
    base, third, past = rng.choice(VERBS)
    forms = {"Yesterday": past, "Now": third, "Tomorrow": f"will {base}"}
    when = rng.choice(list(forms))
    wrong = rng.choice([form for other, form in forms.items() if other != when])
    return _either(f"{when} the {noun} {{}} {rng.choice(PLACES)}.", forms[when], wrong)


def comparative(rng: Random) -> Pair:
    """Make a pair on comparatives: taller than, as tall as."""
    (one, _), (two, _) = rng.sample(NOUNS, 2)
    plain, more = rng.choice(COMPARATIVES)
    place = rng.choice(PLACES)
    if rng.random() < 0.5:
        return _either(f"The {one} {place} is {{}} than the {two}.", more, plain)
    return _either(f"The {one} {place} is as {{}} as the {two}.", plain, more)


PHENOMENA: tuple[Callable[[Random], Pair], ...] = (
    agreement, determiner, count, indefinite, reflexive, order, tense, comparative,
)  # fmt: skip


def minimal_pair(rng: Random) -> Pair:
    """Make a pair of one of the phenomena, all equally likely."""
    return rng.choice(PHENOMENA)(rng)
