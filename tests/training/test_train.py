"""Training: learning rates per link, stages, resuming to the same bits, precision, memory, refusals."""

from __future__ import annotations

import importlib.machinery
import re
import sys
import tempfile
import types
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import JetMoeConfig, JetMoeForCausalLM

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.compression.apply import apply
from dovetail.compression.calibration import calibration_batches
from dovetail.errors import DataError, TrainError
from dovetail.tasks.scoring import evaluate
from dovetail.tasks.task import Task
from dovetail.tasks.tokens import Collator, encode
from dovetail.tasks.vocabulary import pad_id
from dovetail.training.peak_memory import PeakMemory
from dovetail.training.predict import predict_peak_memory
from dovetail.training.settings import TrainSettings
from dovetail.training.train import train
from dovetail.training.trainer import BatchOrder, mean_loss
from small_models import (
    BEGIN,
    END,
    LABELS,
    SUMS,
    VALUES,
    bert,
    llama,
    make_tokenizer,
    parameters,
    quiet,
    same,
    sum_records,
    t5,
    training_killed_at,
)
from small_runs import small_recipe


def test_a_whole_model_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = llama()
    state = torch.get_rng_state()
    report = quiet(model, SUMS, max_steps=60, learning_rate=3e-3, evaluate_every=30)
    (stage,) = report.stages
    assert stage.links == []
    assert stage.learning_rates == {"model": 3e-3}
    assert stage.trainable_parameters == sum(p.numel() for p in model.parameters())
    assert [step for step, _ in stage.losses] == list(range(1, 61))
    assert stage.losses[-1][1] < 0.2 * stage.losses[0][1]
    assert [step for step, _ in stage.evaluations] == [30, 60]
    assert stage.evaluations[-1][1]["exact_match"] > 0.8
    assert stage.peak_memory_nbytes > 4 * 4 * stage.trainable_parameters
    assert not model.training
    assert model.config.use_cache
    assert not any(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_bits():
    results = []
    for seed in (0, 0, 1):
        model = apply(llama(), "lora(r=4, dropout=0.1) >> ia3")
        quiet(model, SUMS, max_steps=4, seed=seed)
        results.append(parameters(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_stages_and_learning_rates():
    model = apply(bert(2), "magnitude(0.3) >> ia3 >> lora(r=4) >> remask >> int(bits=4, group=32) >> lora(r=2) >> ia3")
    before = parameters(model)
    report = quiet(model, LABELS, max_steps=5, lr_scale=0.5, head_learning_rate=2e-3)
    assert [stage.links for stage in report.stages] == [["ia3", "lora(r=4)"], ["lora(r=2)", "ia3"]]
    assert report.stages[0].learning_rates == {"ia3": 5e-3, "lora(r=4)": 2e-4, "heads": 1e-3}
    after = parameters(model)
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(after[name], before[name])
    layers = chain_layers(model).values()
    assert all(layer.base.quantized is not None for layer in layers)
    assert all(str(state.link) in ("lora(r=2)", "ia3") for layer in layers for state in layer.states)
    assert report.peak_memory_nbytes == max(stage.peak_memory_nbytes for stage in report.stages)


TWO_STAGES = "magnitude(0.3) >> lora(r=4) >> remask >> int(bits=4, group=32) >> lora(r=2, dropout=0.1)"


@pytest.mark.parametrize(
    ("chain", "stopped_at"), [(None, 2), ("lora(r=4, dropout=0.1)", 8), (TWO_STAGES, 8), (TWO_STAGES, 16)]
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, chain, stopped_at):
    settings = {"max_steps": 8, "batch_size": 16, "checkpoint_every": 3, "evaluate_every": 4}  # epochs of 5 steps

    def fresh():
        return llama() if chain is None else apply(llama(), chain)

    whole = fresh()
    expected = quiet(whole, SUMS, **settings)
    with training_killed_at(stopped_at):
        quiet(fresh(), SUMS, output_dir=tmp_path / "run", **settings)
    for path in (tmp_path / "run").glob("stage-*/checkpoint-*/complete"):
        assert {"trained.safetensors", "optimizer.pt"} <= {file.name for file in path.parent.iterdir()}
        (path.parent.parent / "checkpoint-99").mkdir(exist_ok=True)  # a half-written one, which doesn't count
    torch.manual_seed(1234)
    model = fresh()
    report = quiet(model, SUMS, output_dir=tmp_path / "run", resume=True, **settings)
    assert same(parameters(model), parameters(whole))
    for ours, theirs in zip(report.stages, expected.stages, strict=True):
        assert (ours.losses, ours.evaluations, ours.steps) == (theirs.losses, theirs.evaluations, theirs.steps)
    again = fresh()
    assert quiet(again, SUMS, output_dir=tmp_path / "run", resume=True, **settings).stages == report.stages
    assert same(parameters(again), parameters(whole))


def test_a_directory_holds_one_run(tmp_path):
    quiet(llama(), SUMS, max_steps=2, output_dir=tmp_path)
    with pytest.raises(TrainError, match="earlier run"):
        quiet(llama(), SUMS, max_steps=2, output_dir=tmp_path)
    with pytest.raises(TrainError, match="max_steps"):
        quiet(llama(), SUMS, max_steps=3, output_dir=tmp_path, resume=True)
    with pytest.raises(TrainError, match="continue with the chain"):
        quiet(apply(llama(), "lora(r=4)"), SUMS, max_steps=2, output_dir=tmp_path, resume=True)
    with pytest.raises(TrainError, match="output_dir"):
        quiet(llama(), SUMS, max_steps=2, resume=True)


@pytest.mark.parametrize(
    ("make", "data"), [(llama, SUMS), (t5, SUMS), (lambda: bert(2), LABELS), (lambda: bert(1), VALUES)]
)
def test_accumulated_batches_are_one_batch(make, data):
    tokenizer = make_tokenizer(end=make is t5)
    results = []
    for batch, accumulated in ((16, 1), (4, 4)):
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        report = quiet(
            model, data, tokenizer, max_steps=7, batch_size=batch, gradient_accumulation=accumulated,
            group_by_length=False,
        )  # fmt: skip
        results.append([loss for _, loss in report.stages[0].losses])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model = apply(llama(), "lora(r=4, dropout=0.1) >> ia3")
        report = quiet(model, SUMS, max_steps=3, gradient_checkpointing=checkpointing)
        results.append((parameters(model), report.peak_memory_nbytes))
        assert not model.is_activation_checkpointing
    assert same(results[0][0], results[1][0])
    assert results[1][1] < results[0][1]


@pytest.mark.parametrize("chain", ["lora(r=4) >> ia3", "nf4 >> lora(r=4)", "dora(r=4)"])
def test_bf16(chain):
    reports, models = [], []
    for bf16 in (False, True):
        models.append(apply(bert(2).eval(), chain))
        evaluate(models[-1], make_tokenizer(), LABELS, split="train", progress=False)  # leaves nothing that hinders
        reports.append(quiet(models[-1], LABELS, max_steps=4, bf16=bf16))
    losses = [[loss for _, loss in report.stages[0].losses] for report in reports]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    for name, parameter in models[1].named_parameters():
        adapter = parameter.requires_grad and "classifier" not in name and "pooler" not in name
        assert parameter.dtype == (torch.float32 if adapter else torch.bfloat16), name
    assert evaluate(models[1], make_tokenizer(), LABELS, split="train", progress=False)["labels"]["n"] == 72


def test_an_encoder_decoder_learns():
    model = apply(t5(), "lora(r=8)")
    report = quiet(model, SUMS, make_tokenizer(end=True), max_steps=30, lr_scale=10)
    assert report.stages[0].losses[-1][1] < report.stages[0].losses[0][1]


def test_order_of_rows():
    random = Random(0)
    lengths = [random.randint(3, 60) for _ in range(1003)]
    order = BatchOrder(lengths, batch_size=8, step_rows=16, grouped=True, seed="0")
    first = list(order)
    assert sorted(first) == list(range(1003))
    assert first == list(order)
    assert lengths[first[16]] == max(lengths)
    batches = [[lengths[row] for row in first[at : at + 8]] for at in range(24, 1000, 8)]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 4
    assert abs(torch.corrcoef(torch.tensor([[b[0] for b in batches], list(range(len(batches)))]).float())[0, 1]) < 0.3
    order.set_epoch(1)
    assert list(order) != first
    assert sorted(BatchOrder([1, 2, 9], batch_size=8, step_rows=8, grouped=True, seed="0")) == [0, 1, 2]


def test_peak_memory_counts_what_is_alive():
    kept = torch.ones(10)
    with PeakMemory([kept]) as memory:
        a = torch.ones(1000)
        b = a * 2
        del a
        c = b.view(10, 100)[:5]
        assert memory.live_nbytes == 4010 * 4 - 3000 * 4
        del b
        assert memory.live_nbytes == 4040
        c = c + 1
    assert memory.peak_nbytes == 8040
    assert memory.live_nbytes == 2040


def test_no_python_code_runs_when_a_tensor_is_freed():
    """Python drops what is raised there, such as Ctrl-C."""
    kept = [torch.ones(10), torch.ones(20)]
    found = [reference.__callback__ for reference, _ in PeakMemory(kept)._seen.values()]
    assert len(found) == 2
    assert all(isinstance(callback, types.BuiltinFunctionType) for callback in found)


def _some_layers() -> nn.Module:
    model = llama().requires_grad_(False)
    model.lm_head.weight = model.model.embed_tokens.weight  # tied, as the playground's
    model.model.layers[1].requires_grad_(True)
    return model


@pytest.mark.parametrize("make", [
    llama, _some_layers, lambda: apply(llama(), "lora(r=4) >> ia3"), lambda: apply(llama(), "dora(r=4)"),
])  # fmt: skip
def test_peak_memory_is_predicted_without_weights(make):
    tokenizer = make_tokenizer()
    measured = quiet(make(), SUMS, tokenizer, max_steps=4, batch_size=16).peak_memory_nbytes
    rows = encode("generation", SUMS.split("train"), tokenizer, encoder_decoder=False, max_length=512)
    ids = torch.ones(16, max(len(row["input_ids"]) for row in rows), dtype=torch.int64)
    widest = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    with torch.device("meta"):
        model = make()
    predicted = predict_peak_memory(model, widest, TrainSettings())
    assert predicted == pytest.approx(measured, rel=0.02)
    assert all(p.is_meta for p in model.parameters())


def test_refusals():
    with pytest.raises(TrainError, match="step 2"):
        quiet(llama(), SUMS, max_steps=30, learning_rate=1e30)
    with pytest.raises(TrainError, match="no parameter"):
        quiet(llama().requires_grad_(False), SUMS)
    with pytest.raises(TrainError, match="no parameter"):
        quiet(apply(llama(), "magnitude(0.5)"), SUMS)
    with pytest.raises(DataError, match="num_labels"):
        quiet(bert(2), Task("labels", "classification", "accuracy", {"train": [{"text": "one", "label": 2}]}))
    with pytest.raises(DataError, match="split"):
        quiet(llama(), Task("sums", "generation", "exact_match", {"test": sum_records(2)}))
    with pytest.raises(DataError, match="the model must be a language model"):
        quiet(bert(2), SUMS)
    for label in (1, 0.5):  # a causal model's config has num_labels too
        with pytest.raises(DataError, match="the model must have a head over texts"):
            quiet(llama(), [{"text": "one", "label": label}])
    for data in ({"train": sum_records(2)}, (record for record in sum_records(2)), 5, ["one two"]):
        with pytest.raises(DataError, match="records"):
            quiet(llama(), data)
    records = [{"prompt": "one", "answer": "two"}, {"prompt": "one", "answer": "two " * 80}]
    with pytest.raises(DataError, match="record 1"):
        quiet(llama(), Task("sums", "generation", "exact_match", {"train": records}))
    for settings in ({"epochs": 0}, {"lr_scale": -1.0}, {"schedule": "up"}, {"warmup": 1.0}, {"max_steps": 0}):
        with pytest.raises(TrainError, match=next(iter(settings))):
            quiet(llama(), SUMS, **settings)


def test_train_documents_every_setting_and_refuses_others():
    for name in TrainSettings.model_fields:
        assert re.search(rf"\b{name}\b", train.__doc__ or ""), name
    with pytest.raises(TrainError, match="did you mean lr_scale"):
        quiet(llama(), SUMS, lr_scal=2)


def test_losses_and_validation_scores_are_logged_as_they_are_known():
    lines: list[tuple[int, int, dict[str, Any]]] = []
    report = quiet(apply(llama(), TWO_STAGES), SUMS, max_steps=4, evaluate_every=2, evaluate_limit=5,
                   on_log=lambda *line: lines.append(line))  # fmt: skip
    for number, stage in enumerate(report.stages, 1):
        mine = [(step, what) for stage_number, step, what in lines if stage_number == number]
        assert [(step, what["loss"]) for step, what in mine if "loss" in what] == stage.losses
        assert [(step, what["validation"]) for step, what in mine if "validation" in what] == stage.evaluations
        assert [step for step, _ in stage.evaluations] == [2, 4]
        assert [step for step, _ in mine] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("make", [llama, t5, lambda: bert(1)])
def test_mean_loss_is_the_loss_of_all_rows_at_once(make):
    model, data, tokenizer = (
        make().double(),
        VALUES if make not in (llama, t5) else SUMS,
        make_tokenizer(end=make is t5),
    )
    rows = encode(data.kind, data.split("train")[:10], tokenizer, encoder_decoder=make is t5, max_length=99)
    with torch.no_grad():
        expected = model.eval()(**Collator(pad_id(tokenizer))(rows)).loss.item()
    assert mean_loss(model.train(), rows, Collator(pad_id(tokenizer)), 3) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_an_experiment_tracker_gets_losses_and_scores(tmp_path, monkeypatch):
    scalars, folders = [], []

    class SummaryWriter:
        def __init__(self, log_dir):
            folders.append(log_dir)

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def add_text(self, *_): ...
        def flush(self): ...
        def close(self): ...

    module = types.ModuleType("tensorboardX")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorboardX", None)
    module.SummaryWriter = SummaryWriter  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    (stage,) = quiet(apply(llama(), "lora(r=2)"), SUMS, max_steps=3, evaluate_every=2, evaluate_limit=4,
                     report_to="tensorboard", logging_dir=tmp_path).stages  # fmt: skip
    assert folders == [str(tmp_path / "stage-1")]
    assert [(step, value) for name, value, step in scalars if name == "train/loss"] == stage.losses
    scores = {name: value for name, value, step in scalars if step == 2 and name.startswith("eval/")}
    assert scores == {f"eval/{name}": value for name, value in stage.evaluations[0][1].items()}


def test_an_experiment_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("dovetail.training.settings.find_spec", lambda name: None)
    with pytest.raises(TrainError, match="pip install wandb"):
        quiet(llama(), SUMS, report_to="wandb")
    with pytest.raises(TrainError, match="report_to"):
        quiet(llama(), SUMS, report_to="paper")


def test_rows_of_a_batch_agree_with_the_tokenizer():
    """What training sees and what calibration sees are the same rows."""
    (batch,) = calibration_batches(SUMS, make_tokenizer(begin=True), samples=4)
    assert (batch["input_ids"][:, 0] == BEGIN).all()
    assert ((batch["input_ids"] == END).sum(1) == 1).all()
    rows = encode("pairs", [{"good": "one"}], make_tokenizer(), encoder_decoder=False, max_length=9)
    assert Collator(0)(rows)["labels"].tolist() == [[-100, rows[0]["input_ids"][1]]]


def test_a_run_is_not_resumed_on_another_base(tmp_path):
    settings = {"max_steps": 6, "checkpoint_every": 2}
    with training_killed_at(4):
        quiet(apply(llama(), "magnitude(0.3) >> lora(r=4)"), SUMS, output_dir=tmp_path / "run", **settings)
    other = apply(llama(), "magnitude(0.3) >> lora(r=4)")
    layer = next(iter(chain_layers(other).values()))
    layer.base.set_dense(layer.base.matrix() * 1.5)  # as another machine may compress it
    with pytest.raises(TrainError, match="base other than"):
        quiet(other, SUMS, output_dir=tmp_path / "run", resume=True, **settings)


def test_checkpointing_of_a_model_without_it_is_refused(tmp_path):
    config = JetMoeConfig(
        vocab_size=len(make_tokenizer()), hidden_size=64, num_hidden_layers=1, num_key_value_heads=2, kv_channels=16,
        intermediate_size=64, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = JetMoeForCausalLM(config)
    with pytest.raises(TrainError, match="support gradient checkpointing"):
        quiet(model, SUMS, gradient_checkpointing=True)
    with pytest.raises(TrainError, match="support gradient checkpointing"):
        dovetail.plan("lora(r=2)", config, gradient_checkpointing=True)
    recipe = small_recipe(tmp_path, chain="lora(r=2)", merge="none")
    model.save_pretrained(recipe["model"])
    recipe["train"]["gradient_checkpointing"] = True
    with pytest.raises(TrainError, match="support gradient checkpointing"):
        dovetail.run(recipe, output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
