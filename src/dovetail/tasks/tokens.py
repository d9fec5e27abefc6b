"""From a task's records to batches of tokens.

The loss falls on what is to be learned: labels are -100 (the models' mark for "not counted") on the prompt and on
padding. Prompt and answer are tokenised apart and joined without special tokens in between, so that what is trained
is what a greedy continuation of the prompt later produces. Tokens at the start follow the tokenizer: if it begins
texts with a token, prompts begin with it, once, also where the prompt's own text begins with it. A text without a
prompt begins with that token or else with the begin or end token, so that its first token is predicted from something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dovetail.errors import DataError
from dovetail.progress import note, note_once
from dovetail.tasks.stored import ROW, gathered
from dovetail.tasks.task import HEAD_KINDS, Record
from dovetail.tasks.templates import DEFAULT, SEGMENTS, Segments, Template, mark_tokens
from dovetail.tasks.vocabulary import Vocabulary, end_id, first_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]
"""One row before padding: input_ids, and where there is a loss labels, lists of ints; or a label, int or float."""

MAX_STRETCH = 400
"""Characters of a stretch of tokens that `rendered` shows."""
_CHUNK = 1024
"""Records that are tokenized at a time."""
IGNORED = -100
"""The label of a token that the loss and the scores leave out."""


def encode(
    kind: str,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_decoder: bool,
    max_length: int,
    vocabulary: Vocabulary | None = None,
) -> list[Example]:
    """Return the training examples of records of one kind, in their order; a long text makes several.

    kind              a key of `dovetail.tasks.FIELDS`
    encoder_decoder   prompt to the encoder, answer to the decoder; otherwise one after the other
    max_length        tokens of a row. A prompt loses its beginning, an answer nothing; a text goes on in the next row
    vocabulary        the model's (`vocabulary_of`), by which token ids are checked; None: of no model
    returns           rows of input_ids and labels (lists), or of the tokenizer's fields and labels (int or float)

    Raises DataError that names the record, for an answer or sentence that does not fit, and for a token without a row
    in the embedding.
    """
    return RowMaker(tokenizer, encoder_decoder, max_length, vocabulary).examples(kind, records)


class RowMaker:
    """Makes the rows of texts for one model; the parameters are those of `encode`.

    numbers  of the records in their split, by which errors name them; None: their places in what is passed
    cut      number of rows whose prompt or text was cut
    marked   number of rows whose text brought its own begin or end token
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder_decoder: bool,
        max_length: int,
        vocabulary: Vocabulary | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer, self.encoder_decoder, self.max_length = tokenizer, encoder_decoder, max_length
        self.vocabulary, self.numbers = vocabulary, numbers
        self.before, self.after = _marks(tokenizer)
        self.cut = self.marked = 0
        self._templates: dict[str | None, Template | Segments] = {}
        self._before = 0

    def rows(self, kind: str, records: Sequence[Record]) -> Sequence[Example]:
        """Return the training examples of records as `examples` does, on disk where they are many."""

        def made() -> Iterator[Example]:
            for at in range(0, len(records), _CHUNK):
                self._before = at
                yield from self.examples(kind, list(records[at : at + _CHUNK]))
            self._before = 0

        if kind in HEAD_KINDS:
            check_pairs(records)
        return gathered(made(), ROW)

    def examples(self, kind: str, records: Sequence[Record]) -> list[Example]:
        """Return the training examples of records of one kind, as `encode` does."""
        if kind in HEAD_KINDS:
            return self.labels(records, float if kind == "regression" else int)
        if kind == "text":
            return self.texts([record["text"] for record in records], split=True)
        if kind == "chat":
            return self.chats(records)
        if kind == "pairs":
            return self.texts([record["good"] for record in records], split=False)
        if kind == "choice":
            return self.choices(records, right=True)
        return self.answers([record["prompt"] for record in records], [record["answer"] for record in records])

    def answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Example]:
        """Return rows of a prompt, its answer and the end token, labels on the answer and the end token."""
        pairs = zip(self._ids(prompts), self._ids(answers), strict=True)
        return [self._answer(index, *ids, end=True) for index, ids in enumerate(pairs)]

    @property
    def turn_ends(self) -> list[int | None]:
        """The tokens that end a turn of the assistant in the conversations so far."""
        return [template.end_id for template in self._templates.values()]

    def keep_template(self) -> None:
        """Store a named template of the conversations in the tokenizer, whose own one it replaces."""
        for template in self._templates.values():
            if template.source is not None:
                self.tokenizer.chat_template = template.source

    def say(self, name: str, *, shown: bool) -> dict[str, int]:
        """Return the number of rows that were cut, where there are any, and print what was done to the rows so far."""
        if self.cut:
            note(f"{name}: {self.cut} prompts or texts are cut to {self.max_length} tokens", shown=shown)
        if shown and any(name is None and template.source for name, template in self._templates.items()):
            note_once(f"the tokenizer has no chat template; the template {DEFAULT} is used for the conversations")
        if self.marked:
            note(f"{name}: {self.marked} texts bring begin or end tokens; none is added to those", shown=shown)
        return {"cut": self.cut} if self.cut else {}

    def choices(self, records: Sequence[Record], *, right: bool) -> list[Example]:
        """Return rows of a prompt and a choice, labels on the choice: the right one and the end token, or all of them.

        Prompt and choice are split as lm-eval 0.4 does (`TemplateLM._encode_pair`): white space at the end of the
        prompt belongs to the choice, and a decoder's choice is what the tokens of both together have beyond those of
        the prompt. Where that is nothing, the choice is tokenised alone.
        """
        numbers, contexts, said = [], [], []
        for number, record in enumerate(records):
            context = record["prompt"].rstrip()
            for choice in [record["choices"][record["label"]]] if right else record["choices"]:
                numbers.append(number)
                contexts.append(context)
                said.append(record["prompt"][len(context) :] + choice)
        context_ids, choice_ids = self._ids(contexts), self._ids(said)
        if not self.encoder_decoder:
            wholes = self._ids([context + choice for context, choice in zip(contexts, said, strict=True)])
            split = zip(context_ids, choice_ids, wholes, strict=True)
            choice_ids = [whole[len(context) :] or choice for context, choice, whole in split]
        rows = zip(numbers, context_ids, choice_ids, strict=True)
        return [self._answer(*row, end=right) for row in rows]

    def _answer(self, index: int, prompt: list[int], answer: list[int], *, end: bool) -> Example:
        """Return the row of a prompt and its answer. `end`: add the end token (training)."""
        eos = end_id(self.tokenizer)
        if end and eos is None:
            rule = "an answer must end with an end token"
            raise DataError("tokenizer", found="no end token", rule=rule, fix="set tokenizer.eos_token")
        if not answer and not end:
            rule = "an answer must have at least one token"
            raise DataError(self._where(index), found="an empty answer", rule=rule, fix="leave the record out")
        labels = list(answer)
        if not prompt and not self.encoder_decoder:
            labels = self._unstarted(labels)
        if self.encoder_decoder:
            labels = self.before + self._bare(labels) + (self.after if end else [])
        if eos is not None and end and labels[-1:] != [eos]:
            labels.append(eos)
        room = self.max_length - len(labels)
        if room < (0 if self.encoder_decoder else max(1, len(self.before))):
            raise DataError(
                self._where(index),
                found=f"an answer of {len(labels)} tokens, max_length={self.max_length}",
                rule="prompt and answer must fit in max_length, because an answer is never cut",
                fix="raise max_length or leave the record out",
            )
        if self.encoder_decoder:
            return self._checked(index, {"input_ids": self._prompt(prompt, self.max_length), "labels": labels})
        return self._checked(index, _continued(self._prompt(prompt, room), labels))

    def template(self, record: Record) -> Template | Segments:
        """Return the template of a conversation: the one that it names, or the tokenizer's, or the default one."""
        name = record.get("template")
        if name == SEGMENTS:
            return self._templates.setdefault(name, Segments())
        if name not in self._templates:
            begin = "".join(self.tokenizer.convert_ids_to_tokens(self.before))
            self._templates[name] = Template(self.tokenizer, name, begin)
        return self._templates[name]

    def chats(self, records: Sequence[Record]) -> list[Example]:
        """Return rows of conversations, labels on the assistant's turns; a long conversation loses its end."""
        if self.encoder_decoder or not self.tokenizer.is_fast:
            found = "an encoder-decoder" if self.encoder_decoder else "a tokenizer without offsets of its tokens"
            rule = "conversations need a decoder-only model and a tokenizer of the tokenizers library"
            raise DataError("chat", found=found, rule=rule, fix="use records of the kind generation")
        rendered = [
            self.template(record).turns(self._where(index), record["messages"], record.get("tools"))
            for index, record in enumerate(records)
        ]
        fields = self.tokenizer(
            [text for text, *_ in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        import numpy as np  # which `dovetail --help` need not wait for

        rows = []
        for index, (_, spans, untrained) in enumerate(rendered):
            ids: list[int] = fields["input_ids"][index]
            offsets = fields["offset_mapping"][index]
            counted = mark_tokens(offsets, spans)
            if untrained:
                counted &= ~mark_tokens(offsets, untrained)
            labels: list[int] = np.where(counted, ids, IGNORED).tolist()
            if len(ids) > self.max_length:
                self.cut += 1
                ids, labels = ids[: self.max_length], labels[: self.max_length]
            if all(label == IGNORED for label in labels[1:]):
                raise DataError(
                    self._where(index),
                    found=f"{len(counted)} tokens, of which the first {len(ids)} have none of the assistant's",
                    rule="a conversation must have a token of the assistant within max_length",
                    fix="raise max_length or leave the record out",
                )
            rows.append(self._checked(index, {"input_ids": ids, "labels": labels}))
        return rows

    def chat_prompts(self, records: Sequence[Record], *, room: int) -> list[Example]:
        """Return rows of conversations up to the assistant's last turn, with its beginning; see `prompts`."""
        texts = []
        for index, record in enumerate(records):
            messages = record["messages"][: last_turn(record)]
            where, tools = self._where(index), record.get("tools")
            texts.append(self.template(record).render(where, messages, tools, prompt=True))
        rows = []
        for index, ids in enumerate(self._ids(texts)):
            self.cut += len(ids) > self.max_length - room
            rows.append(self._checked(index, {"input_ids": ids[-(self.max_length - room) :]}))
        return rows

    def prompts(self, prompts: Sequence[str], *, room: int = 0) -> list[Example]:
        """Return rows of prompts only, for generation, with `room` for the tokens of an answer."""
        return [
            self._checked(index, {"input_ids": self._prompt(ids, self.max_length - room)})
            for index, ids in enumerate(self._ids(prompts))
        ]

    def texts(self, texts: Sequence[str], *, split: bool) -> list[Example]:
        """Return rows of texts, labels on every token. A long text continues in the next row (`split`), or DataError.

        A row that continues a text begins with the last token of the row before, so each token is predicted once. In
        an encoder-decoder, the decoder generates the text and the encoder reads no text.
        """
        start = self.before or _start(self.tokenizer)
        room = self.max_length if self.encoder_decoder else self.max_length - len(start)
        rows: list[Example] = []
        for index, ids in enumerate(self._ids(texts)):
            if not self.encoder_decoder:
                ids = self._unstarted(ids)
            if not ids or (len(ids) > room and not split):
                raise DataError(
                    self._where(index),
                    found=f"a text of {len(ids)} tokens",
                    rule="a text must have at least one token" + ("" if split else f" and at most {room}"),
                    fix="raise max_length or leave the record out",
                )
            context = start
            for at in range(0, len(ids), room):
                piece = ids[at : at + room]
                if self.encoder_decoder:
                    row = {"input_ids": self._prompt([], self.max_length), "labels": piece}
                else:
                    row = _continued(context, piece)
                rows.append(self._checked(index, row))
                context = piece[-1:]
        return rows

    def windows(self, texts: Sequence[str], stride: int) -> list[Example]:
        """Return rows of texts in sliding windows; each token has a label in one row, with the most context there.

        A window ends `stride` tokens after the one before, the last one at the end of the text, and all that fits of
        what precedes its labelled tokens is their context. At a stride of `max_length - 1` or more, windows do not
        overlap except for the last one: lm-eval's rolling windows.
        """
        if self.encoder_decoder:
            rule, fix = "a stride needs a decoder-only model", "remove stride"
            raise DataError("text", found="an encoder-decoder", rule=rule, fix=fix)
        start = self.before or _start(self.tokenizer)
        rows = []
        for index, ids in enumerate(self._ids(texts)):
            ids = start + self._unstarted(ids)
            if len(ids) == len(start):
                rule = "a text must have at least one token"
                raise DataError(self._where(index), found="an empty text", rule=rule, fix="leave the record out")
            done, end = len(start), min(len(ids), self.max_length)
            while done < len(ids):
                first = max(0, end - self.max_length)
                labels = [IGNORED] * (done - first) + ids[done:end]
                rows.append(self._checked(index, {"input_ids": ids[first:end], "labels": labels}))
                done, end = end, min(len(ids), end + min(stride, self.max_length - 1))
        return rows

    def labels(self, records: Sequence[Record], number: Callable[[Any], float] = int) -> list[Example]:
        """Return rows of a text or two texts and their label; a long text (the longer of two) is cut at the end."""
        names = ("text", "pair") if check_pairs(records) else ("text",)
        columns: list[Any] = self._unmarked([[record[name] for record in records] for name in names])
        fields = self.tokenizer(*columns, verbose=False)
        long = sum(len(ids) > self.max_length for ids in fields["input_ids"])
        if long:
            self.cut += long
            fields = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in fields]
        rows = [
            {**{name: fields[name][row] for name in names}, "labels": number(record["label"])}
            for row, record in enumerate(records)
        ]
        return [self._checked(index, row) for index, row in enumerate(rows)]

    def _unmarked(self, columns: list[list[str]]) -> list[list[str]]:
        """Return the texts of each record without the marks that the tokenizer puts around them."""
        begin, end = ("".join(self.tokenizer.convert_ids_to_tokens(mark)) for mark in (self.before, self.after))
        first = [text.removeprefix(begin) for text in columns[0]]
        columns = [first, *columns[1:]]
        last = [text.removesuffix(end) for text in columns[-1]]
        return [*columns[:-1], last]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _prompt(self, ids: list[int], length: int) -> list[int]:
        """Return a prompt with the tokenizer's marks, of at most `length` tokens; it loses its beginning."""
        after = self.after if self.encoder_decoder else []
        ids = self._bare(ids)
        room = max(0, length - len(self.before) - len(after))
        self.cut += len(ids) > room
        return self.before + ids[max(0, len(ids) - room) :] + after or _start(self.tokenizer)

    def _unstarted(self, ids: list[int]) -> list[int]:
        """Return the tokens of a text without context, without the start that the row has already."""
        start = self.before or _start(self.tokenizer)
        if len(ids) <= len(start) or ids[: len(start)] != start:
            return ids
        self.marked += 1
        return ids[len(start) :]

    def _bare(self, ids: list[int]) -> list[int]:
        """Return the tokens without marks that the text itself holds, so that each mark comes once."""
        before, after = len(self.before), len(self.after) if self.encoder_decoder else 0
        begins = before > 0 and ids[:before] == self.before
        ends = after > 0 and ids[-after:] == self.after
        self.marked += begins or ends
        return ids[before if begins else 0 : len(ids) - after if ends else None]

    def _where(self, index: int) -> str:
        number = self._before + index
        return f"record {number if self.numbers is None else self.numbers[number]}"

    def _checked(self, index: int, row: Example) -> Example:
        """Return the row; raise DataError for a token id that the model has no row or no output for."""
        if self.vocabulary is None:
            return row
        labels = row.get("labels")
        columns = [row["input_ids"], labels if isinstance(labels, list) else []]
        places = ("embedding has {} rows", "head has {} outputs")
        for ids, size, place in zip(columns, self.vocabulary, places, strict=True):
            if (token := max(ids, default=0)) >= size:
                raise DataError(
                    self._where(index),
                    found=f"token {self.tokenizer.convert_ids_to_tokens(token)!r} with id {token}; the model's "
                    + place.format(size),
                    rule="every token must have a row in the model's embedding",
                    fix="resize the embedding: model.resize_token_embeddings(len(tokenizer))",
                )
        return row


def check_pairs(records: Sequence[Record]) -> bool:
    """Return whether the records have two texts each; DataError where only some have."""
    paired = {"pair" in record for record in records}
    if len(paired) > 1:
        found, rule = "a field 'pair' in some of them", "all records must have a pair, or none"
        raise DataError("records", found=found, rule=rule, fix="add the missing pairs, or remove the field")
    return paired == {True}


def _continued(context: list[int], labels: list[int]) -> Example:
    """Return a row for a decoder, labels on what follows the context."""
    return {"input_ids": context + labels, "labels": [IGNORED] * len(context) + labels}


def rendered(tokenizer: PreTrainedTokenizerBase, row: Example) -> list[tuple[str, bool]]:
    """Return a training row as text: stretches of tokens, and whether the loss counts them; [] for a row with a label.

    Long stretches are shortened in the middle. Of an encoder-decoder, the encoder's tokens come first.
    """
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(labels, list):
        return []
    tokens = list(zip(ids, [label != IGNORED for label in labels], strict=True)) if len(ids) == len(labels) else None
    if tokens is None or any(counted and ids[at] != labels[at] for at, (_, counted) in enumerate(tokens)):
        tokens = [(token, False) for token in ids] + [(token, True) for token in labels]
    stretches = []
    for counted, group in groupby(tokens, key=lambda token: token[1]):
        text = str(tokenizer.decode([token for token, _ in group]))
        if len(text) > MAX_STRETCH:
            text = f"{text[: MAX_STRETCH // 2]} … {text[-MAX_STRETCH // 2 :]}"
        stretches.append((text, counted))
    return stretches


def last_turn(record: Record) -> int:
    """Return the number of the assistant's last message in a conversation."""
    messages = record["messages"]
    return max(at for at, message in enumerate(messages) if message["role"] == "assistant")


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch.

    pad_id    fills input_ids; the attention mask is 0 there
    side      "left" for prompts that a decoder continues, which carry no labels; labels are padded right
    returns   int64 tensors (rows, tokens); labels (rows, tokens) or (rows,), float32 for a regression. Packed rows have
              position_ids in place of an attention mask (`dovetail.tasks.packing`)
    """

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        batch = {"input_ids": self._pad(ids, self.pad_id, self.side)}
        if "position_ids" in examples[0]:
            # Padding at position 0 is a text of its own, token by token.
            batch["position_ids"] = self._pad([example["position_ids"] for example in examples], 0, self.side)
        else:
            batch["attention_mask"] = self._pad([[1] * len(row) for row in ids], 0, self.side)
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


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    fields = tokenizer("a", return_special_tokens_mask=True)
    ids, special = fields["input_ids"], fields["special_tokens_mask"]
    own = [at for at, mark in enumerate(special) if not mark]
    return (ids[: own[0]], ids[own[-1] + 1 :]) if own else (ids, [])


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the first token of a text without context: the begin token, or else the end token."""
    token = first_of(tokenizer.bos_token_id, tokenizer.eos_token_id)
    if token is None:
        rule = "a text must begin with a begin or end token"
        raise DataError("tokenizer", found="no begin or end token", rule=rule, fix="set tokenizer.eos_token")
    return [token]
