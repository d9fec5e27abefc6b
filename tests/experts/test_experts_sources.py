"""Task vectors from adapters and checkpoints, and back: what is unpacked is θ_init + τ, for every source and family."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import dovetail
from dovetail import experts
from dovetail.chains.layer.applied import applied
from dovetail.checkpoint.adapter import parameters_of, save_adapter
from dovetail.errors import ChainError, LoadError
from dovetail.experts.vectors import specs_of
from families import batch, logits, make

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own


def disturb(model: nn.Module, seed: int = 1) -> nn.Module:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


CHAINS = [
    "lora(r=4)",
    "dora(r=4)",
    "vera(r=8)",
    "lora(r=4) >> ia3",
    "nf4(block=32) >> lora(r=4)",
    "magnitude(0.5) >> lora(r=4) >> remask",
]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_there_and_back(chain: str, family: str, tmp_path: Path) -> None:
    model = disturb(dovetail.apply(make(family), chain, seed=3))
    wanted = logits(model, batch(model))
    live = experts.task_vector(model)
    dovetail.save_adapter(model, tmp_path / "adapter")
    base = make(family)
    before = base.state_dict()
    vector = experts.task_vector(tmp_path / "adapter", base)
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert vector.origin == live.origin
    assert all(torch.equal(vector[name], live[name]) for name in live)
    assert vector.origin.chain == chain
    experts.unpack(vector, tmp_path / "back", base)
    again = dovetail.load_adapter(make(family), tmp_path / "back")
    torch.testing.assert_close(logits(again, batch(again)), wanted, rtol=1e-5, atol=1e-5)


def test_zeros_of_a_chain_are_its_initial_values(tmp_path: Path) -> None:
    model = dovetail.apply(make("llama"), "lora(r=4) >> ia3", seed=3)
    vector = experts.task_vector(model)
    assert all(not tensor.any() for tensor in vector.values())


def test_a_model_that_carries_the_chain_is_as_it_was(tmp_path: Path) -> None:
    model = disturb(dovetail.apply(make("llama"), "lora(r=4)", seed=3))
    save_adapter(model, tmp_path / "tuned")
    other = disturb(dovetail.apply(make("llama"), "lora(r=4)", seed=4))
    vector = experts.task_vector(tmp_path / "tuned", other)
    assert applied(other).seed == 4
    for name, tensor in experts.task_vector(model).items():
        assert torch.equal(vector[name], tensor)
    expert = experts.compress(vector, 0.2)
    for active in (False, True):
        if active:
            experts.activate(other, experts.compress(vector, 0.1))
        before = {name: tensor.detach().clone() for name, tensor in parameters_of(other).items()}
        experts.unpack(expert, tmp_path / "back", other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in parameters_of(other).items())
    experts.deactivate(other)  # what is active is known still, and no more
    assert all(not tensor.any() for name, tensor in parameters_of(other).items() if name.endswith("/B"))
    fresh = make("llama")
    experts.unpack(expert, tmp_path / "back", fresh)
    tuned = disturb(dovetail.apply(fresh, "lora(r=4)", seed=3))
    experts.deactivate(tuned)
    assert any(bool(tensor.any()) for name, tensor in parameters_of(tuned).items() if name.endswith("/B"))


def test_a_calibrated_chain_needs_a_model_that_carries_it(tmp_path: Path) -> None:
    model = make("llama")
    dovetail.apply(model, "wanda(0.5) >> lora(r=4) >> remask", calibration=[batch(model)])
    expert = experts.compress(experts.task_vector(disturb(model)), 0.2)
    with pytest.raises(ChainError, match="fitted to data"):
        experts.unpack(expert, tmp_path / "a", make("llama"))
    assert not (tmp_path / "a").exists()
    experts.unpack(expert, tmp_path / "b", model)
    assert (tmp_path / "b" / "adapter.json").is_file()


def stock(family: str, method: str) -> peft.PeftModel:
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[family]
    conv = family == "gpt2"
    configs = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=conv),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=targets, use_dora=True, fan_in_fan_out=conv),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=targets[1:], fan_in_fan_out=conv),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=targets, fan_in_fan_out=conv),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=targets),
        "heads": lambda: peft.LoraConfig(r=4, target_modules=targets, modules_to_save=["lm_head"], fan_in_fan_out=conv),
    }
    torch.manual_seed(0)
    return peft.get_peft_model(make(family), configs[method]())


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera", "loha", "heads"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_peft_adapter_there_and_back(method: str, family: str, tmp_path: Path) -> None:
    if (method, family) == ("loha", "gpt2"):
        pytest.skip("peft's LoHa takes no Conv1D")
    if (method, family) == ("vera", "llama"):
        pytest.skip("peft's VeRA takes layers of one shape")
    model = disturb(stock(family, method))
    wanted = logits(model, batch(model))
    model.save_pretrained(str(tmp_path / "adapter"))
    vector = experts.task_vector(tmp_path / "adapter", make(family))
    assert vector.origin.initial == "peft"
    assert vector.origin.base == experts.compress({}, 0.1, base=make(family)).origin.base
    for name, tensor in vector.items():  # what starts at 1, or at a norm, is a difference
        if "lora_A" not in name and "hada" not in name:
            assert tensor.abs().max() < 0.5, name
    experts.unpack(vector, tmp_path / "back", make(family))
    again = peft.PeftModel.from_pretrained(make(family), str(tmp_path / "back"))
    torch.testing.assert_close(logits(again, batch(again)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", [None, 5, "x", -1, 2**80])
def test_projections_that_the_key_does_not_draw(key: object, tmp_path: Path) -> None:
    disturb(stock("gpt2", "vera")).save_pretrained(tmp_path)
    path = tmp_path / ("adapter_model.safetensors" if key is None else "adapter_config.json")
    if key is None:
        tensors = load_file(path)
        tensors["base_model.vera_B"] += 0.1
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_prng_key": key}))
    with pytest.raises(LoadError, match="drawn from projection_prng_key"):
        experts.task_vector(tmp_path)


def test_what_needs_its_base_says_so(tmp_path: Path) -> None:
    stock("llama", "dora").save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(LoadError, match=r"no base[\s\S]*pass base=MODEL"):
        experts.task_vector(tmp_path / "adapter")
    make("llama").save_pretrained(tmp_path / "tuned")
    with pytest.raises(LoadError, match="no base"):
        experts.task_vector(tmp_path / "tuned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_there_and_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make(family).to(dtype)
    tuned = disturb(make(family).to(dtype))
    tuned.save_pretrained(tmp_path / "tuned")
    vector = experts.task_vector(tmp_path / "tuned", base)
    assert vector.origin.initial == "base"
    for name, spec in specs_of(vector).items():
        assert vector[name].dtype == spec.dtype == dtype
        summed = base.state_dict()[name].float() + vector[name].float()
        torch.testing.assert_close(summed, tuned.state_dict()[name].float(), rtol=0.02, atol=1e-4)
    same = [torch.equal(vector[name], vector[name]) for name in vector]
    assert all(same)  # made anew, and not from what making it once has changed
    experts.unpack(vector, tmp_path / "back", base)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(again, batch(again)), logits(tuned, batch(tuned)), rtol=tolerance, atol=tolerance)


def test_shards_and_packed_experts_of_checkpoints(tmp_path: Path) -> None:
    base, tuned = make("llama"), disturb(make("llama"))
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    vector = experts.task_vector(tmp_path / "tuned", base)
    expert = experts.compress(vector, 0.1)
    assert expert.kept == round(0.1 * expert.numel)
    whole = experts.compress(dict(vector.items()), 0.1)
    assert all(torch.equal(expert.dense()[name], whole.dense()[name]) for name in vector)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    experts.activate(base, expert)
    for name, tensor in expert.dense().items():
        torch.testing.assert_close(base.state_dict()[name], before[name] + tensor)
    experts.deactivate(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_bad_sources(tmp_path: Path) -> None:
    base, tuned = make("llama"), make("llama")
    with pytest.raises(LoadError):
        experts.task_vector(tmp_path / "nothing", base)
    tuned.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "q_proj" in name)
    save_file({**tensors, "other.weight": torch.zeros(2)}, file)
    with pytest.raises(LoadError, match="the base lacks"):
        experts.task_vector(tmp_path / "tuned", base)
    save_file({**tensors, name: torch.zeros(2)}, file)
    with pytest.raises(LoadError, match="shape"):
        experts.task_vector(tmp_path / "tuned", base)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(LoadError, match="no " + name):
        experts.task_vector(tmp_path / "tuned", base)
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(LoadError):
        experts.task_vector(tmp_path / "tuned", base)
    carrying = dovetail.apply(make("llama"), "lora(r=2)")
    with pytest.raises(LoadError, match="a model with a chain"):
        experts.task_vector(tmp_path / "tuned", carrying)
    (tmp_path / "p").mkdir()
    for text in ("[]", "{", "[" * 100000):
        (tmp_path / "p" / "adapter_config.json").write_text(text)
        with pytest.raises(LoadError):
            experts.task_vector(tmp_path / "p", base)
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(LoadError, match="adapter_model"):
        experts.task_vector(tmp_path / "p", base)


def test_a_tied_weight_that_is_stored_twice(tmp_path: Path) -> None:
    base, tuned = make("gpt2"), make("gpt2", seed=4)
    head, embedding = "lm_head.weight", "transformer.wte.weight"
    assert base.get_parameter(head).data_ptr() == base.get_parameter(embedding).data_ptr()
    tuned.save_pretrained(tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    save_file(tensors, file)
    expert = experts.compress(experts.task_vector(tmp_path / "tuned", base), 1.0, scale="tensor")
    assert (head in expert.shapes) != (embedding in expert.shapes)
    experts.activate(base, expert)
    experts.deactivate(base)
    experts.unpack(expert, tmp_path / "back", base)
    save_file(tensors | {head: tensors[head] + 1}, file)
    with pytest.raises(LoadError, match="the base ties it"):
        experts.task_vector(tmp_path / "tuned", base)
