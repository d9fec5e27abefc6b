"""From a task's records to batches of tokens.

The loss falls on what is to be learned: labels are -100 (the models' mark for "not counted") on the prompt and on
padding. Prompt and answer are tokenised apart and joined without special tokens in between, so that what is trained
is what a greedy continuation of the prompt later produces. Tokens at the start follow the tokenizer: if it begins
texts with a token, prompts begin with it. A text without a prompt begins with that token or else with the begin or
end token, so that its first token is predicted from something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dovetail.errors import DataError
from dovetail.tasks.task import HEAD_KINDS, Record, check_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
"""One row before padding: input_ids, and where there is a loss labels, lists of ints; or a label, int or float."""

IGNORED = -100
"""The label of a token that the loss and the scores leave out."""


def encode(
    kind: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool, max_length: int
) -> list[Example]:
    """Return the training examples of records of one kind, in their order; a long text makes several.

    kind              a key of `dovetail.tasks.FIELDS`
    encoder_decoder   prompt to the encoder, answer to the decoder; otherwise one after the other
    max_length        tokens of a row. A prompt loses its beginning, an answer nothing; a text goes on in the next row
    returns           rows of input_ids and labels (lists), or of the tokenizer's fields and labels (int or float)

    Raises DataError that names the record, for an answer or sentence that does not fit.
    """
    make = RowMaker(tokenizer, encoder_decoder, max_length)
    if kind in HEAD_KINDS:
        return make.labels(records, float if kind == "regression" else int)
    if kind == "text":
        return make.texts([record["text"] for record in records], split=True)
    if kind == "pairs":
        return make.texts([record["good"] for record in records], split=False)
    if kind == "choice":
        answers = [record["choices"][record["label"]] for record in records]
    else:
        answers = [record["answer"] for record in records]
    return make.answers([record["prompt"] for record in records], answers, end=True)


class RowMaker:
    """Makes the rows of texts for one model; the parameters are those of `encode`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool, max_length: int) -> None:
        self.tokenizer, self.encoder_decoder, self.max_length = tokenizer, encoder_decoder, max_length
        self.before, self.after = _marks(tokenizer)

    def answers(self, prompts: Sequence[str], answers: Sequence[str], *, end: bool) -> list[Example]:
        """Return rows of a prompt and its answer, labels on the answer. `end`: add the end token (training)."""
        eos = end_id(self.tokenizer)
        if end and eos is None:
            rule = "an answer must end with an end token"
            raise DataError("tokenizer", found="no end token", rule=rule, fix="set tokenizer.eos_token")
        rows: list[Example] = []
        for index, (prompt, answer) in enumerate(zip(self._ids(prompts), self._ids(answers), strict=True)):
            if not answer and not end:
                found, rule = f"answer {answers[index]!r}", "an answer must have at least one token"
                raise DataError(f"record {index}", found=found, rule=rule, fix="leave the record out")
            labels = list(answer)
            if self.encoder_decoder:
                labels = self.before + labels + (self.after if end else [])
            if eos is not None and end and labels[-1:] != [eos]:
                labels.append(eos)
            room = self.max_length - len(labels)
            if room < (0 if self.encoder_decoder else max(1, len(self.before))):
                raise DataError(
                    f"record {index}",
                    found=f"an answer of {len(labels)} tokens, max_length={self.max_length}",
                    rule="prompt and answer must fit in max_length, because an answer is never cut",
                    fix="raise max_length or leave the record out",
                )
            if self.encoder_decoder:
                rows.append({"input_ids": self._prompt(prompt, self.max_length), "labels": labels})
            else:
                rows.append(_continued(self._prompt(prompt, room), labels))
        return rows

    def prompts(self, prompts: Sequence[str]) -> list[Example]:
        """Return rows of prompts only, for generation."""
        return [{"input_ids": self._prompt(ids, self.max_length)} for ids in self._ids(prompts)]

    def texts(self, texts: Sequence[str], *, split: bool) -> list[Example]:
        """Return rows of texts, labels on every token. A long text continues in the next row (`split`), or DataError.

        A row that continues a text begins with the last token of the row before, so each token is predicted once. In
        an encoder-decoder, the decoder generates the text and the encoder reads no text.
        """
        start = self.before or _start(self.tokenizer)
        room = self.max_length if self.encoder_decoder else self.max_length - len(start)
        rows: list[Example] = []
        for index, ids in enumerate(self._ids(texts)):
            if not ids or (len(ids) > room and not split):
                raise DataError(
                    f"record {index}",
                    found=f"a text of {len(ids)} tokens",
                    rule="a text must have at least one token" + ("" if split else f" and at most {room}"),
                    fix="raise max_length or leave the record out",
                )
            context = start
            for at in range(0, len(ids), room):
                piece = ids[at : at + room]
                if self.encoder_decoder:
                    rows.append({"input_ids": self._prompt([], self.max_length), "labels": piece})
                else:
                    rows.append(_continued(context, piece))
                context = piece[-1:]
        return rows

    def labels(self, records: Sequence[Record], number: Callable[[Any], float] = int) -> list[Example]:
        """Return rows of a text or two texts and their label; a long text (the longer of two) is cut at the end."""
        paired = {"pair" in record for record in records}
        if len(paired) > 1:
            found, rule = "a field 'pair' in some of them", "all records must have a pair, or none"
            raise DataError("records", found=found, rule=rule, fix="add the missing pairs, or remove the field")
        texts = [record["text"] for record in records]
        pairs = [record["pair"] for record in records] if paired == {True} else None
        fields = self.tokenizer(texts, pairs, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in fields]
        return [
            {**{name: fields[name][row] for name in names}, "labels": number(record["label"])}
            for row, record in enumerate(records)
        ]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _prompt(self, ids: list[int], length: int) -> list[int]:
        """Return a prompt with the tokenizer's marks, of at most `length` tokens; it loses its beginning."""
        after = self.after if self.encoder_decoder else []
        room = length - len(self.before) - len(after)
        return self.before + ids[max(0, len(ids) - room) :] + after or _start(self.tokenizer)


def _continued(context: list[int], labels: list[int]) -> Example:
    """Return a row for a decoder, labels on what follows the context."""
    return {"input_ids": context + labels, "labels": [IGNORED] * len(context) + labels}


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch.

    pad_id    fills input_ids; the attention mask is 0 there
    side      "left" for prompts to be continued, which carry no labels; labels are padded right
    returns   int64 tensors (rows, tokens); labels (rows, tokens) or (rows,), float32 for a regression
    """

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        batch = {
            "input_ids": self._pad(ids, self.pad_id, self.side),
            "attention_mask": self._pad([[1] * len(row) for row in ids], 0, self.side),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = self._pad([example["token_type_ids"] for example in examples], 0, self.side)
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            tokens = isinstance(labels[0], list)
            batch["labels"] = self._pad(labels, IGNORED, "right") if tokens else torch.tensor(labels)
        return batch

    @staticmethod
    def _pad(rows: Sequence[list[int]], value: int, side: str) -> Tensor:
        width = max(len(row) for row in rows)
        pads = [[value] * (width - len(row)) for row in rows]
        if side == "left":
            return torch.tensor([pad + row for row, pad in zip(rows, pads, strict=True)])
        return torch.tensor([row + pad for row, pad in zip(rows, pads, strict=True)])


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokenizer's padding token, else its end token, else 0; the attention mask hides it."""
    return _first(tokenizer.pad_token_id, tokenizer.eos_token_id) or 0


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a text, or None."""
    return _first(tokenizer.eos_token_id)


def length_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Return `wanted` tokens, or fewer where the tokenizer or the model has a smaller limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(wanted, tokenizer.model_max_length, positions or wanted)


def wrong_model(name: str, model: nn.Module, *, head: str = "") -> DataError:
    """Return the error for a model without the head that a task needs: of the kind `head`, or a language model's."""
    if head:
        rule, fix = "the model must have a head over texts", f'load the model with a head: task_kind="{head}"'
    else:
        rule, fix = "the model must be a language model", "load the model without a classification head"
    return DataError(f"task {name}", found=f"a {type(model).__name__}", rule=rule, fix=fix)


def check_model(name: str, kind: str, records: Sequence[Record], model: nn.Module) -> None:
    """Raise DataError for a model that cannot learn or answer a task of this kind.

    A task with labels needs a head over texts that has an output for every label, and a padding token. The other tasks
    need a model without such a head.
    """
    from transformers import PreTrainedModel

    config: Any = model.config
    where = f"task {name}"
    if kind not in HEAD_KINDS:
        if type(model).__name__.endswith("ForSequenceClassification"):
            raise wrong_model(name, model)
        return
    if isinstance(model, PreTrainedModel) and model.can_generate():
        raise wrong_model(name, model, head=kind)
    if kind == "classification":
        check_labels(where, records, config.num_labels, fix="load the model with the right num_labels")
    elif config.num_labels != 1:
        found, rule = f"a head of {config.num_labels} outputs", "a regression head must have 1 output"
        raise DataError(where, found=found, rule=rule, fix="load the model with num_labels=1")
    if config.pad_token_id is None:
        rule, fix = "a head over texts needs a padding token", "set model.config.pad_token_id = tokenizer.pad_token_id"
        raise DataError(where, found="config.pad_token_id=None", rule=rule, fix=fix)


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    fields = tokenizer("a", return_special_tokens_mask=True)
    ids, special = fields["input_ids"], fields["special_tokens_mask"]
    own = [at for at, mark in enumerate(special) if not mark]
    return (ids[: own[0]], ids[own[-1] + 1 :]) if own else (ids, [])


def _first(*tokens: object) -> int | None:
    """Return the first of the tokens that the tokenizer has."""
    return next((token for token in tokens if isinstance(token, int)), None)


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the first token of a text without context: the begin token, or else the end token."""
    token = _first(tokenizer.bos_token_id, tokenizer.eos_token_id)
    if token is None:
        rule = "a text must begin with a begin or end token"
        raise DataError("tokenizer", found="no begin or end token", rule=rule, fix="set tokenizer.eos_token")
    return [token]
