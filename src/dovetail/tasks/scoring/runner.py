"""The part that all methods share: batches of rows of similar length, and log-likelihoods of labelled tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dovetail.progress import Bar
from dovetail.tasks.tokens import IGNORED, Collator, Example, RowMaker, pad_id, vocabulary_of, wrong_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Scored = tuple[dict[str, float], list[str]]
"""What a method returns: metric -> score, and the model's output for each record as text."""


@dataclass(frozen=True)
class Runner:
    """A model, its tokenizer and how to run it: rows at a time, tokens of a row, whether to show a bar."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    batch_size: int
    max_length: int
    progress: bool

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
        self, rows: Sequence[Example], side: Literal["left", "right"] = "right"
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield row numbers and their batch on the model's device, the longest rows first."""
        collate = Collator(self.pad_id, side)
        device = next(self.model.parameters()).device
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
        with Bar(f"evaluate {self.name}", len(rows), shown=self.progress) as bar:
            for at in range(0, len(order), self.batch_size):
                chosen = order[at : at + self.batch_size]
                batch = collate([rows[row] for row in chosen])
                yield chosen, {name: tensor.to(device) for name, tensor in batch.items()}
                bar.advance(len(chosen))

    def log_likelihoods(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Return per row the sum of log-likelihoods (nats) of its labelled tokens, float64, and their number, int64."""
        sums, counts = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.int64)
        for chosen, batch in self.batches(rows):
            labels_bt = batch["labels"]
            if self.encoder_decoder:
                logits_btv = self.model(**batch).logits
            else:
                del batch["labels"]
                logits_btv = self.model(**batch, use_cache=False).logits[:, :-1]
                labels_bt = labels_bt[:, 1:]
            if logits_btv.ndim != 3:
                raise wrong_model(self.name, self.model)
            counted_bt = labels_bt != IGNORED
            likelihood_bt = torch.zeros(labels_bt.shape, dtype=torch.float64, device=labels_bt.device)
            likelihood_bt[counted_bt] = -F.cross_entropy(
                logits_btv[counted_bt].float(), labels_bt[counted_bt], reduction="none"
            ).double()
            sums[chosen], counts[chosen] = likelihood_bt.sum(1).cpu(), counted_bt.sum(1).cpu()
        return sums, counts
