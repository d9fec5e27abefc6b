"""Several short rows in one row of `max_length` tokens, so that batches have next to no padding.

Each text keeps its own positions, which restart at 0, and attends to itself only: transformers finds the borders of the
texts where the positions restart, and masks across them (`masking_utils.find_packed_sequence_indices`), as long as no
attention mask and no cache are given. The loss is then the one of the rows apart. Models that carry a state from token
to token, or that take no positions, do not keep the texts apart; whether a model does is tried on a few rows.

Rows are put together by best fit, the longest first: each into the row with the least room that it fits into (Ding et
al. 2024, "Fewer truncations improve language modeling", section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from dovetail.errors import TrainError
from dovetail.tasks.lengths import in_evaluation
from dovetail.tasks.task import HEAD_KINDS
from dovetail.tasks.tokens import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIX = "leave packing out; group_by_length keeps padding low"
_TOKENS = 16
"""Tokens of each text that are tried."""
_LEAKED = {torch.float16: 0.03, torch.bfloat16: 0.03}
_LEAKED_FLOAT = 1e-3
"""The change of logits by packing that is rounding, as a part of the change where texts attend to those before."""


class PackedRows(Sequence[Example]):
    """Rows of several texts each, made when they are read: input_ids, labels and position_ids, lists of ints.

    rows        of one text each, with labels on tokens
    lengths     tokens of each row
    max_length  tokens of a packed row, at most
    """

    def __init__(self, rows: Sequence[Example], lengths: Sequence[int], max_length: int) -> None:
        self.rows = rows
        self.groups = best_fit(lengths, max_length)
        self.lengths = [sum(lengths[row] for row in group) for group in self.groups]

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        if isinstance(at, slice):
            return [joined([self.rows[row] for row in group]) for group in self.groups[at]]
        return joined([self.rows[row] for row in self.groups[at]])


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return groups of rows whose lengths add up to at most `room`; a longer row is a group of its own."""
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where a group has room for r more tokens
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        fitting = rooms >> length << length
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            group = by_room[left].pop()
            if not by_room[left]:
                rooms ^= 1 << left
            groups[group].append(row)
            left -= length
        else:
            group, left = len(groups), max(0, room - length)
            groups.append([row])
        if left:
            by_room.setdefault(left, []).append(group)
            rooms |= 1 << left
    return groups


def joined(rows: Sequence[Example]) -> Example:
    """Return rows as one. The first label of each is left out: nothing predicts the first token of a text."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (IGNORED, *row["labels"][1:])],
        "position_ids": [at for row in rows for at in range(len(row["input_ids"]))],
    }


def check_kind(model: PreTrainedModel, kind: str) -> None:
    """Raise TrainError for packing on an encoder-decoder, and for tasks with labels."""
    config: Any = model.config
    if kind in HEAD_KINDS or config.is_encoder_decoder:
        found = f"a {kind} task" if kind in HEAD_KINDS else "an encoder-decoder"
        rule = "packing needs a decoder-only language model, whose loss is on tokens"
        raise TrainError(f"packing on a {type(model).__name__}", found=found, rule=rule, fix=_FIX)


def check_packing(model: PreTrainedModel, kind: str, rows: Sequence[Example]) -> None:
    """Raise TrainError for a model or a kind of task with which texts in one row are not kept apart.

    rows   of the training, unpacked; the first few are run together and alone, cut to a few tokens
    """
    check_kind(model, kind)
    where = f"packing on a {type(model).__name__}"
    texts = [row["input_ids"][:_TOKENS] for row in (*rows[:3], rows[0])]
    try:
        apart, together = _changes(model, texts)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rule = "the model must take position_ids, by which texts in one row are told apart"
        raise TrainError(where, found=found, rule=rule, fix=_FIX) from None
    if not apart <= _LEAKED.get(model.dtype, _LEAKED_FLOAT) * together:
        raise TrainError(
            where,
            found=f"logits that change by {apart:.2g} on average where other texts are in the row",
            rule="texts in one row must have the logits that they have alone; recurrent and state-space layers, "
            "convolutions and attention that does not read position_ids mix them",
            fix=_FIX,
        )


@torch.no_grad()
def _changes(model: PreTrainedModel, texts: Sequence[list[int]]) -> tuple[float, float]:
    """Return the mean change of a logit between texts alone and packed, and between texts alone and run as one text."""
    tokens = [token for text in texts for token in text]
    places = [at for text in texts for at in range(len(text))]

    def logits(ids: list[int], **more: list[int]) -> Tensor:
        inputs = {name: torch.tensor([values], device=model.device) for name, values in more.items()}
        found: Any = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, **inputs)
        return found.logits[0].double()

    with in_evaluation(model):
        alone = torch.cat([logits(text, attention_mask=[1] * len(text)) for text in texts])
        packed = logits(tokens, position_ids=places)
        whole = logits(tokens, attention_mask=[1] * len(tokens))
    return float((packed - alone).abs().mean()), float((whole - alone).abs().mean())
