"""Law: after `activate(model, e)` the live adapter is e and nothing else, whatever was there, or LoadError.

A live model with any adapter A, trained or not, computes with the expert B what a new base computes with B unpacked.
`deactivate` restores A bit for bit. Starts are copies: no value of the base is counted twice or changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import dovetail
from dovetail import experts
from dovetail.chains.layer.linear import chain_layers
from dovetail.errors import LoadError
from dovetail.experts.store.store import Store
from peft_settings import answer, base_of, close, tuned

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own

ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]
METHODS: dict[str, Any] = {
    "lora": lambda **k: peft.LoraConfig(r=4, **k),
    "dora": lambda **k: peft.LoraConfig(r=4, use_dora=True, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=[], **k),
    "loha": lambda **k: peft.LoHaConfig(r=4, **k),
    "vera": lambda **k: peft.VeraConfig(r=4, **k),
    "adalora": lambda **k: peft.AdaLoraConfig(total_step=10, **k),
    "oft": lambda **k: peft.OFTConfig(oft_block_size=16, **k),
    "psoft": lambda **k: peft.PsoftConfig(r=4, **k),
    "hra": lambda **k: peft.HRAConfig(r=4, **k),
}
LIVE: dict[str, Any] = {
    "the_same": {},
    "more_targets": {"target_modules": ALL},
    "a_head": {"target_modules": ALL, "modules_to_save": ["lm_head"]},
    "a_norm": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [5, 9]},
    "biases": {"bias": "all"},
    "fewer_targets": {"target_modules": ["v_proj"]},
}
EXPERTS: dict[str, Any] = {
    "plain": {},
    "a_head": {"modules_to_save": ["lm_head"]},
    "an_embedding": {"modules_to_save": ["embed_tokens"]},
    "biases": {"bias": "all"},
    "tokens": {"trainable_token_indices": [7, 3]},
}
CASES = [
    *((method, live, "plain", "llama") for method in METHODS for live in ("the_same", "more_targets", "a_head")),
    *(("lora", live, "plain", "tied_llama") for live in LIVE),
    *(("lora", live, expert, ("llama", "tied_llama")[(at + turn) % 2])
      for at, live in enumerate(LIVE) for turn, expert in enumerate(EXPERTS)),
]  # fmt: skip
MUST_WORK = {(live, "plain") for live in LIVE if live != "fewer_targets"} | {("a_head", "a_head")}
NOT_VERA = {"more_targets", "a_head"}  # peft's VeRA draws projections as wide as the widest of its layers
NO_NEUTRAL = {"hra"}


def config(method: str, chosen: dict[str, Any]) -> peft.PeftConfig:
    return METHODS[method](**({"target_modules": ["q_proj"]} | chosen))


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def made(
    method: str, chosen: dict[str, Any], family: str, folder: Path, **saving: Any
) -> tuple[experts.Expert, Tensor]:
    """Return an expert, and the logits of stock peft on a new base with the expert unpacked."""
    tuned(family, config(method, chosen), folder / "b", **saving)
    expert = experts.compress(experts.task_vector(folder / "b", base_of(family)), 0.5, 3.0)
    experts.unpack(expert, folder / "unpacked", base_of(family))
    return expert, answer(peft.PeftModel.from_pretrained(base_of(family), str(folder / "unpacked")))


@pytest.mark.parametrize(("method", "live", "expert", "family"), dict.fromkeys(CASES))
def test_the_live_adapter_is_the_expert(method: str, live: str, expert: str, family: str, tmp_path: Path) -> None:
    if method != "lora" and "trainable_token_indices" in (LIVE[live] | EXPERTS[expert]):
        pytest.skip("LoRA alone trains tokens")
    one, wanted = made(method, EXPERTS[expert], family, tmp_path)
    tuned(family, config(method, LIVE[live]), tmp_path / "a")
    model = peft.PeftModel.from_pretrained(base_of(family), str(tmp_path / "a")).eval()
    before = held(model)
    try:
        experts.activate(model, one)
    except LoadError:
        assert same(held(model), before)
        possible = (live, expert) in MUST_WORK and method not in NO_NEUTRAL and live != "biases"
        assert not possible or (method == "vera" and live in NOT_VERA)
        return
    close(answer(model), wanted)
    experts.activate(model, one)  # again, from the expert itself
    close(answer(model), wanted)
    experts.deactivate(model)
    assert same(held(model), before)


@pytest.mark.parametrize("family", ["llama", "tied_llama"])
def test_experts_follow_one_another_through_a_store(family: str, tmp_path: Path) -> None:
    wanted = {}
    for name, chosen in {
        "narrow": {},
        "wide": {"target_modules": ALL},
        "head": {"modules_to_save": ["lm_head"]},
    }.items():
        one, wanted[name] = made("lora", chosen, family, tmp_path / name)
        one.save(tmp_path / "store" / f"{name}.dvt")
    tuned(family, config("lora", LIVE["a_head"]), tmp_path / "a")
    model = peft.PeftModel.from_pretrained(base_of(family), str(tmp_path / "a")).eval()
    before = held(model)
    with Store(tmp_path / "store", 1 << 30) as store:
        for name in ("wide", "narrow", "head", "narrow", "wide", "head"):
            store.activate(model, name)
            close(answer(model), wanted[name])
    experts.deactivate(model)
    assert same(held(model), before)


@pytest.mark.parametrize("saving", [{}, {"save_embedding_layers": True}])
@pytest.mark.parametrize(
    ("chosen", "family"),
    [("a_head", "llama"), ("an_embedding", "tied_llama"), ("a_head", "gpt2"), ("biases", "gpt2"), ("plain", "gpt2")],
)
def test_the_base_under_an_adapter_is_never_written(chosen: str, family: str, saving: Any, tmp_path: Path) -> None:
    part = dict(EXPERTS[chosen]) | ({"target_modules": ["c_attn"], "fan_in_fan_out": True} if family == "gpt2" else {})
    if family == "gpt2" and chosen == "an_embedding":
        part["modules_to_save"] = ["wte"]
    one, wanted = made("lora", part, family, tmp_path, **saving)
    plain = {key: value for key, value in part.items() if key not in ("modules_to_save", "bias")}
    model = peft.get_peft_model(base_of(family), config("lora", plain)).eval()
    before = held(model)
    try:
        experts.activate(model, one)
    except LoadError:
        assert same(held(model), before)
        return
    close(answer(model), wanted)
    experts.deactivate(model)
    assert same(held(model), before)


@pytest.mark.parametrize("initial", ["chain", "zero"])
@pytest.mark.parametrize("chain", ["lora(r=4)", "dora(r=4)", "ia3", "vera(r=8)", "loha(r=2)"])
def test_a_chain_on_more_targets(chain: str, initial: Any, tmp_path: Path) -> None:
    narrow = dovetail.apply(base_of("llama"), chain, targets="q_proj", seed=3)
    wide = dovetail.apply(base_of("llama"), chain, targets=["q_proj", "v_proj"], seed=3)
    for model in (narrow, wide):
        for layer in chain_layers(model).values():
            for parameter in layer.links.parameters():
                parameter.data += 0.1
    vector = experts.task_vector(narrow)
    if initial == "zero":
        vector = experts.TaskVector(parameters(narrow))
    before = held(wide)
    try:
        experts.put(wide, vector)
    except LoadError:
        return
    close(answer(wide), answer(narrow))
    experts.deactivate(wide)
    assert all(torch.equal(before[name], tensor) for name, tensor in held(wide).items() if ".links." not in name)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    from dovetail.checkpoint.adapter import parameters_of

    return {name: tensor.detach().clone() for name, tensor in parameters_of(model).items()}
