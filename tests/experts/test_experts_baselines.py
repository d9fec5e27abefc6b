"""Baselines against plain computation: what they keep, what a one is worth, their bytes; scales that are learnt."""

from __future__ import annotations

import math

import pytest
import torch
from peft.utils.merge_utils import random_pruning
from torch import Tensor, nn

from dovetail import experts
from dovetail.checkpoint.adapter import parameters_of
from dovetail.compression.apply import apply
from dovetail.errors import DataError
from dovetail.experts.baselines import bitdelta, dare, prune, stc, train_scales
from dovetail.experts.live.activate import activate, deactivate, put
from dovetail.experts.sources import task_vector
from dovetail.tasks.task import Record, Task
from dovetail.tasks.tokens import Collator, encode
from small_models import bert, llama, make_tokenizer, t5

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def vector(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"c.wide": (30, 70), "a.tall": (500, 4), "b.row": (300,), "d.empty": (0, 3), "e.scalar": ()}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["b.row"] *= 5
    made["b.row"][:40] = 0
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def largest(flat: Tensor, density: float) -> Tensor:
    """Where the largest are, equal ones in their order, zeros not."""
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.abs().sort(descending=True, stable=True).indices[: round(density * flat.numel())]] = True
    return chosen & (flat != 0)


def whole(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_stc_and_pruning(dtype, density, tmp_path):
    tensors = vector(dtype)
    flat = whole(tensors)
    kept = largest(flat, density)
    made = stc(tensors, density)
    scale = flat[kept].abs().mean().item() if kept.any() else 0.0
    assert made.header.scales == pytest.approx((scale,))
    assert torch.equal(
        whole(made.dense()),
        flat.sign() * kept * torch.tensor(made.header.scales[0], dtype=torch.float64).to(dtype).double(),
    )
    assert experts.load(made.save(tmp_path / "stc.dvt")).header == made.header
    pruned = prune(tensors, density)
    assert {n: (t.dtype, t.shape) for n, t in pruned.dense().items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert torch.equal(whole(pruned.dense()), flat * kept)
    assert pruned.kept == int(kept.sum())
    assert pruned.numel == flat.numel()
    if density == 0.05:
        positions = made.nbytes - len(made.coded) - pruned.kept // 8  # without signs; the header is more
        assert pruned.kept * dtype.itemsize < pruned.nbytes < pruned.kept * dtype.itemsize + positions
    assert {tensor.dtype for tensor in pruned.dense(torch.float16).values()} == {torch.float16}


def test_stc_of_each_tensor():
    tensors = vector()
    made = stc(tensors, 0.1, "tensor")
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        kept = largest(flat, 0.1)
        scale = flat[kept].double().abs().mean().item() if kept.any() else 0.0
        assert made.scales[name] == pytest.approx(scale)
        assert torch.equal(made.dense()[name].reshape(-1), flat.sign() * kept * torch.tensor(made.scales[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dare_draws_as_peft_does(dtype):
    tensors = vector(dtype)
    torch.manual_seed(5)
    expected = {name: random_pruning(tensors[name], 0.3, rescale=True) for name in sorted(tensors)}
    made = dare(tensors, 0.3, seed=5)
    for name, tensor in made.dense().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name])
    assert made.density == 0.3
    assert not torch.equal(dare(tensors, 0.3, seed=6).dense()["c.wide"], expected["c.wide"])
    assert torch.equal(dare(tensors, 1.0).dense()["c.wide"], tensors["c.wide"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bitdelta(dtype):
    tensors = vector(dtype)
    made = bitdelta(tensors)
    for name, tensor in tensors.items():
        scale = tensor.double().abs().mean().item() if tensor.numel() else 0.0
        assert made.scales[name] == pytest.approx(scale)
        assert torch.equal(
            made.dense()[name], tensor.sign() * torch.tensor(made.scales[name], dtype=torch.float64).to(dtype)
        )
    assert made.density == 1.0
    assert made.kept == made.numel - 40


def test_vectors_say_what_they_are_of():
    origin = experts.Origin("base", "sha256:" + "2" * 64)
    of = experts.TaskVector(vector(), origin)
    for made in (stc(of, 0.1), prune(of, 0.1), dare(of, 0.1), bitdelta(of)):
        assert made.origin == origin


def test_what_is_out_of_range_is_refused():
    for make in (stc, prune, dare):
        for density in (-0.1, 1.1, math.nan):
            with pytest.raises(DataError, match="density"):
                make(vector(), density)
        for value in (math.nan, math.inf):
            with pytest.raises(DataError, match="layer"):
                make({"layer": torch.tensor([1.0, value])}, 0.5)
        with pytest.raises(DataError, match=r"layer(.|\n)*int64"):
            make({"layer": torch.arange(3)}, 0.5)
    with pytest.raises(DataError, match="above 0"):
        dare(vector(), 0)
    with pytest.raises(DataError, match="per"):
        stc(vector(), 0.1, "layer")  # type: ignore[arg-type]


# Scales that are learnt.

SUMS: list[Record] = [{"prompt": f"sum of {a} plus {b} is", "answer": f" {a}"} for a in ("one", "two", "three")
                      for b in ("four", "five")]  # fmt: skip
LABELS: list[Record] = [
    {"text": f"sum of {word}", "label": place % 2} for place, word in enumerate(["one", "two", "six"])
]


def off(model: nn.Module, content: experts.Expert | experts.TaskVector) -> Tensor:
    """Logits with something in the model."""
    if isinstance(content, experts.Expert):
        activate(model, content)
    else:
        put(model, content)
    rows = encode("generation", SUMS, make_tokenizer(), encoder_decoder=False, max_length=64)
    batch = Collator(0)(rows)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    deactivate(model)
    return logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("chain", [None, "lora(r=4)"])
def test_trained_scales_bring_the_logits_nearer(chain):
    model, tokenizer = llama(), make_tokenizer()
    if chain:
        apply(model, chain)
        with torch.no_grad():
            for number, tensor in enumerate(parameters_of(model).values()):
                tensor += 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
        of = task_vector(model)
    else:
        noise = {name: 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
                 for name, tensor in model.named_parameters() if "proj" in name}  # fmt: skip
        of = experts.TaskVector(noise, experts.Origin("base"))
    start = experts.compress(of, 0.3, 3.0)  # far too large
    activate(model, start)
    deactivate(model)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    required = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    model.train()
    trained = train_scales(start, model, tokenizer, of, SUMS, epochs=10, learning_rate=0.05, progress=False)
    assert model.training
    assert required == {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    wanted = off(model, of)
    far, near = ((off(model, each) - wanted).square().mean().item() for each in (start, trained))
    assert near < 0.5 * far
    assert trained.header.scale == "tensor"
    assert trained.kept == start.kept
    assert trained.origin == start.origin
    assert trained.header.provenance["trained_scales"] == 60
    again = train_scales(start, model, tokenizer, of, SUMS, epochs=10, learning_rate=0.05, progress=False)
    assert again.header == trained.header


def test_gradients_of_scales_are_those_of_the_loss():
    """One step of plain descent on a model under a chain, against differences."""
    model, tokenizer = llama().double(), make_tokenizer()
    noise = {name: 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
             for name, tensor in model.named_parameters() if "up_proj" in name}  # fmt: skip
    of = experts.TaskVector(noise, experts.Origin("base"))
    start = bitdelta(of)
    one = Task("sums", "generation", "exact_match", {"train": SUMS})
    trained = train_scales(start, model, tokenizer, of, one, batch_size=len(SUMS), learning_rate=1e-3, progress=False)
    wanted, loss = off(model, of), (off(model, start) - off(model, of)).square().mean()
    for name in start.shapes:  # Adam's first step is the sign of the gradient
        scales = {**start.scales, name: start.scales[name] * (1 + 1e-5)}
        moved = experts.from_masks(experts.Masks(start.masks().words, start.shapes, scales), start)
        rises = (off(model, moved) - wanted).square().mean() > loss
        assert trained.scales[name] / start.scales[name] == pytest.approx(0.999 if rises else 1.001, abs=1e-5)


def test_scales_of_other_models_are_trained():
    for model, records in ((t5(), SUMS), (bert(2), LABELS)):
        noise = {name: 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
                 for name, tensor in model.named_parameters() if tensor.ndim == 2 and "embed" not in name.lower()
                 and "shared" not in name and "lm_head" not in name}  # fmt: skip
        of = experts.TaskVector(noise, experts.Origin("base"))
        start = bitdelta(of)
        assert train_scales(start, model, make_tokenizer(), of, records, progress=False).scales != start.scales


def test_training_is_refused_where_it_makes_no_sense():
    model, of = llama(), experts.TaskVector({}, experts.Origin("base"))
    for keywords in ({"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0}, {"learning_rate": math.nan}):
        with pytest.raises(DataError, match="train_scales"):
            train_scales(bitdelta(of), model, make_tokenizer(), of, SUMS, **keywords)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="labels"):
        train_scales(bitdelta(of), bert(2), make_tokenizer(), of, [{"text": "one", "label": 7}])
