"""Plans against what really happens: bytes exactly, legality by name, no trace left of fake tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from dovetail.chains.layer.applied import applied
from dovetail.chains.notation import chain as parse
from dovetail.checkpoint.footprint import footprint
from dovetail.checkpoint.load import load
from dovetail.compression.apply import advance, apply
from dovetail.errors import DovetailError
from dovetail.runs.fit import Setting, cheapest_change, parse_size
from dovetail.runs.plan import plan
from dovetail.tasks.task import Task
from dovetail.training.optimizer import TrainSettings, cast_frozen, make_optimizer
from dovetail.training.peak_memory import PeakMemory
from families import CONFIGS, make
from small_models import bert, llama, make_tokenizer, t5

CHAINS = [
    "lora(r=4) >> ia3",
    "nf4 >> lora(r=4) >> dora(r=2)",
    "fp4(block=32, double=true) >> vera(r=4) >> regrid",
    "wanda(0.5) >> int(bits=3, group=32) >> lora(r=4) >> remask >> regrid",
    "int(bits=2, group=0, symmetric=true) >> magnitude(0.5) >> loha(r=2) >> remask >> regrid(start=codes)",
    "fp8 >> lora(r=4) >> bottleneck(r=4)",
    "ia3 >> wanda(0.5) >> nf4 >> lora(r=2) >> remask >> regrid",
]
IDS = torch.arange(4, 16).view(2, 6)


def classifier():
    return bert(3)


# Every chain on the decoder, and on either the encoder or the encoder-decoder.
@pytest.mark.parametrize(
    ("make", "text", "memory"),
    [(llama, text, place % 3 == 0) for place, text in enumerate(CHAINS)]
    + [((classifier, t5)[place % 2], text, False) for place, text in enumerate(CHAINS)],
)
def test_sizes_are_exact(make, text, memory):
    model = make()
    kind = "classification" if model.config.model_type == "bert" else "generation"
    planned = plan(text, model.config, task_kind=kind, num_labels=3 if kind == "classification" else None,
                   batch_size=2, length=8, memory=memory)  # fmt: skip
    assert planned.legal
    calibration = [{"input_ids": IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})}]
    apply(model, text, calibration=calibration)
    for number, stage in enumerate(planned.stages):
        found = footprint(model)
        assert stage.nbytes == found.nbytes
        assert stage.bits_per_weight == found.bits_per_weight
        assert stage.trainable_parameters == found.trainable_parameters
        assert (stage.predicted_peak_memory_nbytes is not None) == memory
        if stage.predicted_peak_memory_nbytes is not None:
            assert stage.predicted_peak_memory_nbytes > stage.nbytes
        if applied(model).stages_left:
            advance(model, calibration=calibration)
        else:
            assert number == len(planned.stages) - 1
    out = model(**calibration[0], **({"labels": IDS} if kind == "generation" else {}))  # after fake ones, real tensors
    assert torch.isfinite(out.logits).all()


def test_the_playground_is_planned_exactly():
    text = "wanda(0.5) >> int(bits=4, group=64) >> lora(r=16) >> remask >> regrid"
    planned = plan(text, "playground", targets="query,up", length=16, batch_size=2)
    model, _ = load("playground")
    apply(model, text, targets="query,up", calibration=[{"input_ids": IDS}])
    found = footprint(model)
    assert (planned.nbytes, planned.bits_per_weight) == (found.nbytes, found.bits_per_weight)
    assert planned.trainable_parameters == found.trainable_parameters
    assert planned.mergeable


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lorra", "did you mean lora"),
        ("nf4 >> int", "has at most one quantizer"),
        ("lora >> remask", "no pruner before it"),
        ("int(bits=4, group=48) >> lora", "int at model.layers.0.self_attn.q_proj"),
        ("lora >> nf4 >> regrid >> lora >> int", "has at most one quantizer"),
    ],
)
def test_illegal_chains_say_why(text, said):
    planned = plan(text, llama().config)
    assert not planned.legal
    assert said in planned.problem
    assert (planned.stages, planned.nbytes) == ([], 0)


def test_a_layer_that_is_no_target_is_named():
    planned = plan("lora", llama().config, targets="quary")
    assert "target 'quary'" in planned.problem
    assert "query" in planned.problem


def test_what_to_add_for_merging():
    planned = plan("wanda(0.5) >> nf4 >> lora(r=4)", llama().config, batch_size=2, length=8)
    assert planned.legal
    assert not planned.mergeable
    assert "remask >> regrid" in planned.merge_advice


def test_the_longest_record_sets_the_batch(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    records = [{"prompt": "one plus " * n + "is", "answer": " two"} for n in (1, 2, 7)]
    task = Task("sums", "generation", "exact_match", {"train": records})
    planned = plan("lora(r=2)", tmp_path, task=task, batch_size=2)
    assert (planned.batch_size, planned.length) == (2, 17)
    wider = plan("lora(r=2)", tmp_path, task=task, batch_size=2, bf16=True, gradient_checkpointing=True)
    assert (wider.predicted_peak_memory_nbytes or 0) < (planned.predicted_peak_memory_nbytes or 0)


def test_memory_of_experts_is_predicted_in_every_dtype() -> None:
    """Torch runs no grouped product on fake tensors of float32; experts are computed one by one."""
    for targets in ("all-linear", "self_attn.*"):
        planned = plan("lora(r=4)", CONFIGS["mixtral"](), batch_size=2, length=8, targets=targets)
        assert planned.legal
        half = plan("lora(r=4)", CONFIGS["mixtral"](), batch_size=2, length=8, targets=targets, bf16=True)
        assert 0 < (half.predicted_peak_memory_nbytes or 0) < (planned.predicted_peak_memory_nbytes or 0)


def test_memory_of_float32_experts():
    """Torch's grouped product takes no fake tensors of float32; a plan makes the result's shape itself."""
    planned = plan("lora(r=4)", CONFIGS["mixtral"](), targets="self_attn.*", batch_size=2, length=8)
    model = apply(make("mixtral"), "lora(r=4)", targets="self_attn.*").train()
    optimizer = make_optimizer(model, TrainSettings())
    ids = torch.ones(2, 8, dtype=torch.int64)
    with PeakMemory([*model.parameters(), *model.buffers()]) as memory:
        for _ in range(2):
            model(input_ids=ids, attention_mask=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
    assert planned.predicted_peak_memory_nbytes == pytest.approx(memory.peak_nbytes, rel=0.02)


def test_whether_it_fits():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    planned = plan("lora(r=4)", config, batch_size=8, length=16, gpu="1GB")
    peak = planned.predicted_peak_memory_nbytes
    assert peak is not None
    assert (planned.fits, planned.change, sum(planned.memory_parts.values())) == (True, "", peak)
    less = plan("lora(r=4)", config, batch_size=8, length=16, gpu=peak - 1)
    assert less.fits is False
    assert less.change.startswith("it fits with batch_size=4 (and gradient_accumulation=2)")
    assert plan("lora(r=4)", config, memory=False, gpu="1kB").fits is None


def test_the_cheapest_change():
    """Each change halves the need; each is tried alone, from cheap to dear, then all so far together."""
    text = "nf4 >> lora(r=4) >> regrid"
    tried = []

    def predict(setting):
        tried.append(setting)
        saved = setting.gradient_checkpointing + ("codes" in setting.chain)
        return 100 * setting.batch_size // 2**saved

    def change(gpu_nbytes, chain=text, **said):
        tried.clear()
        options = {"checkpointing": True, "rewrite": True} | said
        return cheapest_change(Setting(chain, 4, False), gpu_nbytes, predict, peak=400, fixed=0, **options)

    assert change(250).startswith("it fits with batch_size=2 (and gradient_accumulation=2)")
    assert [setting.batch_size for setting in tried] == [2]  # the line tells it
    assert change(150).startswith("it fits with batch_size=1 (and gradient_accumulation=4)")
    assert change(60).startswith("it fits with batch_size=1 and gradient_checkpointing (and gradient_accumulation=4)")
    assert "batch_size=1 and gradient_checkpointing and nf4 >> lora(r=4) >> regrid(start=codes)" in change(30)
    assert change(20).startswith("it does not fit with batch_size=1 and gradient_checkpointing and nf4 >> lora(r=4)")
    assert change(60, rewrite=False, checkpointing=False).startswith("it does not fit with batch_size=1 either (100 b")
    for chain, four in [("lora(r=4)", "nf4 >> lora(r=4)"), ("fp8 >> ia3", "nf4 >> ia3"),
                        ("wanda(0.5) >> int(bits=8, group=64) >> lora(r=2) >> remask",
                         "wanda(0.5) >> int(bits=4, group=64) >> lora(r=2) >> remask")]:  # fmt: skip
        change(1, chain)
        assert str(parse(four)) in [setting.chain for setting in tried]


@pytest.mark.parametrize("fixed", [0, 90, 150])
@pytest.mark.parametrize("gpu_nbytes", range(110, 420, 23))
def test_the_largest_batch_that_fits_is_found_from_any_estimate(gpu_nbytes, fixed):
    """Peaks that are no line: 100 and 10 a row, and 3 more for each row after the fifth."""
    peaks = {rows: 100 + 10 * rows + 3 * max(0, rows - 5) for rows in range(1, 33)}
    said = cheapest_change(
        Setting("lora(r=4)", 32, False), gpu_nbytes, lambda setting: peaks[setting.batch_size],
        peak=peaks[32], fixed=fixed, checkpointing=False, rewrite=False,
    )  # fmt: skip
    fitting = [rows for rows in (16, 8, 4, 2, 1) if peaks[rows] <= gpu_nbytes]
    assert f"batch_size={fitting[0]}" in said


def test_a_model_that_is_not_trained_does_not_fit_by_a_smaller_batch():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    assert "nf4" in plan("magnitude(0.5)", config, gpu="30kB").change
    assert plan("nf4", config, gpu="1kB").change.startswith("it does not fit with batch_size=1 either")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GB", 24 * 10**9), ("80GiB", 80 * 2**30), ("1.5 tb", 15 * 10**11), (7, 7), ("512", 512), ("3kib", 3072)],
)
def test_sizes_of_memory(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "24 G B", "nan", "1e9GB", "24XB", "inf"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(DovetailError, match="24GB or 80GiB"):
        plan("lora(r=2)", llama().config, gpu=text)


def test_training_in_bf16_halves_what_is_stored():
    """The frozen weights are rounded for good, so that the trained model is smaller than the one before."""
    planned = plan("lora(r=2)", llama().config, batch_size=2, length=8, bf16=True, memory=False)
    model = apply(llama(), "lora(r=2)")
    cast_frozen(model)
    found = footprint(model)
    assert (planned.nbytes, planned.bits_per_weight) == (found.nbytes, found.bits_per_weight)
