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
from dovetail.tasks.task import Record

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
    if kind in ("classification", "regression"):
        return label_rows(records, tokenizer, max_length=max_length, number=float if kind == "regression" else int)
    if kind == "generation":
        answers = [record["answer"] for record in records]
    elif kind == "choice":
        answers = [record["choices"][record["label"]] for record in records]
    else:
        texts = [record["good" if kind == "pairs" else "text"] for record in records]
        return text_rows(texts, tokenizer, encoder_decoder=encoder_decoder, max_length=max_length, split=kind == "text")
    prompts = [record["prompt"] for record in records]
    return answer_rows(prompts, answers, tokenizer, encoder_decoder=encoder_decoder, max_length=max_length, end=True)


def answer_rows(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int,
    end: bool,
) -> list[Example]:
    """Return rows of a prompt and its answer, labels on the answer. `end`: the answer has the end token (training)."""
    before, after = _marks(tokenizer)
    eos = end_id(tokenizer)
    if end and eos is None:
        raise DataError(
            "tokenizer",
            found="no end token",
            rule="an answer must end with an end token",
            fix="set tokenizer.eos_token",
        )
    rows: list[Example] = []
    for index, (prompt, answer) in enumerate(zip(_ids(prompts, tokenizer), _ids(answers, tokenizer), strict=True)):
        if not answer and not end:
            raise DataError(
                f"record {index}", found=f"answer {answers[index]!r}", rule="an answer must have at least one token"
            )
        if encoder_decoder:
            inputs = _keep_end(before, prompt, after, max_length) or _start(tokenizer)
            labels = before + answer + (after if end else [])
        else:
            labels = list(answer)
        if eos is not None and end and labels[-1:] != [eos]:
            labels.append(eos)
        if len(labels) + (0 if encoder_decoder else max(1, len(before))) > max_length:
            raise DataError(
                f"record {index}",
                found=f"an answer of {len(labels)} tokens, max_length={max_length}",
                rule="prompt and answer must fit in max_length, because an answer is never cut",
                fix="raise max_length or leave the record out",
            )
        if not encoder_decoder:
            context = _keep_end(before, prompt, [], max_length - len(labels)) or _start(tokenizer)
            inputs, labels = context + labels, [IGNORED] * len(context) + labels
        rows.append({"input_ids": inputs, "labels": labels})
    return rows


def prompt_rows(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool, max_length: int
) -> list[Example]:
    """Return rows of prompts only, for generation."""
    before, after = _marks(tokenizer)
    return [
        {"input_ids": _keep_end(before, ids, after if encoder_decoder else [], max_length) or _start(tokenizer)}
        for ids in _ids(prompts, tokenizer)
    ]


def text_rows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int,
    split: bool,
) -> list[Example]:
    """Return rows of texts, labels on every token. A long text continues in the next row (`split`), or DataError.

    A row that continues a text begins with the last token of the row before, so each token is predicted once. In an
    encoder-decoder, the decoder generates the text and the encoder reads no text.
    """
    before, after = _marks(tokenizer)
    start = before or _start(tokenizer)
    room = max_length if encoder_decoder else max_length - len(start)
    rows: list[Example] = []
    for index, ids in enumerate(_ids(texts, tokenizer)):
        if not ids or (len(ids) > room and not split):
            raise DataError(
                f"record {index}",
                found=f"a text of {len(ids)} tokens",
                rule=f"a text must have from 1 to {room} tokens"
                if not split
                else "a text must have at least one token",
                fix="raise max_length or leave the record out",
            )
        context = start
        for at in range(0, len(ids), room):
            piece = ids[at : at + room]
            if encoder_decoder:
                rows.append({"input_ids": before + after or _start(tokenizer), "labels": piece})
            else:
                rows.append({"input_ids": context + piece, "labels": [IGNORED] * len(context) + piece})
            context = piece[-1:]
    return rows


def label_rows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    number: Callable[[Any], float] = int,
) -> list[Example]:
    """Return rows of a text or two texts and their label; a long text (the longer of two) is cut at the end."""
    paired = {"pair" in record for record in records}
    if len(paired) > 1:
        raise DataError("records", found="a field 'pair' in some of them", rule="all records must have a pair, or none")
    texts = [record["text"] for record in records]
    pairs = [record["pair"] for record in records] if paired == {True} else None
    fields = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in fields]
    return [
        {**{name: fields[name][row] for name in names}, "labels": number(record["label"])}
        for row, record in enumerate(records)
    ]


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
    return next((at for at in (_number(tokenizer.pad_token_id), end_id(tokenizer)) if at is not None), 0)


def end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends a text, or None."""
    return _number(tokenizer.eos_token_id)


def length_limit(model: nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """Return `wanted` tokens, or fewer where the tokenizer or the model has a smaller limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(wanted, tokenizer.model_max_length, positions or wanted)


def check_head(name: str, kind: str, model: nn.Module) -> None:
    """Raise DataError for a task with labels on a language model, or a language task on a model with a text head."""
    from transformers import PreTrainedModel

    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    if kind in ("classification", "regression") and generates:
        rule, fix = "the task needs a head over texts", f'load the model with a head: task_kind="{kind}"'
    elif kind not in ("classification", "regression") and type(model).__name__.endswith("ForSequenceClassification"):
        rule, fix = "the task needs a language model", "load the model without a classification head"
    else:
        return
    raise DataError(f"task {name}", found=f"a {type(model).__name__}", rule=rule, fix=fix)


def check_labels(name: str, kind: str, records: Sequence[Record], model: nn.Module) -> None:
    """Raise DataError unless the model has a text head with an output for every label, and a padding token."""
    config: Any = model.config
    check_head(name, kind, model)
    if kind == "regression" and config.num_labels != 1:
        raise DataError(
            f"task {name}",
            found=f"a head of {config.num_labels} outputs",
            rule="a regression head must have 1 output",
            fix="load the model with num_labels=1",
        )
    if kind == "classification":
        for index, record in enumerate(records):
            if not 0 <= record["label"] < config.num_labels:
                raise DataError(
                    f"task {name}, record {index}",
                    found=f"label={record['label']}, num_labels={config.num_labels}",
                    rule="labels must be from 0 to num_labels - 1",
                    fix="load the model with the right num_labels",
                )
    if config.pad_token_id is None:
        raise DataError(
            f"task {name}",
            found="config.pad_token_id=None",
            rule="a head over texts needs a padding token",
            fix="set model.config.pad_token_id = tokenizer.pad_token_id",
        )


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    fields = tokenizer("a", return_special_tokens_mask=True)
    ids, special = fields["input_ids"], fields["special_tokens_mask"]
    own = [at for at, mark in enumerate(special) if not mark]
    return (ids[: own[0]], ids[own[-1] + 1 :]) if own else (ids, [])


def _number(token_id: object) -> int | None:
    return token_id if isinstance(token_id, int) else None


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the first token of a text without context: the begin token, or else the end token."""
    for at in (_number(tokenizer.bos_token_id), end_id(tokenizer)):
        if at is not None:
            return [at]
    raise DataError(
        "tokenizer",
        found="no begin or end token",
        rule="a text must begin with a begin or end token",
        fix="set tokenizer.eos_token",
    )


def _keep_end(before: list[int], ids: list[int], after: list[int], max_length: int) -> list[int]:
    room = max_length - len(before) - len(after)
    return before + ids[max(0, len(ids) - room) :] + after
