"""Experts in live models: in place, bit for bit, undone bit for bit, and only over their own base."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import families
from dovetail import experts
from dovetail.chains.layer.linear import chain_layers
from dovetail.checkpoint.adapter import describe, load_adapter, parameters_of, save_adapter
from dovetail.checkpoint.merge import merge
from dovetail.compression.apply import advance, apply, initial_values
from dovetail.errors import DataError, LoadError
from dovetail.experts.live.activate import activate, deactivate, put
from dovetail.experts.live.placement import slots
from dovetail.models.fingerprint import model_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
CHAINS = ["lora(r=4)", "dora(r=4)", "vera(r=8)", "loha(r=2)", "ia3", "lora(r=4) >> ia3", "bottleneck(r=4)",
          "lora(r=4, elastic=[4, 2])", "int(bits=4, group=32) >> dora(r=4)"]  # fmt: skip


def noise(shapes: dict[str, tuple[int, ...]], seed: int, spread: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: spread * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def chain_expert(model: nn.Module, seed: int, density: float = 0.2) -> experts.Expert:
    said = describe(model)
    origin = experts.Origin("chain", said.base_fingerprint, said.chain, said.model_dump(mode="json"))
    return experts.compress(noise(shapes_of(parameters_of(model)), seed), density, origin=origin)


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}


# Initial values.


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_initial_values_are_those_after_apply(family: str, chain: str) -> None:
    model = apply(families.make(family), chain, seed=3)
    live, drawn = parameters_of(model), initial_values(model)
    assert {f"link/{key}" for key in drawn} == live.keys()
    assert all(torch.equal(drawn[key.removeprefix("link/")], tensor) for key, tensor in live.items())
    other = apply(families.make(family), chain, seed=4)
    drawn = initial_values(model, 4)
    assert all(torch.equal(drawn[key.removeprefix("link/")], tensor) for key, tensor in parameters_of(other).items())


def test_initial_values_of_a_later_stage() -> None:
    model = apply(families.make("llama"), "lora(r=4) >> magnitude(0.5) >> dora(r=2)", seed=3)
    with torch.no_grad():
        for tensor in parameters_of(model).values():
            tensor.add_(0.01)
    advance(model, seed=9)
    live, drawn = parameters_of(model), initial_values(model)
    assert live
    assert all(torch.equal(drawn[key.removeprefix("link/")], tensor) for key, tensor in live.items())


def test_initial_values_of_extracted_adapters() -> None:
    from dovetail.chains.layer.elastic import extract, groups

    model = apply(families.make("llama"), "lora(r=4, elastic=[4, 2])", seed=3)
    for number, group in enumerate(groups(model)):
        group.use_rank(group.ranks[number % 2])
    live, drawn = parameters_of(extract(model)), initial_values(model)
    assert all(torch.equal(drawn[key.removeprefix("link/")], tensor) for key, tensor in live.items())


# Chains.


@pytest.mark.parametrize("chain", CHAINS)
def test_chain(chain: str, tmp_path) -> None:
    model = apply(families.make("gpt2" if "dora" in chain else "llama"), chain, seed=3)
    before, where = held(model), pointers(model)
    start = initial_values(model)
    for seed in (0, 1):
        expert = chain_expert(model, seed)
        activate(model, expert)
        dense = expert.dense()
        for name, tensor in parameters_of(model).items():
            assert torch.equal(tensor, start[name.removeprefix("link/")] + dense[name])
    assert pointers(model) == where
    inputs = families.batch(model)
    with torch.no_grad():
        logits = families.logits(model, inputs)
        save_adapter(model, tmp_path)
        fresh = load_adapter(families.make(model.config.model_type), tmp_path)
        assert torch.equal(families.logits(fresh, inputs), logits)
    deactivate(model)
    assert same(held(model), before)
    deactivate(model)


def test_put_does_the_same() -> None:
    model, other = (apply(families.make("llama"), "lora(r=4) >> ia3", seed=3) for _ in range(2))
    expert = chain_expert(model, 0)
    activate(model, expert)
    put(other, experts.TaskVector(expert.dense(), expert.origin))
    assert same(held(model), held(other))
    with pytest.raises(DataError, match="NaN"):
        put(other, {name: tensor / 0 for name, tensor in expert.dense().items()}, expert.origin)
    assert same(held(model), held(other))
    deactivate(other)
    assert same(held(other), held(apply(families.make("llama"), "lora(r=4) >> ia3", seed=3)))


def test_another_seed_draws_its_own_initial_values() -> None:
    maker = apply(families.make("llama"), "lora(r=4)", seed=5)
    expert = chain_expert(maker, 0)
    model = apply(families.make("llama"), "lora(r=4)", seed=3)
    activate(model, expert)
    activate(maker, expert)
    assert same(held(model), held(maker))
    vera = chain_expert(apply(families.make("llama"), "vera(r=8)", seed=5), 0)
    with pytest.raises(LoadError, match="projections"):
        activate(apply(families.make("llama"), "vera(r=8)", seed=3), vera)


def test_wrong_chain_and_base_are_refused() -> None:
    expert = chain_expert(apply(families.make("llama"), "lora(r=4)", seed=3), 0)
    for model, text in [
        (families.make("llama"), "no such tensor"),
        (apply(families.make("llama"), "lora(r=8)"), "shape"),
        (apply(families.make("llama"), "lora(r=4, alpha=8)"), "carry the expert's chain"),
        (apply(families.make("llama", seed=1), "lora(r=4)"), "expert's fingerprint"),
    ]:
        before = held(model)
        with pytest.raises(LoadError, match=text):
            activate(model, expert)
        assert same(held(model), before)


def test_changed_bases_are_noticed() -> None:
    model = apply(families.make("llama"), "lora(r=4)", seed=3)
    expert = chain_expert(model, 0)
    activate(model, expert)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("base.dense")).mul_(2)
    with pytest.raises(LoadError, match="expert's fingerprint"):
        activate(model, expert)


# Base weights.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_base(family: str, dtype: torch.dtype) -> None:
    model = families.make(family).to(dtype)
    before, where = held(model), pointers(model)
    names = shapes_of(dict(model.named_parameters()))
    made = []
    for seed in (0, 1):
        vector = {name: tensor.to(dtype) for name, tensor in noise(names, seed).items()}
        made.append(experts.compress(vector, 0.05, base=model, origin=experts.Origin("base")))
    for expert in (*made, made[0]):
        activate(model, expert)
        dense, now = expert.dense(), held(model)
        assert all(torch.equal(now[name], before[name] + dense[name]) for name in dense)
    put(model, experts.TaskVector(made[1].dense(), made[1].origin))
    assert all(torch.equal(now[name], before[name] + made[1].dense()[name]) for name in dense for now in [held(model)])
    assert pointers(model) == where
    deactivate(model)
    assert same(held(model), before)
    wrong = families.make(family, seed=1).to(dtype)
    with pytest.raises(LoadError, match="expert's fingerprint"):
        activate(wrong, made[0])


def test_base_is_known_also_while_an_expert_is_in_it() -> None:
    model = families.make("llama")
    names = shapes_of(dict(model.named_parameters()))
    anonymous = experts.compress(noise(names, 0), 0.05, origin=experts.Origin("base"))
    known = experts.compress(noise(names, 1), 0.05, base=model, origin=experts.Origin("base"))
    before = held(model)
    activate(model, anonymous)
    activate(model, known)
    deactivate(model)
    assert same(held(model), before)


def test_columns_that_are_not_contiguous() -> None:
    model = nn.Linear(6, 4)
    model.weight.data = torch.randn(6, 4).t()
    before = held(model)
    for initial in ("base", "zero"):
        expert = experts.compress({"weight": torch.randn(4, 6)}, 0.5, origin=experts.Origin(initial))
        activate(model, expert)
        start = before["weight"] if initial == "base" else 0
        assert torch.equal(model.weight.detach(), start + expert.dense()["weight"])
    deactivate(model)
    assert same(held(model), before)


def test_tied_weights_are_named_once() -> None:
    model = families.make("gpt2")
    with pytest.raises(LoadError, match="remove one of them"):
        slots(model, shapes_of(model.state_dict()))


# Stock peft models.


def peft_model(seed: int = 0, **config):
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
        return get_peft_model(families.make("llama", seed=seed), LoraConfig(**(wanted | config)))


@pytest.mark.parametrize("dora", [False, True])
def test_stock_peft(dora: bool) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from dovetail.experts.sources import peft_initial

    model, other = peft_model(use_dora=dora).eval(), peft_model(use_dora=dora).eval()
    config = {key: value for key, value in model.peft_config["default"].to_dict().items() if key != "auto_mapping"}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    before, where = held(model), pointers(model)
    shapes = shapes_of(get_peft_model_state_dict(model))
    assert any("lm_head" in name for name in shapes)
    origin = experts.Origin("peft", model_fingerprint(families.make("llama")), peft=config)
    start = peft_initial(config, shapes, families.make("llama"))
    for seed in (0, 1):
        expert = experts.compress(noise(shapes, seed), 0.2, origin=origin)
        activate(model, expert)
        values = {name: tensor + start.get(name, 0) for name, tensor in expert.dense().items()}
        set_peft_model_state_dict(other, values)
        assert same(held(model), held(other))
    assert pointers(model) == where
    inputs = families.batch(model)
    with torch.no_grad():
        assert torch.equal(families.logits(model, inputs), families.logits(other, inputs))
    deactivate(model)
    assert same(held(model), before)
    with pytest.raises(LoadError, match="expert's fingerprint"):
        activate(peft_model(seed=1, use_dora=dora), expert)
    with pytest.raises(LoadError, match="lora_alpha"):
        activate(peft_model(lora_alpha=16, use_dora=dora), expert)
    model.merge_adapter()
    with pytest.raises(LoadError, match="merged"):
        activate(model, expert)


def test_each_peft_adapter_has_its_own_expert() -> None:
    model = peft_model()
    model.add_adapter("other", model.peft_config["default"])
    before = held(model)
    shapes = shapes_of(slots_of_adapter(model))
    expert = experts.compress(noise(shapes, 0), 0.2)
    activate(model, expert)
    model.set_adapter("other")
    activate(model, expert)
    now = held(model)
    changed = {name for name in now if not torch.equal(now[name], before[name])}
    assert any(".other" in name for name in changed)
    assert any(".default" in name for name in changed)
    deactivate(model)
    model.set_adapter("default")
    deactivate(model)
    assert same(held(model), before)


def slots_of_adapter(model) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=model.active_adapter)


# Failures.


def damaged(expert: experts.Expert, name: str) -> experts.Expert:
    from dataclasses import replace

    coded = expert.coded[name]
    blocks = coded.blocks.copy()
    blocks[len(blocks) // 2] ^= 1
    return experts.Expert(expert.header, expert.coded | {name: replace(coded, blocks=blocks)})


@pytest.mark.parametrize("verified", [False, True])
@pytest.mark.parametrize("initial", ["base", "zero", "chain"])
def test_what_fails_changes_nothing(initial: str, verified: bool) -> None:
    model = families.make("llama")
    if initial == "chain":
        apply(model, "lora(r=4) >> ia3", seed=3)
        good = chain_expert(model, 0)
        bad = damaged(chain_expert(model, 1), list(good.coded)[-1])
    else:
        names = shapes_of(dict(model.named_parameters()))
        good, bad = (experts.compress(noise(names, s), 0.2, origin=experts.Origin(initial)) for s in (0, 1))
        bad = damaged(bad, list(bad.coded)[-1])
    before = held(model)
    with pytest.raises(LoadError, match="CRC"):
        activate(model, bad, verified=verified)
    assert same(held(model), before)
    activate(model, good)
    now = held(model)
    with pytest.raises(LoadError, match="CRC"):
        activate(model, bad, verified=verified)
    assert same(held(model), now)
    deactivate(model)
    assert same(held(model), before)


def test_kinds_follow_one_another() -> None:
    """What another kind, or an expert of fewer tensors, leaves behind is nothing."""
    model = families.make("llama")
    before, names = held(model), shapes_of(dict(model.named_parameters()))
    few = dict(list(names.items())[:3])
    zero = experts.compress(noise(names, 0), 0.2)
    some = experts.compress(noise(few, 1), 0.2)
    base = experts.compress(noise(few, 2), 0.2, origin=experts.Origin("base"))
    for expert in (zero, some, base, zero, base, some):
        activate(model, expert)
        dense, now = expert.dense(), held(model)
        for name, tensor in now.items():
            start = before[name] if name not in dense or expert is base else torch.zeros(())
            assert torch.equal(tensor, start + dense.get(name, 0))
    deactivate(model)
    assert same(held(model), before)


def test_a_scale_too_large_for_the_live_dtype() -> None:
    model = nn.Linear(4, 4).half()
    expert = experts.compress({"weight": 1e6 * torch.randn(4, 4)}, 0.5)
    before = held(model)
    with pytest.raises(LoadError, match="scale"):
        activate(model, expert)
    assert same(held(model), before)


@pytest.mark.parametrize("initial", ["zero", "base"])
def test_values_too_large_for_the_live_dtype(initial: str) -> None:
    model = nn.Linear(4, 4).half()
    before = held(model)
    with pytest.raises(DataError, match="infinity in torch"):
        put(model, {"weight": torch.full((4, 4), 1e6)}, experts.Origin(initial))
    assert same(held(model), before)


def test_a_vector_may_go_while_it_is_active() -> None:
    model, vector = nn.Linear(4, 4), {"weight": torch.randn(4, 4)}
    before = held(model)
    put(model, vector)
    vector.clear()
    deactivate(model)
    assert same(held(model), before)


def test_magnitudes_of_another_base_are_taken_anew() -> None:
    model = apply(families.make("llama"), "dora(r=4)", seed=3)
    activate(model, chain_expert(model, 0))
    with torch.no_grad():
        for layer in chain_layers(model).values():
            assert isinstance(layer.base.dense, Tensor)
            layer.base.dense.mul_(2)
    expert = chain_expert(model, 1)
    assert expert.origin.adapter is not None
    activate(model, expert)
    wanted = initial_values(model)
    live, change = parameters_of(model), expert.dense()
    for name in live:
        assert torch.equal(live[name].detach(), change[name] + wanted[name.removeprefix("link/")])


def test_elastic_ranks_come_with_the_expert() -> None:
    from dovetail.chains.layer.elastic import ranks, set_ranks

    model = apply(families.make("llama"), "lora(r=4, elastic=[4, 2, 1])", seed=3)
    before = ranks(model)
    set_ranks(model, dict.fromkeys(before, 1))
    expert = chain_expert(model, 0)
    set_ranks(model, before)
    activate(model, expert)
    assert set(ranks(model).values()) == {1}
    deactivate(model)
    assert ranks(model) == before


def test_tensors_that_were_replaced_are_found_again() -> None:
    model = nn.Linear(6, 4)
    expert = experts.compress({"weight": torch.randn(4, 6)}, 0.5)
    activate(model, expert)
    model.weight = nn.Parameter(torch.randn(4, 6))
    activate(model, expert)
    assert torch.equal(model.weight.detach(), expert.dense()["weight"])
    model.bfloat16()
    activate(model, expert)
    assert torch.equal(model.weight.detach(), expert.dense(torch.bfloat16)["weight"])


def test_nothing_of_a_model_outlives_it() -> None:
    model = families.make("llama")
    expert = experts.compress(noise(shapes_of(dict(model.named_parameters())), 0), 0.2, base=model)
    activate(model, expert)
    gone = [weakref.ref(model), weakref.ref(model.get_parameter("lm_head.weight"))]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_threads_switch_one_model() -> None:
    model = families.make("llama")
    names = shapes_of(dict(model.named_parameters()))
    made = [experts.compress(noise(names, seed), 0.05, base=model, origin=experts.Origin("base")) for seed in range(4)]
    before = held(model)

    def switch(seed: int) -> None:
        for number in range(5):
            activate(model, made[(seed + number) % 4])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(switch, range(4)))
    now = held(model)
    assert any(all(torch.equal(now[n], before[n] + each.dense()[n]) for n in names) for each in made)
    deactivate(model)
    assert same(held(model), before)


def test_weights_loaded_under_an_expert_stay() -> None:
    model, other = families.make("llama"), families.make("llama", seed=5)
    names = shapes_of(dict(model.named_parameters()))
    expert = experts.compress(noise(names, 0), 0.2, base=model, origin=experts.Origin("base"))
    activate(model, expert)
    model.load_state_dict(other.state_dict())
    with pytest.raises(LoadError, match="fingerprint"):
        activate(model, expert)
    deactivate(model)
    assert same(held(model), held(other))
    activate(model, experts.compress(noise(names, 1), 0.2, base=other, origin=experts.Origin("base")))
    model.bfloat16()  # what was written is rounded with the rest
    deactivate(model)
    assert same(held(model), held(other.bfloat16()))


def test_a_chain_that_was_merged_is_forgotten() -> None:
    model = apply(families.make("llama"), "lora(r=4)")
    activate(model, chain_expert(model, 0))
    merge(model)
    apply(model, "lora(r=4)")
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter.add_(1)
    before = held(model)
    deactivate(model)  # nothing is active in the new chain
    assert same(held(model), before)
