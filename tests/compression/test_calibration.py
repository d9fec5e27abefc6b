"""Batches for calibration: drawn by the seed, and padding of the decoder is masked."""

from __future__ import annotations

import torch

from dovetail.compression.calibration import calibration_batches
from small_models import PAD, SUMS, make_tokenizer


def test_another_seed_draws_other_records() -> None:
    first, same, other = (
        calibration_batches(SUMS, make_tokenizer(), samples=8, seed=seed)[0]["input_ids"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_padding_of_the_decoder_is_masked() -> None:
    records = [{"prompt": "one", "answer": "two"}, {"prompt": "one", "answer": "two three four"}]
    task = SUMS.__class__("sums", "generation", "exact_match", {"train": records})
    (batch,) = calibration_batches(task, make_tokenizer(end=True), decoder_start=PAD)
    ids, mask = batch["decoder_input_ids"], batch["decoder_attention_mask"]
    assert sorted(mask.sum(1).tolist()) == [3, 4]  # the start, and the answer with its end where another is longer
    assert bool((ids[mask == 0] == PAD).all())
