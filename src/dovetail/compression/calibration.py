"""Calibration data: batches of a task's own text, for the links that need statistics of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dovetail.compression.passes import Batch
from dovetail.errors import DataError
from dovetail.files import read_bytes
from dovetail.tasks.task import METRICS, Task
from dovetail.tasks.tokens import IGNORED, Collator, RowMaker
from dovetail.tasks.vocabulary import Vocabulary, pad_id, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEXT_NBYTES = 1 << 28
"""The most that a file of calibration text may hold."""


def checked(calibration: Iterable[Batch], model: nn.Module) -> list[Batch]:
    """Return the batches as a list; raise DataError for what is no list of batches, a wrong mask or a strange token."""
    rule = "calibration must be a list of batches, each the model's arguments by name, as tensors"
    found: object = calibration
    if isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes | Mapping | Tensor):
        batches = list(calibration)
        wrong: list[object] = [batch for batch in batches if not isinstance(batch, Mapping)]
        if not wrong:
            wrong = [value for batch in batches for value in batch.values() if not isinstance(value, Tensor)]
        if not wrong:
            vocabulary = vocabulary_of(model)
            for number, batch in enumerate(batches):
                _check_mask(batch)
                if vocabulary is not None:
                    _check_ids(f"calibration, batch {number}", batch, vocabulary)
            return batches
        found = wrong[0]
    fix = "pass calibration=[tokenizer(texts, return_tensors='pt', padding=True)]"
    raise DataError("calibration", found=f"a {type(found).__name__}", rule=rule, fix=fix)


def _check_mask(batch: Batch) -> None:
    """Raise DataError for a mask of another shape: it would be broadcast over the rows."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is not None and mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
        found = f"attention_mask of {list(mask.shape)} beside input_ids of {list(ids.shape)}"
        rule, fix = "the mask must have one value per token", "pass the mask that the tokenizer returns"
        raise DataError("calibration", found=found, rule=rule, fix=fix)


def _check_ids(where: str, batch: Batch, vocabulary: Vocabulary) -> None:
    """Raise DataError for a token id without a row in the model's embedding."""
    ids = batch.get("input_ids")
    if ids is None or ids.is_meta or not ids.numel() or int(ids.max()) < vocabulary[0]:
        return
    row = int((ids >= vocabulary[0]).flatten(1).any(1).nonzero()[0])
    raise DataError(
        f"{where}, row {row}",
        found=f"a token with id {int(ids.max())}; the model's embedding has {vocabulary[0]} rows",
        rule="every token must have a row in the model's embedding",
        fix="resize the embedding: model.resize_token_embeddings(len(tokenizer))",
    )


def text_task(path: Path, *, encoder_decoder: bool) -> Task:
    """Return the passages of a text file, one per line, as a task to calibrate on."""
    rule, fix = "calibration.text must be a UTF-8 file with one passage per line", "pass a text file"
    content = read_bytes(path, rule=rule, fix=fix, limit=MAX_TEXT_NBYTES, error=DataError)
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(str(path), found=f"byte {error.start} is not UTF-8", rule=rule, fix=fix) from None
    passages = [line.strip() for line in lines if line.strip()]
    if not passages:
        raise DataError(str(path), found="no passage", rule=rule, fix=fix)
    if encoder_decoder:
        return Task(path.name, "generation", "exact_match", {"train": [{"prompt": p, "answer": p} for p in passages]})
    return Task(path.name, "text", METRICS["text"][0], {"train": [{"text": p} for p in passages]})


def calibration_batches(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    max_length: int = 512,
    decoder_start: int | None = None,
    vocabulary: Vocabulary | None = None,
) -> list[dict[str, Tensor]]:
    """Return inputs to calibrate on: `samples` rows of the train split, drawn by `seed`.

    decoder_start   the token that an encoder-decoder's decoder begins with; None for other models
    vocabulary      the model's, by which token ids are checked; None: of no model
    returns         batches of input_ids, attention_mask (rows, tokens), padded right, and for an encoder-decoder
                    decoder_input_ids
    """
    records = task.split("train")
    chosen = Random(seed).sample(range(len(records)), min(samples, len(records)))
    length = min(max_length, tokenizer.model_max_length)
    make = RowMaker(tokenizer, decoder_start is not None, length, vocabulary, numbers=chosen)
    rows = make.examples(task.kind, [records[i] for i in chosen])[:samples]
    collate = Collator(pad_id(tokenizer, vocabulary))
    batches = []
    for at in range(0, len(rows), batch_size):
        batch = collate(rows[at : at + batch_size])
        labels = batch.pop("labels")
        if decoder_start is not None and labels.ndim == 2:
            start = torch.full_like(labels[:, :1], decoder_start)
            shifted = torch.cat([start, labels[:, :-1]], 1)
            batch["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, collate.pad_id)
            batch["decoder_attention_mask"] = (shifted != IGNORED).long()
        batches.append(batch)
    return batches
