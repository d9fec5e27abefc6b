"""The small world that the playground's texts speak of: who, what, where, and what is true of them."""

from __future__ import annotations

from typing import NamedTuple


class Animal(NamedTuple):
    """An animal and what is true of it; each field is the end of a sentence."""

    name: str
    plural: str
    home: str
    food: str
    skill: str


ANIMALS = tuple(
    Animal(*row.split("; "))
    for row in """
cow; cows; on the farm; grass; give milk
pig; pigs; on the farm; roots; dig
goat; goats; on the hill; leaves; climb
horse; horses; on the farm; hay; gallop
sheep; sheep; on the hill; grass; jump
fox; foxes; in the forest; mice; run
bear; bears; in the forest; honey; climb
owl; owls; in the forest; mice; fly
deer; deer; in the forest; leaves; jump
frog; frogs; in the pond; flies; jump
duck; ducks; in the pond; seeds; swim
crab; crabs; in the sea; worms; dig
shark; sharks; in the sea; fish; swim
whale; whales; in the sea; shrimps; sing
seal; seals; in the sea; fish; swim
camel; camels; in the desert; hay; run
snake; snakes; in the desert; mice; hide
ant; ants; on the hill; seeds; dig
cat; cats; in the house; fish; climb
dog; dogs; in the house; meat; run
mouse; mice; in the house; cheese; hide
bird; birds; in the tree; worms; fly
monkey; monkeys; in the tree; fruit; climb
bee; bees; in the tree; honey; fly
""".strip().splitlines()
)

# Person, plural, reflexive pronoun of one of them.
PEOPLE = (
    ("girl", "girls", "herself"),
    ("boy", "boys", "himself"),
    ("queen", "queens", "herself"),
    ("king", "kings", "himself"),
    ("mother", "mothers", "herself"),
    ("father", "fathers", "himself"),
    ("sister", "sisters", "herself"),
    ("brother", "brothers", "himself"),
    ("aunt", "aunts", "herself"),
    ("uncle", "uncles", "himself"),
)

ACTORS = (
    "fox", "bear", "owl", "frog", "duck", "cat", "dog", "mouse", "monkey", "bird",
    "girl", "boy", "queen", "king", "baker", "farmer", "teacher", "doctor", "painter", "sailor",
)  # fmt: skip

ITEMS = (
    "apples", "nuts", "pens", "cups", "coins", "books", "eggs", "stones", "shells", "cakes",
    "plums", "beads", "cards", "balls", "keys", "stars", "hats", "boxes", "bells", "roses",
)  # fmt: skip

# One, several, and where the sound asks for "an".
THINGS = (
    ("apple", "apples"), ("pen", "pens"), ("cup", "cups"), ("coin", "coins"), ("book", "books"), ("egg", "eggs"),
    ("stone", "stones"), ("hat", "hats"), ("box", "boxes"), ("ball", "balls"), ("key", "keys"), ("orange", "oranges"),
    ("onion", "onions"), ("bell", "bells"), ("rose", "roses"), ("umbrella", "umbrellas"),
)  # fmt: skip

COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
SIZES = ("big", "small", "old", "new", "heavy", "light")
PLACES = ("in the house", "near the river", "on the hill", "under the tree", "behind the wall", "at the market")

# Base form, third person, past.
VERBS = (
    ("run", "runs", "ran"), ("sleep", "sleeps", "slept"), ("sing", "sings", "sang"), ("play", "plays", "played"),
    ("wait", "waits", "waited"), ("walk", "walks", "walked"), ("eat", "eats", "ate"), ("sit", "sits", "sat"),
    ("jump", "jumps", "jumped"), ("work", "works", "worked"), ("dance", "dances", "danced"), ("hide", "hides", "hid"),
)  # fmt: skip

# Base form, third person: verbs that take a person as object.
SEEING = (("see", "sees"), ("hear", "hears"), ("help", "helps"), ("like", "likes"), ("know", "knows"))

# Adjective, comparative.
COMPARATIVES = (("tall", "taller"), ("small", "smaller"), ("fast", "faster"), ("slow", "slower"), ("old", "older"))

COUNTS = ("two", "three", "four", "five", "six")


def article(word: str) -> str:
    """Return the word with its indefinite article: "an egg", "a pen"."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def join(parts: list[str]) -> str:
    """Return an enumeration: "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
