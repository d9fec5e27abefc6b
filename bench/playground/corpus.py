"""The texts that the playground's model is pretrained on: documents without those that a task holds out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from random import Random

from dovetail.tasks.playground import TASKS, TEXT_FIELDS, task
from dovetail.tasks.playground.generator import KINDS, PAGE


def documents(seed: int | str, held_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield pretraining documents without end, without those that contain a held-out text.

    held_out  texts as `parts` cuts them
    """
    rng = Random(f"documents {seed}")
    makers, shares = zip(*KINDS, strict=True)
    while True:
        for maker in rng.choices(makers, shares, k=1024):
            text = maker(rng)
            if not held_out or held_out.isdisjoint(parts(text)):
                yield text


def pages(seed: int | str, held_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield documents without end, of which one in eight is a page of PAGE documents."""
    rng, stream = Random(f"pages {seed}"), documents(seed, held_out)
    while True:
        yield next(stream) if rng.random() < 7 / 8 else "\n".join(islice(stream, PAGE))


def parts(text: str) -> list[str]:
    """Return the parts of a document or prompt that no other split may contain: whole, prompt, sentences, story.

    The story is all but the last sentence: a problem whose story pretraining tells with its end would be known.
    """
    prompt, mark, _ = text.partition("\nAnswer:")
    body = prompt.removeprefix("Question: ")
    story_text, _, _ = body.rpartition(". ")
    return [text, prompt + mark, f"{story_text}.", *(f"{sentence.rstrip('.')}." for sentence in body.split(". "))]


@cache
def held_out() -> frozenset[str]:
    """Return every text of every validation and test split, and their stories, which pretraining must not contain."""
    texts: set[str] = set()
    for name in TASKS:
        for split in ("validation", "test"):
            for record in task(name).split(split):
                texts.update(record[field] for field in TEXT_FIELDS if field in record)
                if "prompt" in record:
                    texts.add(parts(record["prompt"])[2])
    return frozenset(texts)
