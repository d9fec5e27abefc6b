"""The part that all methods share: batches of rows of similar length, and log-likelihoods of labelled tokens.

A row is scored in a batch as it is scored alone. The outputs of some models change with padding that the mask hides
(recurrent ones with padding on the left, XLNet), or with any other row of the batch (RWKV with its cache). Running
rows of up to three lengths alone and beside the longest row, and the shortest beside one of its own length, shows which
rows may share a batch: all, those of equal length, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail import processes
from dovetail.errors import DovetailError
from dovetail.progress import Bar, note
from dovetail.tasks.finite import check_finite, not_finite
from dovetail.tasks.rules import Scoring
from dovetail.tasks.tokens import IGNORED, Collator, Example, RowMaker
from dovetail.tasks.vocabulary import pad_id, vocabulary_of, wrong_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Scored = tuple[dict[str, float], list[str]]
"""What a method returns: metric -> score, and the model's output for each record as text."""

Side = Literal["left", "right"]
Batch = dict[str, Tensor]
Together = Literal["all", "equal", "none"]
"""Which rows may share a batch: all of them, those of equal length, or none."""


@dataclass(frozen=True)
class Runner:
    """A model, its tokenizer and how to run it: rows at a time, tokens of a row, a bar, what the task asks for.

    metric    the main one of the task
    scoring   of the task
    samples   records to which answers are generated where the scores need none
    in_parts  whether each process of this run scores a part of the batches
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    batch_size: int
    max_length: int
    progress: bool
    metric: str = ""
    scoring: Scoring = field(default_factory=Scoring)
    samples: int = 0
    in_parts: bool = False
    _together: dict[Side, Together] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def encoder_decoder(self) -> bool:
        """Whether the prompt goes to an encoder."""
        return bool(self.config.is_encoder_decoder)

    @cached_property
    def make(self) -> RowMaker:
        """What makes the rows of the model."""
        return RowMaker(self.tokenizer, self.encoder_decoder, self.max_length, vocabulary_of(self.model))

    @property
    def pad_id(self) -> int:
        """The token that fills rows."""
        return pad_id(self.tokenizer, self.make.vocabulary)

    def batches(
        self, rows: Sequence[Example], side: Side = "right", outputs: Callable[[Batch], Tensor] | None = None
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield row numbers and their batch on the model's device, the longest rows first.

        With `in_parts`, this process's share of the batches, which are those of one process. `whole` and `joined` make
        the results of all rows of what was found for these.

        side      of the padding
        outputs   batch -> (rows, ...), by which the effect of padding is found out; the logits by default
        """
        order = sorted(range(len(rows)), key=lambda row: _lengths(rows[row]), reverse=True)
        longest_first = [rows[row] for row in order]
        decide = partial(self._decide, longest_first, side, outputs or self.logits)
        # One process decides: the outputs of another processor may differ by more.
        together: Together = processes.from_first(decide) if self.in_parts else decide()
        groups = [order] if together == "all" else [[row] for row in order]
        if together == "equal":
            groups = [list(group) for _, group in groupby(order, key=lambda row: _lengths(rows[row]))]
        size = self.batch_size
        batches = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
        with Bar(f"evaluate {self.name}", len(rows), shown=self.progress) as bar:
            for number, chosen in enumerate(batches):
                if not self.in_parts or number % processes.count() == processes.rank():
                    yield chosen, self._batch([rows[row] for row in chosen], side)
                bar.advance(len(chosen))

    def whole(self, found: Tensor) -> Tensor:
        """Return the numbers of all rows; found: those of this process's rows, zero elsewhere. On the processor."""
        return processes.total(found) if self.in_parts else found

    def joined(self, found: list[str]) -> list[str]:
        """Return the texts of all rows; found: those of this process's rows, empty elsewhere."""
        if not self.in_parts:
            return found
        return ["".join(texts) for texts in zip(*processes.of_all(found), strict=True)]

    def _decide(self, rows: Sequence[Example], side: Side, outputs: Callable[[Batch], Tensor]) -> Together:
        if side not in self._together and rows:
            self._check_finite(rows[-1], side, outputs)
        return self._who_together(rows, side, outputs)

    def _batch(self, rows: Sequence[Example], side: Side) -> Batch:
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in Collator(self.pad_id, side)(rows).items()}

    @torch.no_grad()
    def _check_finite(self, row: Example, side: Side, outputs: Callable[[Batch], Tensor]) -> None:
        check_finite(f"task {self.name}", self.model, lambda: outputs(self._batch([row], side)))

    @torch.no_grad()
    def _who_together(self, rows: Sequence[Example], side: Side, outputs: Callable[[Batch], Tensor]) -> Together:
        """Return which rows may share a batch; rows are the longest first. Costs at most ten rows, once."""
        if self.batch_size == 1 or len(rows) < 2:
            return "all"
        long, short = rows[0], rows[-1]
        padded = _lengths(long) != _lengths(short)
        if side not in self._together:
            each = {_lengths(row): row for row in rows}  # one row of each length, the longest first
            some = list(each.values())[:0:-1]
            if padded and self._same(some[:: math.ceil(len(some) / 3)], long, side, outputs):
                self._together[side] = "all"
                return "all"
            ids = short["input_ids"]
            other = long["input_ids"][: len(ids)]
            alike = {**short, "input_ids": other if other != ids else ids[1:] + ids[:1]}
            self._together[side] = "equal" if self._same([short], alike, side, outputs) else "none"
            if padded or self._together[side] == "none":
                who = {"equal": "rows of equal length are scored together", "none": "rows are scored one by one"}
                said = f"the outputs of {type(self.model).__name__} for a row change with the rest of its batch"
                note(f"{self.name}: {said}; {who[self._together[side]]}", shown=self.progress)
        return self._together[side]

    def _same(self, rows: Sequence[Example], beside: Example, side: Side, outputs: Callable[[Batch], Tensor]) -> bool:
        """Return whether each of these rows has the outputs in a batch with another row that it has alone."""
        together = outputs(self._batch([*rows, beside], side))
        for row, found in zip(rows, together, strict=False):
            alone = outputs(self._batch([row], side))[0]
            length = min(len(alone), len(found))
            # Half of the dtype's digits: a batch of another shape is summed in another order.
            slack = torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max())
            if not float((found[:length] - alone[:length]).abs().max()) <= slack:
                return False
        return True

    @cached_property
    def _keeps_logits(self) -> bool:
        """Whether the model can leave out the logits of tokens that no label needs."""
        return not self.encoder_decoder and "logits_to_keep" in signature(self.model.forward).parameters

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits: (rows, tokens, vocabulary), or (rows, labels) of a head."""
        labels = batch.get("labels")
        if labels is not None and labels.ndim == 2 and self.encoder_decoder:
            return self.model(**batch).logits
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        more = {} if labels is not None and labels.ndim == 1 else {"use_cache": False}
        return self.model(**inputs, **more).logits

    def not_finite(self, run: Callable[[], object]) -> DovetailError:
        """Return the error for outputs that are not finite; `run` repeats the forward pass."""
        return not_finite(f"task {self.name}", self.model, run)

    def log_likelihoods(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return per row the sum of log-likelihoods (nats) of its labelled tokens, float64, and their number, int64.

        Raises NotFinite, which names the first module whose output is not finite.
        """
        sums, counts = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
        for chosen, batch in self.batches(rows):
            labels_bt, logits_btv = self._labels_and_logits(batch)
            counted_bt = labels_bt != IGNORED
            likelihood_bt = torch.zeros(labels_bt.shape, dtype=torch.float64, device=labels_bt.device)
            likelihood_bt[counted_bt] = -F.cross_entropy(
                logits_btv[counted_bt].float(), labels_bt[counted_bt], reduction="none"
            ).double()
            if not bool(likelihood_bt.isfinite().all()):
                raise self.not_finite(lambda batch=batch: self.logits(batch))
            sums[chosen], counts[chosen] = likelihood_bt.sum(1).cpu(), counted_bt.sum(1).cpu()
        return self.whole(sums), self.whole(counts)

    def _labels_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the labels, (rows, places), and the logits that predict them, (rows, places, vocabulary).

        The places of a causal model are the tokens before a label that counts in any row: the head of a large
        vocabulary costs more than the rest of a small model.
        """
        labels_bt, kept = batch["labels"], {}
        if not self.encoder_decoder:
            labels_bt = labels_bt[:, 1:]
            places = (labels_bt != IGNORED).any(0).nonzero()[:, 0]
            if self._keeps_logits and 0 < len(places) < labels_bt.shape[1]:
                labels_bt, kept = labels_bt[:, places], {"logits_to_keep": places}
        logits_btv = self.logits(batch | kept)
        if logits_btv.ndim != 3:
            raise wrong_model(self.name, self.model)
        return labels_bt, logits_btv[:, : labels_bt.shape[1]]


def _lengths(row: Example) -> tuple[int, int]:
    """Return the tokens of a row and of its labels."""
    labels = row.get("labels")
    return len(row["input_ids"]), len(labels) if isinstance(labels, list) else 0
