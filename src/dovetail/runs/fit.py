"""Whether a training fits a GPU, and the cheapest change with which it does, each verified by the same prediction.

From cheap to dear: a smaller batch (with gradient accumulation the training is the same), gradient checkpointing
(slower), `regrid(start=codes)` (no full-precision copy of the weights), a quantizer of 4 bits. Each is tried alone,
then all so far together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dovetail.chains.link import Chain, Link, Quantizer, arguments
from dovetail.chains.notation import chain
from dovetail.display.format import size
from dovetail.errors import DovetailError

_UNITS = {"": 0, "k": 3, "m": 6, "g": 9, "t": 12}


def parse_size(text: str | int) -> int:
    """Return a number of bytes: 24GB is 24 · 10^9, 80GiB is 80 · 2^30, a number without a unit is bytes.

    errors  DovetailError for anything else, and for less than one byte

    >>> parse_size("24GB"), parse_size("0.5 MiB")
    (24000000000, 524288)
    """
    found = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    power = 0 if found is None else _UNITS[found[2]]
    unit = 10**power if found is None or not found[3] else 2 ** (power // 3 * 10)
    nbytes = 0 if found is None else int(float(found[1]) * unit)
    if nbytes < 1:
        rule = "the memory of a GPU is a number with a unit, decimal (GB) or binary (GiB)"
        raise DovetailError("gpu", found=str(text)[:60], rule=rule, fix="write it as 24GB or 80GiB")
    return nbytes


@dataclass(frozen=True)
class Setting:
    """What a change may touch of a planned training."""

    chain: str
    batch_size: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Change:
    """A setting that was tried.

    said    what changes, in words
    peak    predicted bytes
    """

    said: str
    setting: Setting
    peak: int


def cheapest_change(
    setting: Setting,
    gpu_nbytes: int,
    predict: Callable[[Setting], int | None],
    *,
    peak: int,
    fixed: int,
    checkpointing: bool,
    rewrite: bool,
) -> str:
    """Return the cheapest change with which a training fits, in words, or what was tried in vain.

    predict        the peak of a setting in bytes, which takes seconds; None where it is not legal
    peak, fixed    of the setting itself: the peak in bytes, and the part of it that no batch changes
    checkpointing  whether the model supports gradient checkpointing
    rewrite        whether the chain may be changed
    """
    least: Change | None = None
    for said, changed in _changes(setting, checkpointing, rewrite):
        batches_alone = changed == replace(setting, batch_size=1)
        known = {setting.batch_size: peak} if batches_alone else {}
        if not batches_alone:
            alone = predict(changed)
            if alone is None:
                continue
            known[changed.batch_size] = alone
        if changed.batch_size == 1:
            _verify_halves(changed, setting.batch_size, gpu_nbytes, predict, known, fixed)
        fitting = [rows for rows, nbytes in known.items() if nbytes <= gpu_nbytes]
        rows = max(fitting, default=min(known))
        found = Change(
            said.replace("batch_size=1", f"batch_size={rows}"), replace(changed, batch_size=rows), known[rows]
        )
        if fitting:
            return _in_words(setting, found)
        if least is None or found.peak < least.peak:
            least = found
    if least is None:
        return "no smaller setting is possible: take a smaller model"
    return f"it does not fit with {least.said} either ({size(least.peak)}): take a smaller model or shorter rows"


def _verify_halves(
    setting: Setting,
    planned: int,
    gpu_nbytes: int,
    predict: Callable[[Setting], int | None],
    known: dict[int, int],
    fixed: int,
) -> None:
    """Add to `known`, batch size -> peak, the largest half of the planned batch that fits; the smallest if none does.

    A peak grows with the batch by a line, so that two known ones tell which half to verify; the fixed part stands for
    the second one where only one is known.
    """
    halves = [planned >> shift for shift in range(1, planned.bit_length())]

    def estimate(rows: int) -> float:
        nearest = sorted(known.items(), key=lambda item: abs(item[0] - rows))[:2]
        (first, low), (second, high) = [*nearest, (0, fixed)][:2]
        return low + (high - low) * (rows - first) / (second - first)

    while True:
        enough = max((rows for rows, nbytes in known.items() if nbytes <= gpu_nbytes), default=0)
        larger = [rows for rows in halves if rows > enough and rows not in known and estimate(rows) <= gpu_nbytes]
        if not larger and not enough and min(known) > 1:
            larger = [1]
        if not larger:
            return
        nbytes = predict(replace(setting, batch_size=larger[0]))
        known[larger[0]] = gpu_nbytes + 1 if nbytes is None else nbytes


def _in_words(setting: Setting, change: Change) -> str:
    rows = change.setting.batch_size
    same = f" (and gradient_accumulation={-(-setting.batch_size // rows)})" if rows < setting.batch_size else ""
    return f"it fits with {change.said}{same}: {size(change.peak)}"


def _changes(setting: Setting, checkpointing: bool, rewrite: bool) -> Iterator[tuple[str, Setting]]:
    """Yield what to try, from cheap to dear: each change alone, then all so far together."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if setting.batch_size > 1:
        steps.append(("batch_size=1", {"batch_size": 1}))
    if checkpointing and not setting.gradient_checkpointing:
        steps.append(("gradient_checkpointing", {"gradient_checkpointing": True}))
    text = setting.chain
    for rewritten in (_from_codes(text), _four_bits(text), _four_bits(_from_codes(text))) if rewrite else ():
        if rewritten not in (text, *(step[1].get("chain") for step in steps)):
            steps.append((rewritten, {"chain": rewritten}))
    together: dict[str, Any] = {}
    for number, (said, changes) in enumerate(steps):
        together |= changes
        yield said, replace(setting, **changes)
        if number > 0:
            names = [name for name, made in steps[: number + 1] if "chain" not in made]
            names += [together["chain"]] if "chain" in together else []
            yield " and ".join(names), replace(setting, **together)


def _from_codes(text: str) -> str:
    """Return the chain whose regrid starts from the codes."""
    return _mapped(text, lambda link: replace(link, start="codes") if arguments(link).get("start") else link)


def _four_bits(text: str) -> str:
    """Return the chain with a quantizer of 4 bits: its own at 4 bits, nf4 for fp8, nf4 before the adapters for none."""
    links = list(chain(text))
    if any(isinstance(link, Quantizer) for link in links):
        nf4 = chain("nf4").links[0]

        def at_four(link: Link) -> Link:
            bits = arguments(link).get("bits")
            if link.name == "fp8":
                return nf4
            return replace(link, bits=4) if isinstance(bits, int) and bits > 4 else link

        return _mapped(text, at_four)
    first = next((place for place, link in enumerate(links) if link.kind == "adapter"), len(links))
    return str(Chain((*links[:first], *chain("nf4").links, *links[first:])))


def _mapped(text: str, change: Callable[[Any], Link]) -> str:
    return str(Chain(tuple(change(link) for link in chain(text))))
