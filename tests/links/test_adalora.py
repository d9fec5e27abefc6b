"""AdaLoRA: ranks, outputs and penalty against peft's from the same gradients; training, resuming, exchange."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dovetail
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.formats.peft import import_peft
from dovetail.errors import ChainError, LoadError
from families import batch, logits, make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*invalid shape")  # of peft

STEPS, WARMUP, COOLDOWN = 20, 2, 4
WIDTHS = [(32, 16), (24, 32), (16, 24)]
TEXT = f"adalora(r=6, budget=3, alpha=9, warmup={WARMUP / STEPS}, cooldown={COOLDOWN / STEPS}, interval=2)"


class Stack(nn.Module):
    """Three layers, and a loss that peft adds its penalty to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for place, (o, i) in enumerate(WIDTHS):
            setattr(self, f"l{place}", nn.Linear(i, o))

    def forward(self, x: Tensor) -> SimpleNamespace:
        for place in range(len(WIDTHS)):
            x = torch.tanh(getattr(self, f"l{place}")(x))
        return SimpleNamespace(logits=x, loss=x.sum() * 0)


def both() -> tuple[nn.Module, nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """Peft's model and ours with the same parameters, and the pairs of these."""
    names = ["l2", "l1", "l0"]
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=9, tinit=WARMUP, tfinal=COOLDOWN, deltaT=2, total_step=STEPS,
        target_modules=names,
    )  # fmt: skip
    theirs = peft.get_peft_model(Stack(), config)
    ours = dovetail.apply(Stack(), TEXT, targets=names)
    pairs = []
    for name, layer in chain_layers(ours).items():
        own = theirs.base_model.model.get_submodule(name)
        for ours_name, tensor in layer.states[0].named_parameters():
            other = getattr(own, f"lora_{ours_name}")["default"]
            with torch.no_grad():
                other.copy_(tensor.view(other.shape))
            pairs.append((tensor, other))
    return theirs, ours, pairs


def gradients(shapes: list[torch.Size]) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield [(4, 1, 0.5)[place // 3] * torch.randn(shape, generator=generator) for place, shape in enumerate(shapes)]


def test_ranks_and_outputs_are_those_of_peft_from_the_same_gradients() -> None:
    theirs, ours, pairs = both()
    layers = chain_layers(ours)
    link = layers["l0"].states[0].link
    p = {name: dict(layer.states[0].named_parameters()) for name, layer in layers.items()}
    mine, other = (torch.optim.AdamW([pair[side] for pair in pairs], lr=0.05) for side in (0, 1))
    kept: dict[str, Tensor] = {}
    counts = []
    with torch.no_grad():
        link.before_step(p, 0, STEPS, kept)
    for step, drawn in zip(range(1, STEPS + 1), gradients([a.shape for a, _ in pairs]), strict=False):
        for (a, b), gradient in zip(pairs, drawn, strict=True):
            a.grad, b.grad = gradient.clone(), gradient.view(b.shape).clone()
        mine.step()
        other.step()
        with torch.no_grad():
            link.before_step(p, step, STEPS, kept)
        theirs.base_model.update_and_allocate(step)
        counts.append(sum(int((own["E"] != 0).sum()) for own in p.values()))
        for a, b in pairs:
            torch.testing.assert_close(a, b.view(a.shape), rtol=1e-6, atol=1e-7)
    pattern = theirs.peft_config["default"].rank_pattern
    for name, own in p.items():
        assert (own["E"] != 0).tolist() == pattern[f"{name}.lora_E.default"]
    assert counts[WARMUP - 1] == 18
    assert counts[-1] == 9
    assert len({int((own["E"] != 0).sum()) for own in p.values()}) > 1, "layers have different ranks"
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    wanted = theirs.base_model.model(x).logits
    torch.testing.assert_close(ours(x).logits, wanted, rtol=1e-6, atol=1e-6)


def test_penalty_has_the_gradient_of_peft() -> None:
    theirs, ours, pairs = both()
    theirs.base_model(torch.zeros(1, 16)).loss.backward()
    layers = chain_layers(ours)
    p = {name: dict(layer.states[0].named_parameters()) for name, layer in layers.items()}
    with torch.no_grad():
        added = layers["l0"].states[0].link.before_step(p, 0, STEPS, {})
    found = {id(p[layer][name]): tensor for layer, own in added.items() for name, tensor in own.items()}
    for a, b in pairs:
        if id(a) in found:
            torch.testing.assert_close(found[id(a)], b.grad, rtol=1e-5, atol=1e-8)
    assert len(found) == 6
    orthogonal = {"l": {"A": torch.eye(3, 5), "B": torch.eye(5, 3), "E": torch.zeros(3)}}
    still = dovetail.chain("adalora(r=3, budget=2)").links[0].before_step(orthogonal, 0, STEPS, {})
    assert not any(tensor.any() for tensor in still["l"].values())


def trained(folder: Path | None = None, text: str = "adalora(r=6, budget=2)", **settings):
    model, tokenizer = dovetail.load("playground")
    dovetail.apply(model, text, targets=["q_proj", "down_proj"])
    records = [{"text": f"the sailor has {n} plums"} for n in range(8)]
    report = dovetail.train(
        model, tokenizer, records, max_steps=8, batch_size=2, progress=False, output_dir=folder, **settings
    )
    return model, report


def ranks(model: nn.Module) -> list[int]:
    return [int((layer.states[0].values()["E"] != 0).sum()) for layer in chain_layers(model).values()]


def test_training_prunes_to_the_budget_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, _ = trained()
    found = ranks(model)
    assert sum(found) == 2 * len(found)
    trained(tmp_path, stop_after=4, checkpoint_every=2)
    (kept,) = [path for path in tmp_path.rglob("kept.safetensors") if "checkpoint-4" in str(path)]
    assert any(name.endswith("/sensitivity") for name in load_file(kept))
    again, _ = trained(tmp_path, resume=True, checkpoint_every=2)
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_penalty_brings_the_factors_towards_orthogonal_ones() -> None:
    distances = []
    for weight in (0, 0.5):
        model, _ = trained(text=f"adalora(r=6, budget=2, orthogonality={weight})", lr_scale=10)
        own = [layer.states[0].values()["A"].detach() for layer in chain_layers(model).values()]
        distances.append(sum(float((a @ a.t() - torch.eye(6)).norm()) for a in own))
    assert distances[1] < 0.9 * distances[0]


@pytest.mark.parametrize("pruned", [False, True])
def test_adapters_of_peft_come_and_go(pruned: bool, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(make("llama").float(), config)
    sent = batch(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    if pruned:
        kept = [[True, False, True, True], [False, False, False, False], [False, True, False, False]]
        names = [name for name, _ in theirs.base_model.model.named_parameters() if "lora_E" in name]
        theirs.peft_config["default"].rank_pattern = {
            name: kept[place % len(kept)] for place, name in enumerate(sorted(names))
        }
        theirs.base_model.rankallocator.mask_using_rank_pattern(
            theirs.base_model.model, theirs.peft_config["default"].rank_pattern
        )
    theirs.eval().save_pretrained(str(tmp_path / "theirs"))
    with torch.no_grad():
        wanted = logits(theirs, sent)
        ours = import_peft(make("llama").float(), tmp_path / "theirs")
        torch.testing.assert_close(logits(ours, sent), wanted, rtol=1e-5, atol=1e-5)
        assert str(chain_layers(ours)["model.layers.0.self_attn.q_proj"].states[0].link).startswith(
            "adalora(r=4, budget=2, alpha=6"
        )
        folder = dovetail.export_peft(ours, tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(make("llama").float(), str(folder)).eval()
        torch.testing.assert_close(logits(back, sent), wanted, rtol=1e-5, atol=1e-5)
        dovetail.merge(ours)
        torch.testing.assert_close(logits(ours, sent), wanted, rtol=1e-5, atol=1e-5)


def test_a_rank_pattern_of_other_layers_is_refused(tmp_path: Path) -> None:
    model = make("llama").float()
    dovetail.apply(model, "adalora(r=4, budget=2)", targets=["q_proj"])
    folder = dovetail.export_peft(model, tmp_path)
    said = json.loads((folder / "adapter_config.json").read_text())
    said["rank_pattern"] = {"model.layers.0.self_attn.q_proj.lora_E": [True, False]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(LoadError, match="which of its 4 ranks remain"):
        import_peft(make("llama").float(), folder)


@pytest.mark.parametrize(
    "text",
    ["adalora(r=4, budget=5)", "adalora(warmup=0.5, cooldown=0.5)", "adalora(interval=0)", "adalora(orthogonality=-1)"],
)
def test_arguments_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ChainError):
        dovetail.chain(text)
