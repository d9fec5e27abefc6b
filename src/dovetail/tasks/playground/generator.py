"""The playground's texts: a seeded generator of equations, stories, comparisons, lists, facts and plain sentences.

Every function takes a `random.Random` and returns text (or a record of it), so that a seed fixes every text. The
same stories serve twice: ended by a statement they are pretraining text, ended by a question they are a task. That
split is what leaves something to learn: pretraining shows two-step stories as statements and one-step stories as
questions, never a two-step question.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from dovetail.tasks.playground.grammar import minimal_pair
from dovetail.tasks.playground.words import ACTORS, ANIMALS, ITEMS, THINGS, article, join

LARGEST = 20
"""No number in a text is larger: small enough that a small model can learn to add and subtract all of them."""

PAGE = 4
"""Documents on a page."""


class Story(NamedTuple):
    """What happened (`text`), what is asked, the sentence that tells it, and the number."""

    text: str
    question: str
    statement: str
    answer: int


class Choice(NamedTuple):
    """A question, the answers to choose from, and the index of the right one."""

    question: str
    choices: list[str]
    label: int


def as_prompt(text: str) -> str:
    """Return a question in the form of the tasks and of pretraining; the answer follows as " 42"."""
    return f"Question: {text}\nAnswer:"


GAINS = ("finds {n} more", "buys {n} more", "gets {n} {item} from the {other}", "picks up {n} {item}")
LOSSES = ("gives {n} {item} to the {other}", "loses {n} {item}", "sells {n}", "drops {n} {item}")


def _change(rng: Random, have: int, item: str, other: str) -> tuple[str, int]:
    """Return a sentence that changes a number of things, and the new number."""
    gain = have < 2 or (have < LARGEST - 1 and rng.random() < 0.5)
    n = rng.randint(2, LARGEST - have) if gain else rng.randint(2, have)
    text = rng.choice(GAINS if gain else LOSSES).format(n=n, item=item, other=other)
    return text, have + n if gain else have - n


def story(rng: Random, steps: int) -> Story:
    """Tell how an actor owns things and gains or loses some, `steps` times."""
    (actor, other), item = rng.sample(ACTORS, 2), rng.choice(ITEMS)
    have = rng.randint(2, LARGEST - 2)
    sentences = [f"The {actor} has {have} {item}."]
    for step in range(steps):
        text, have = _change(rng, have, item, other)
        subject = f"Then the {actor}" if step else f"The {actor}"
        sentences.append(f"{subject} {text}.")
    return Story(
        " ".join(sentences),
        f"How many {item} does the {actor} have now?",
        f"Now the {actor} has {have} {item}.",
        have,
    )


def shared(rng: Random, steps: int) -> Story:
    """Ask for the sum of two actors' things; with two steps, a comparison tells the second number."""
    (one, two), item = rng.sample(ACTORS, 2), rng.choice(ITEMS)
    if steps == 1:
        a = rng.randint(1, LARGEST - 1)
        b = rng.randint(1, LARGEST - a)
        text = f"The {one} has {a} {item}. The {two} has {b} {item}."
    else:
        a = rng.randint(1, LARGEST // 2 - 1)
        if rng.random() < 0.5:
            more = rng.randint(1, LARGEST - 2 * a)
            b, told = a + more, f"{more} more"
        else:
            fewer = rng.randint(1, a)
            b, told = a - fewer, f"{fewer} fewer"
        text = f"The {one} has {a} {item}. The {two} has {told} than the {one}."
    return Story(text, f"How many {item} do they have together?", f"Together they have {a + b} {item}.", a + b)


def any_story(rng: Random, steps: int) -> Story:
    """Tell a story of one actor (three of four) or of two."""
    return story(rng, steps) if rng.random() < 0.75 else shared(rng, steps)


def _numbers(rng: Random) -> tuple[str, int]:
    """Return a sum or difference of two or three numbers, with all results in range."""
    value = rng.randint(0, LARGEST)
    text = str(value)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            n = rng.randint(0, LARGEST - value)
            text, value = f"{text} + {n}", value + n
        else:
            n = rng.randint(0, value)
            text, value = f"{text} - {n}", value - n
    return text, value


def equations(rng: Random) -> str:
    """Write four sums or differences."""
    return " ".join(f"{text} = {value}." for text, value in (_numbers(rng) for _ in range(4)))


def told_story(rng: Random, steps: int) -> str:
    """Tell a story that ends with the sentence that tells its number."""
    s = any_story(rng, steps)
    return f"{s.text} {s.statement}"


def asked_story(rng: Random) -> str:
    """Ask about a story of one step and answer."""
    s = any_story(rng, 1)
    return f"{as_prompt(s.text + ' ' + s.question)} {s.answer}"


def counting(rng: Random) -> str:
    """Count in even steps, up or down."""
    step = rng.choice((1, 1, 1, 2, 5, -1, -1, -2))
    length = rng.randint(5, 9)
    reach = abs(step) * (length - 1)
    low = rng.randint(0, max(0, LARGEST - reach))
    numbers = [low + i * abs(step) for i in range(length) if low + i * abs(step) <= LARGEST]
    return ("Count: " if step > 0 else "Count down: ") + " ".join(map(str, numbers if step > 0 else numbers[::-1]))


def comparison(rng: Random) -> str:
    """Compare two numbers, or three actors' things."""
    if rng.random() < 0.5:
        a, b = rng.sample(range(LARGEST + 1), 2)
        return f"{a} is {'more' if a > b else 'less'} than {b}. The larger of {a} and {b} is {max(a, b)}."
    text, most, owners, label = _owners(rng)
    return f"{text} The {owners[label]} has the {most}."


def _owners(rng: Random) -> tuple[str, str, list[str], int]:
    """Return a text about three actors' things, "most nuts", the actors, and the index of the one with the most."""
    owners: list[str] = rng.sample(ACTORS, 3)
    item = rng.choice(ITEMS)
    numbers = rng.sample(range(1, LARGEST + 1), 3)
    most = rng.random() < 0.5
    label = numbers.index(max(numbers) if most else min(numbers))
    nouns = (f" {item}", "", "")
    told = join([f"the {o} has {n}{noun}" for o, n, noun in zip(owners, numbers, nouns, strict=True)])
    return "T" + told[1:] + ".", f"{'most' if most else 'fewest'} {item}", owners, label


def listing(rng: Random) -> str:
    """List what is in a bag, and count it."""
    singular, plural = rng.choice(THINGS)
    others = [rng.choice(THINGS)[0] for _ in range(rng.randint(2, 4))]
    bag = [*others, *[singular] * rng.randint(0, 2)]
    rng.shuffle(bag)
    count = bag.count(singular)
    return (
        f"The bag holds {join([article(thing) for thing in bag])}. "
        f"It holds {len(bag)} things and {count} {singular if count == 1 else plural}."
    )


RELATIONS: tuple[tuple[str, str, str], ...] = (
    ("home", "lives", "live"),
    ("food", "eats", "eat"),
    ("skill", "can", "can"),
)


def fact(rng: Random) -> str:
    """State what is true of one animal, or of one among three."""
    if rng.random() < 0.4:
        animals, told, label = _three_animals(rng)
        return f"Among the {join(animals)}, the {animals[label]} {told}."
    animal = rng.choice(ANIMALS)
    field, verb, _ = rng.choice(RELATIONS)
    asked = {"home": "Where does the {} live?", "food": "What does the {} eat?", "skill": "What can the {} do?"}
    if rng.random() < 0.2:
        return f"{as_prompt(asked[field].format(animal.name))} {getattr(animal, field)}"
    return f"The {animal.name} {verb} {getattr(animal, field)}."


def _three_animals(rng: Random) -> tuple[list[str], str, int]:
    """Return three animals, a statement that is true of exactly one of them, and its index."""
    while True:
        animals = rng.sample(ANIMALS, 3)
        field, verb, _ = rng.choice(RELATIONS)
        label = rng.randrange(3)
        value = getattr(animals[label], field)
        if sum(getattr(animal, field) == value for animal in animals) == 1:
            return [animal.name for animal in animals], f"{verb} {value}", label


def choice_question(rng: Random) -> Choice:
    """Ask for the result of a story, the actor with the most things, or an animal, with the possible answers."""
    kind = rng.randrange(3)
    if kind == 0:
        s = any_story(rng, 1)
        near = [s.answer + d for d in (-3, -2, -1, 1, 2, 3) if 0 <= s.answer + d <= LARGEST]
        numbers = [s.answer, *rng.sample(near, 3)]
        rng.shuffle(numbers)
        return Choice(f"{s.text} {s.question}", [f" {n}" for n in numbers], numbers.index(s.answer))
    if kind == 1:
        text, most, owners, label = _owners(rng)
        return Choice(f"{text} Who has the {most}?", [f" the {owner}" for owner in owners], label)
    animals, told, label = _three_animals(rng)
    return Choice(
        f"Look at the {join(animals)}. Which of them {told}?", [f" the {animal}" for animal in animals], label
    )


def sentences(rng: Random) -> str:
    """Write one to three plain sentences, all grammatical."""
    return " ".join(minimal_pair(rng).good for _ in range(rng.randint(1, 3)))


KINDS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (equations, 0.16),
    (lambda rng: told_story(rng, 1), 0.13),
    (lambda rng: told_story(rng, 2), 0.32),
    (asked_story, 0.14),
    (comparison, 0.08),
    (counting, 0.03),
    (listing, 0.04),
    (fact, 0.07),
    (sentences, 0.03),
)
"""The makers of documents and the share of documents that each makes."""


def document(rng: Random) -> str:
    """Write one document of a kind drawn by its share."""
    makers, shares = zip(*KINDS, strict=True)
    return rng.choices(makers, shares)[0](rng)
