"""Packing: the loss of the rows apart, no token lost, and models that mix texts are refused."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

import families
import todays_families
from dovetail.checkpoint.load import load
from dovetail.compression.apply import apply
from dovetail.errors import TrainError
from dovetail.runs.plan import plan
from dovetail.tasks.packing import PackedRows, best_fit, check_packing
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import IGNORED, Collator, Example
from dovetail.training.train import train
from dovetail.training.trainer import mean_loss
from families import CONFIGS
from small_models import SUMS, llama, make_tokenizer, quiet, sum_records, t5

torch.set_num_threads(1)
KEEPS = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "mixtral")
MIXES = ("bloom", "falcon", "opt")


def rows_of(*lengths: int, seed: int = 0) -> list[Example]:
    random = Random(seed)
    rows = []
    for length in lengths:
        ids = [random.randrange(3, 128) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_each_row_once_and_fit(seed: int) -> None:
    random = Random(seed)
    lengths = [random.randint(1, 40) for _ in range(200)]
    groups = best_fit(lengths, 64)
    assert sorted(row for group in groups for row in group) == list(range(200))
    assert all(sum(lengths[row] for row in group) <= 64 for group in groups)
    assert len(groups) <= sum(lengths) / 64 * 1.05 + 1  # next to no padding
    assert best_fit([70, 3], 64) == [[0], [1]]


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "eager") for name in KEEPS), *((name, "sdpa") for name in KEEPS if name != "gemma2")],
)
def test_the_loss_is_that_of_the_rows_apart(name: str, attention: str) -> None:
    model = families.make(name)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    rows = rows_of(3, 17, 9, 30, 1, 12)
    packed = PackedRows(rows, [len(row["input_ids"]) for row in rows], 40)
    assert len(packed) < len(rows)
    check_packing(model, "generation", rows)
    collate = Collator(0)
    assert mean_loss(model, packed, collate, 2) == pytest.approx(mean_loss(model, rows, collate, 2), abs=1e-5)


def test_a_window_of_attention_counts_the_positions_of_each_text() -> None:
    model = families.make("gemma3")
    model.config.use_cache = False
    model.config.sliding_window = 8
    rows = rows_of(20, 15, 12)
    packed = PackedRows(rows, [20, 15, 12], 64)
    assert len(packed) == 1
    assert mean_loss(model, packed, Collator(0), 1) == pytest.approx(mean_loss(model, rows, Collator(0), 3), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*MIXES, "mamba", "jamba", "recurrent_gemma", "lfm2", "qwen3_next", "mpt"])
def test_models_that_mix_texts_are_refused(name: str, dtype: torch.dtype) -> None:
    make = families.make if name in CONFIGS else todays_families.make
    with pytest.raises(TrainError, match=r"packing on a .*\n.*logits that change"):
        check_packing(make(name).to(dtype), "generation", rows_of(5, 9, 12))


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_half_precision_is_no_reason_to_refuse(name: str) -> None:
    check_packing(families.make(name).to(torch.bfloat16), "generation", rows_of(5, 9, 12))


def test_labels_and_encoder_decoders_are_refused() -> None:
    with pytest.raises(TrainError, match="an encoder-decoder"):
        quiet(t5(), SUMS, packing=True, max_steps=1)
    with pytest.raises(TrainError, match="a classification task"):
        check_packing(llama(), "classification", rows_of(5))


def test_a_step_of_packed_rows_is_the_step_of_the_rows_apart(capsys: pytest.CaptureFixture[str]) -> None:
    records = sum_records(12)
    results = []
    for settings in ({"batch_size": 12}, {"batch_size": 12, "packing": True, "max_length": 48}):
        model = apply(llama(), "lora(r=4)")
        report = train(
            model, make_tokenizer(), Task("sums", "generation", "exact_match", {"train": records}), max_steps=1,
            **settings,
        )  # fmt: skip
        results.append((report.stages[0].losses[0][1], [p for p in model.parameters() if p.requires_grad]))
    assert "12 rows are packed into " in capsys.readouterr().err
    (loss, trained), (packed_loss, packed_trained) = results
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    for one, other in zip(trained, packed_trained, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_the_plan_predicts_what_packed_rows_need(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    task = Task("sums", "generation", "exact_match", {"train": sum_records(40)})
    model, tokenizer = load(tmp_path)
    measured = quiet(apply(model, "lora(r=4)"), task, tokenizer, max_steps=3, batch_size=2, packing=True, max_length=48)
    found = plan("lora(r=4)", tmp_path, task=task, batch_size=2, packing=True, max_length=48)
    assert (found.batch_size, found.length) == (2, 48)
    assert found.predicted_peak_memory_nbytes == pytest.approx(measured.peak_memory_nbytes, rel=0.02)
    alike = plan("lora(r=4)", tmp_path, batch_size=2, length=9, packing=True, max_length=48)
    assert alike.predicted_peak_memory_nbytes == found.predicted_peak_memory_nbytes
    with pytest.raises(TrainError, match="an encoder-decoder"):
        plan("lora(r=4)", CONFIGS["t5"](), packing=True)
