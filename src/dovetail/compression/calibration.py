"""Calibration data: batches of a task's own text, for the links that need statistics of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dovetail.compression.passes import Batch
from dovetail.errors import DataError
from dovetail.files import read_bytes
from dovetail.tasks.task import METRICS, Task
from dovetail.tasks.tokens import IGNORED, Collator, encode, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEXT_NBYTES = 1 << 28
"""The most that a file of calibration text may hold."""


def checked(calibration: Iterable[Batch]) -> list[Batch]:
    """Return the batches as a list; raise DataError for one batch alone, texts, lists of numbers or a wrong mask."""
    rule = "calibration must be a list of batches, each the model's arguments by name, as tensors"
    found: object = calibration
    if isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes | Mapping | Tensor):
        batches = list(calibration)
        wrong: list[object] = [batch for batch in batches if not isinstance(batch, Mapping)]
        if not wrong:
            wrong = [value for batch in batches for value in batch.values() if not isinstance(value, Tensor)]
        if not wrong:
            for batch in batches:
                _check_mask(batch)
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
) -> list[dict[str, Tensor]]:
    """Return inputs to calibrate on: `samples` rows of the train split, drawn by `seed`.

    decoder_start   the token that an encoder-decoder's decoder begins with; None for other models
    returns         batches of input_ids, attention_mask (rows, tokens), padded right, and for an encoder-decoder
                    decoder_input_ids
    """
    records = task.split("train")
    chosen = Random(seed).sample(range(len(records)), min(samples, len(records)))
    rows = encode(
        task.kind,
        [records[i] for i in chosen],
        tokenizer,
        encoder_decoder=decoder_start is not None,
        max_length=min(max_length, tokenizer.model_max_length),
    )[:samples]
    collate = Collator(pad_id(tokenizer))
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
