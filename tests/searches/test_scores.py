"""Scores of layers equal their definitions, computed apart from them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dovetail.chains.notation import chain
from dovetail.errors import NotFinite, SearchError
from dovetail.runs.recipe import Recipe
from dovetail.searches.scores import entropy, gradient_scores
from dovetail.searches.trial import Workbench
from dovetail.tasks.find import load_task
from dovetail.tasks.tokens import RowMaker
from small_models import make_tokenizer, t5
from small_runs import save_labels, save_model, small_recipe, write_lines

torch.set_num_threads(1)
OPTIONS = [chain(f"int(bits={bits}, group=16)").links for bits in (2, 4)]
RANKS = (1, 4, 100)
SAMPLES = 7
CLOSE = 1e-6
"""transformers computes the loss of a float64 model in float32."""


def bench_of(given: dict) -> Workbench:
    recipe = Recipe.parse({
        **given, "chain": "int(bits=4, group=16) >> lora(r=2)", "merge": "none", "calibration": {"inputs": "original"},
    })  # fmt: skip
    empty = Workbench(recipe, load_task(recipe.data))
    return Workbench(recipe, load_task(recipe.data), applied=dict.fromkeys(empty.layers, OPTIONS))


def small(folder, batch_size: int = 4, **changes) -> Workbench:
    train = {"max_steps": 2, "batch_size": batch_size, "lr_scale": 10}
    return bench_of(small_recipe(folder, **{"dtype": "float64", "train": train, **changes}))


def gradients(bench: Workbench):
    return gradient_scores(bench, dict.fromkeys(bench.layers, OPTIONS), RANKS, SAMPLES)


def drawn(bench: Workbench):
    """The rows that scores are taken on, each as a batch of its own."""
    from random import Random

    records = bench.task.split("train")
    chosen = Random(bench.recipe.seed).sample(range(len(records)), SAMPLES)
    make = RowMaker(bench.tokenizer, False, 512)
    for row in make.examples(bench.task.kind, [records[number] for number in chosen]):
        yield torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])


def loss_of(model, ids, labels) -> torch.Tensor:
    return F.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")


def test_fisher_is_the_square_of_each_tokens_derivative(tmp_path):
    bench = small(tmp_path)
    with bench.tuned(2) as model:
        scores = gradients(bench)
        sums, labels = dict.fromkeys(scores.fisher, 0.0), 0
        for ids, wanted in drawn(bench):
            labels += int((wanted != -100).sum())
            amounts = {key: torch.zeros(ids.shape[1], 1, dtype=torch.float64, requires_grad=True) for key in sums}

            def disturb(name, amounts=amounts):
                def hook(module, args, y):
                    for applied in OPTIONS:
                        change = bench.base(name, applied).matrix() - bench.base(name, ()).matrix()
                        y = y + amounts[name, applied] * (args[0] @ change.T)
                    return y

                return model.get_submodule(name).register_forward_hook(hook)

            handles = [disturb(name) for name in bench.layers]
            slopes = torch.autograd.grad(loss_of(model, ids, wanted), list(amounts.values()))
            for key, slope in zip(amounts, slopes, strict=True):
                sums[key] += float(slope.square().sum())
            for handle in handles:
                handle.remove()
    assert scores.fisher == pytest.approx({key: value / labels for key, value in sums.items()}, rel=CLOSE)
    assert all(value > 0 for value in scores.fisher.values())
    name = bench.layers[3]
    assert scores.fisher[name, OPTIONS[0]] > scores.fisher[name, OPTIONS[1]]


def test_energy_is_that_of_the_weight_gradient(tmp_path):
    bench = small(tmp_path)
    scores = gradients(bench)
    plain = AutoModelForCausalLM.from_pretrained(bench.recipe.model, dtype=torch.float64)
    labels = 0
    for ids, wanted in drawn(bench):
        loss_of(plain, ids, wanted).backward()
        labels += int((wanted != -100).sum())
    for name, found in scores.energy.items():
        squares = torch.linalg.svdvals(plain.get_submodule(name).weight.grad / labels).square()
        assert found == pytest.approx([float(squares[:rank].sum()) for rank in RANKS], rel=CLOSE)
        assert found[0] < found[1] < found[2]


def test_gradient_scores_do_not_depend_on_batches(tmp_path):
    one, other = gradients(small(tmp_path, 1)), gradients(small(tmp_path, 5))
    assert one.fisher == pytest.approx(other.fisher, rel=CLOSE)
    for name, energy in one.energy.items():
        assert energy == pytest.approx(other.energy[name], rel=CLOSE)


def test_gradient_scores_need_one_pass_and_leave_nothing(tmp_path, monkeypatch):
    bench = small(tmp_path)
    with bench.tuned(1) as model:
        before = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
        passes, compressed = [], []
        handle = model.register_forward_hook(lambda *_: passes.append(1) if torch.is_grad_enabled() else None)
        base = bench.base
        monkeypatch.setattr(bench, "base", lambda name, applied: compressed.append(name) or base(name, applied))
        first = gradients(bench)
        handle.remove()
        assert len(passes) == math.ceil(SAMPLES / 4)
        assert len(compressed) == len(passes) * len(bench.layers) * (1 + len(OPTIONS))
        assert first == gradients(bench)
        after = [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]
        assert all(one[0] == other[0] and one[1] is other[1] for one, other in zip(before[0], after[0], strict=True))
        assert before[1] == after[1]
        assert not any(module._forward_hooks for module in model.modules())


def with_head(folder, change) -> None:
    """Change the weights of the head of the saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model.lm_head.weight)
    model.save_pretrained(folder)


def test_entropy_of_a_uniform_head_is_zero(tmp_path):
    given = small_recipe(tmp_path)
    with_head(given["model"], lambda weight: weight.zero_())
    assert entropy(bench_of(given), SAMPLES) == pytest.approx(dict.fromkeys(bench_of(given).layers, 0.0), abs=1e-9)


def test_entropy_of_a_certain_head_is_that_of_the_output(tmp_path):
    given = small_recipe(tmp_path, dtype="float64")
    with_head(given["model"], lambda weight: weight.mul_(1e7))
    bench = bench_of(given)
    with torch.no_grad():
        tokens = torch.cat([
            bench.model(ids).logits[0, :-1].argmax(-1)[labels[0, 1:] != -100] for ids, labels in drawn(bench)
        ])  # fmt: skip
    share = torch.bincount(tokens).double() / len(tokens)
    expected = -float(torch.special.xlogy(share, share).sum())
    assert expected > 0.1
    assert entropy(bench, SAMPLES) == pytest.approx(dict.fromkeys(bench.layers, expected), abs=1e-6)


def test_entropy_is_read_by_norm_and_head(tmp_path):
    bench = small(tmp_path)
    found = entropy(bench, SAMPLES)
    model = bench.model
    mean, conditional, count = 0.0, [0.0, 0.0], 0
    with torch.no_grad():
        for ids, labels in drawn(bench):
            at = labels[0, 1:] != -100
            states = model(ids, output_hidden_states=True).hidden_states  # the last one is normalized
            logits = [model.lm_head(model.model.norm(states[1])), model.lm_head(states[2])]
            for block, each in enumerate(logits):
                p = each[0, :-1][at].softmax(-1)
                conditional[block] -= float((p * p.log()).sum())
            mean, count = mean + p.sum(0), count + len(p)
    whole = -float((mean / count * (mean / count).log()).sum())
    expected = [whole - each / count for each in conditional]
    assert found == pytest.approx({name: expected[int(name.split(".")[2])] for name in bench.layers}, rel=1e-9)
    assert found == pytest.approx(entropy(small(tmp_path, 1), SAMPLES), rel=1e-9)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["choice", "text", "pairs"])
def test_every_kind_of_task_is_scored(tmp_path, kind):
    records = {
        "choice": [{"prompt": "the sum is", "choices": [" one", " two plus"], "label": at % 2} for at in range(9)],
        "text": [{"text": "one two three" + " four" * at} for at in range(9)],
        "pairs": [{"good": "one two" + " six" * at, "bad": "two one"} for at in range(9)],
    }[kind]
    path = str(write_lines(tmp_path / f"{kind}.jsonl", records))
    bench = small(tmp_path, data={"name": kind, "kind": kind, "train": path, "validation": path})
    scores, blocks = gradients(bench), entropy(bench, SAMPLES)
    assert all(value > 0 for value in scores.fisher.values())
    assert all(math.isfinite(value) for value in blocks.values())


def test_classifiers_are_scored(tmp_path):
    targets = ["bert.encoder.*"]
    given = {"model": str(save_model(tmp_path / "base", labels=2)), "data": save_labels(tmp_path), "targets": targets}
    benches = [bench_of({**given, "train": {"batch_size": size}}) for size in (1, 5)]
    one, other = (gradients(bench) for bench in benches)
    assert one.fisher == pytest.approx(other.fisher, rel=1e-3)
    assert all(value > 0 for value in one.fisher.values())
    scores = entropy(benches[0], SAMPLES)
    assert scores == pytest.approx(entropy(benches[1], SAMPLES), abs=1e-5)
    assert 0 <= next(iter(scores.values())) <= math.log(2)
    with pytest.raises(SearchError, match="a layer outside of blocks"):
        entropy(bench_of({**given, "targets": ["bert.*"]}), SAMPLES)


def test_encoders_that_a_decoder_reads_have_no_entropy(tmp_path):
    given = small_recipe(tmp_path)
    t5().save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    given["model"] = str(tmp_path / "t5")
    bench = bench_of(given)
    scores = gradients(bench)
    assert all(value > 0 for value in scores.fisher.values())
    with pytest.raises(SearchError, match="a block of an encoder"):
        entropy(bench, SAMPLES)
    found = entropy(bench_of({**given, "targets": ["decoder.block.*"]}), SAMPLES)
    assert len(set(found.values())) == 2


def test_a_regression_has_no_entropy(tmp_path):
    data = save_labels(tmp_path) | {"kind": "regression", "metric": "pearson"}
    bench = bench_of({"model": str(save_model(tmp_path / "base", labels=1)), "data": data})
    assert all(math.isfinite(value) for value in gradients(bench).fisher.values())
    with pytest.raises(SearchError, match="a regression"):
        entropy(bench, SAMPLES)


def test_scores_that_are_not_finite_are_refused(tmp_path):
    bench = small(tmp_path)
    with bench.tuned(1) as model, torch.no_grad():
        layer = model.get_submodule("model.layers.1.mlp.up_proj")
        next(iter(layer.links[0].parameters())).fill_(math.nan)
        for score in (lambda: gradients(bench), lambda: entropy(bench, SAMPLES)):
            with pytest.raises(NotFinite, match=r"model\.layers\.1\.mlp\.up_proj"):
                score()
    with torch.no_grad():  # the error of compressing overflows, the model itself does not
        bench.base("model.layers.0.mlp.down_proj", OPTIONS[0]).quantized.scale_og.fill_(math.inf)
    with pytest.raises(NotFinite, match=r"score of model\.layers\.0\.mlp\.down_proj"):
        gradients(bench)
